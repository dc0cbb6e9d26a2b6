"""Strategies of a third party."""
