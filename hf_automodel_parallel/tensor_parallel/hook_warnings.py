"""A warning where hooks of the user see a share of the sequence, of which they cannot know."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from .. import compat

logger = logging.getLogger(__name__)

_LIBRARIES = frozenset(
    [__name__.partition(".")[0], "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes"]
)


def warn_of_hooks(layers: Mapping[str, nn.Module], blocks: Iterable[str], size: int) -> None:
    """Log a warning on rank 0 for the first module that works on shares and has hooks that none of the libraries has
    registered.

    Args:
        layers: the layers, by name.
        blocks: names of the modules inside of which the sequence is whole; a hook on one of these itself sees shares.
        size: number of shares.
    """
    for name, layer in layers.items():
        for path, module in layer.named_modules(prefix=name):
            if any(map(_is_foreign, compat.hooks_on(module))) and not any(path.startswith(f"{b}.") for b in blocks):
                if dist.get_rank() == 0:
                    logger.warning(
                        "sequence_parallel=True: a hook on %s sees this rank's 1/%d of the sequence, and what it "
                        "computes from that enters the loss of this rank alone. For whole hidden states use "
                        "output_hidden_states=True, or sequence_parallel=False.",
                        path,
                        size,
                    )
                return


def _is_foreign(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.partition(".")[0] not in _LIBRARIES
