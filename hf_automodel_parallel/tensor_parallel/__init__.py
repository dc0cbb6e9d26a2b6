"""HOW to shard: parameters are DTensors at rest and local tensors in flight; collectives stand at explicit
boundaries.
"""
