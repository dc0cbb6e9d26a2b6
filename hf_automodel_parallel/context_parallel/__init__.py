"""Context parallelism: activations sharded along the sequence over the ``cp`` axis, attention over all keys.

``layout.py`` says which chunks a rank holds, ``buffers.py`` shards the tensors of a batch, ``attention.py`` all-gathers
keys and values, ``forward.py`` checks the inputs of a forward and corrects its loss, and ``models.py`` refuses models
that mix positions in other ways.
"""
