"""Models whose weights stay in their files until they are sharded; then each rank reads its slices.

``pretrained.py`` builds such a model, ``deferred.py`` defines its parameters, ``files.py`` finds and reads the files,
and ``fill.py`` reads the shards in ``prepare``. :mod:`..core.lazy_graph` computes which slices of which files a shard
needs.
"""

from .deferred import DeferredTensor
from .pretrained import from_pretrained

__all__ = ["DeferredTensor", "from_pretrained"]
