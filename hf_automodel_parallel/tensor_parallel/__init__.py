"""HOW to shard: parameters are DTensors between forwards and local tensors during forward; input and output hooks of
modules run the collectives.
"""
