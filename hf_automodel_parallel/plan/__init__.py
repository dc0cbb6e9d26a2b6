"""WHAT to shard: from a model and the user's wish to a plan, and from a plan to a sharding spec. Pure; no process
group.
"""
