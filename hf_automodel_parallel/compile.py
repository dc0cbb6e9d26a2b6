"""Per-layer ``torch.compile``, in place, after everything else: only the arithmetic of a layer is inside the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .tensor_parallel.in_flight import Region


def compile_layers(layers: list[nn.Module], **options: Any) -> None:
    """Compile the forward of each layer, in place.

    What is compiled is the ``forward``, not the module: FSDP2's hooks, the exchange of DTensors for local tensors and an
    activation checkpoint around the layer stay outside, so the graph holds plain tensors, checkpoints compose, and no name
    in the model changes (no ``_orig_mod``). Layers of one class share their graphs.

    Args:
        layers: the layers, after tensor parallelism and FSDP2 have been applied.
        options: passed to ``torch.compile`` (``backend``, ``mode``, ``dynamic``, ``fullgraph``, ``options``).
    """
    for layer in layers:
        forward = layer.forward
        if isinstance(forward, Region):
            forward.compile(**options)
        else:
            layer.forward = torch.compile(forward, **options)  # type: ignore[method-assign]
