"""Models whose weights stay in their files until they are sharded; then each rank reads its slices.

``pretrained.py`` builds such a model, ``deferred.py`` is what its parameters are, ``values.py`` where they come from
and how a part is read, ``files.py`` the files, ``fill.py`` what ``prepare`` does.
"""

from .deferred import DeferredTensor
from .pretrained import from_pretrained

__all__ = ["DeferredTensor", "from_pretrained"]
