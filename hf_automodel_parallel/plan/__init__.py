"""WHAT to shard: selects a plan for a model, and resolves it to a sharding spec. Needs no process group and changes no
model.
"""
