"""Towers: the parts of a model that only some forwards run, as the vision tower of a vision-language model."""
