"""Models whose weights stay in their files until they are sharded; then each rank reads its slices.

``pretrained.py`` builds such a model, ``deferred.py`` defines its parameters, ``files.py`` finds and reads the files,
and ``fill.py`` gives the sharded parameters their values in ``prepare``. Which slices of which files a parameter needs
is a question to :mod:`..core.lazy_graph`.
"""

from .deferred import DeferredTensor
from .pretrained import from_pretrained

__all__ = ["DeferredTensor", "from_pretrained"]
