"""Packed weights: several numbers of a matrix in one element of storage, with a scale for each block of numbers.

bitsandbytes' 4-bit linear layers keep the numbers of the flattened matrix (out, in), two to a byte, in a parameter of
one column. The scales (``absmax``, one for each ``blocksize`` numbers of the flattened matrix) and the code book belong
to no parameter: they are the ``quant_state`` of the layer. So a shard is a slice of the bytes, seen as (out, in / 2),
and the same slice of the scales, wherever a boundary of shards is one of blocks. Nothing is quantised anew: a rank
computes with the values that one process has. Scales that are quantised themselves (``bnb_4bit_use_double_quant``) are
float32 in the state of a shard, because their blocks of 256 scales would reach over shards.

Known by its quantisation state and by nothing else; :func:`packed_matrix` is the only place that looks for one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from .shard_layout import local_slice, tp_chunks
from .sharding_spec import REPLICATED, ParameterSpec, ShardingSpec

_BITS = 4


class PackedMatrix:
    """The packed weight of a linear layer.

    Args:
        layer: the layer, before or after its weight was sharded.
        state: its quantisation state, of the weight or of this rank's shard.

    Attributes:
        shape: (out_features, in_features) of the entire matrix.
        blocksize: numbers of the flattened matrix that have one scale.
    """

    def __init__(self, layer: nn.Linear, state: Any) -> None:
        self.layer, self.state = layer, state
        self.shape = (layer.out_features, layer.in_features)
        self.blocksize: int = state.blocksize

    def misfit(self, spec: ParameterSpec, size: int) -> str | None:
        """Why ``size`` tp ranks cannot have shards of whole blocks, placed as in ``spec``; None if they can."""
        dim, shards = _cut(spec, size)
        rows, width = self.shape
        if dim is None:
            return None
        if self.layer.weight.numel() * self.layer.weight.element_size() * 8 != rows * width * _BITS or width % 2:
            return f"its rows of {width} numbers do not fill whole bytes"
        cut = ParameterSpec(dim, spec.blocks)
        if self.shape[dim] % (spec.blocks * shards):
            return f"its {self.shape[dim]} {'rows' if dim == 0 else 'columns'} do not divide by {spec.blocks * shards}"
        for rank in range(shards):
            for chunk in tp_chunks(self.shape, cut, rank, shards):
                offset, length = chunk.offsets[dim], chunk.sizes[dim]
                unit = width if dim == 0 else 1
                if offset * unit % self.blocksize or length * unit % self.blocksize:
                    part = f"{length} rows of {width} numbers" if dim == 0 else f"{length} of {width} columns"
                    return f"a rank's {part} are no whole blocks"
        return None

    def as_matrix(self, parameter: nn.Parameter) -> nn.Parameter:
        """The full packed ``parameter`` of one column as (out_features, in_features / 2) bytes, or wider elements."""
        return nn.Parameter(parameter.detach().reshape(self.shape[0], -1), requires_grad=False)

    @torch.no_grad()
    def local_state(self, spec: ParameterSpec, rank: int, size: int, device: torch.device) -> Any:
        """The quantisation state of what ``rank`` of ``size`` computes with, with scales in float32 on ``device``.

        Args:
            spec: a placement that :meth:`misfit` has nothing against.
            rank, size: on the tp axis.
            device: of the shards.
        """
        dim, shards = _cut(spec, size)
        if dim is None:
            return self.state
        rows, width = self.shape
        scales: torch.Tensor = _scales(self.state)
        # Rows of one table row: as many as whole blocks need.
        together = self.blocksize // math.gcd(self.blocksize, width)
        table = scales.reshape(rows // together, -1)
        cut, index = ParameterSpec(dim, spec.blocks), rank * shards // size
        local = copy.copy(self.state)
        local.absmax = local_slice(table, cut, index, shards).reshape(-1).to(device)
        local.code = self.state.code.to(device)
        local.offset, local.state2, local.nested = None, None, False
        sizes = list(self.shape)
        sizes[dim] //= shards
        local.shape = torch.Size(sizes)
        return local


def _cut(spec: ParameterSpec, size: int) -> tuple[int | None, int]:
    """The dimension of which a rank computes with a part, and in how many parts it is cut."""
    if spec.dim is not None:
        return spec.dim, size
    return spec.forward_shard_dim, spec.forward_shards if spec.forward_shard_dim is not None else 1


def _scales(state: Any) -> torch.Tensor:
    """The scales as bitsandbytes computes with them, one float32 number for each block."""
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


def packed_matrix(module: nn.Module) -> PackedMatrix | None:
    """The packed weight of ``module``; None for a layer of another kind, and for a layout that is not known."""
    state: Any = getattr(module, "quant_state", None)
    known = all(hasattr(state, name) for name in ("absmax", "blocksize", "code", "nested", "quant_type"))
    if not known or not isinstance(module, nn.Linear) or state.quant_type not in ("nf4", "fp4"):
        return None
    return PackedMatrix(module, state)


def check_shards(model: nn.Module, spec: ShardingSpec, size: int) -> None:
    """Raise :class:`UnsupportedError` for a packed weight whose blocks ``size`` tp ranks would have to share."""
    for name, module in model.named_modules():
        packed = packed_matrix(module)
        place = spec.parameters.get(f"{name}.weight", REPLICATED)
        reason = None if packed is None else packed.misfit(place, size)
        if packed is not None and reason is not None:
            raise UnsupportedError(
                f"{name}.weight of shape {packed.shape} is quantised in blocks of blocksize={packed.blocksize} numbers "
                f"and cannot be sharded over tp_size={size}: {reason}. Choose a smaller tp_size, quantise without this "
                f"layer (llm_int8_skip_modules), or leave it out of the plan (tp_plan)."
            )


@contextmanager
def shown_unpacked(model: nn.Module) -> Iterator[bool]:
    """Show plain linear layers, without values, in the place of those with packed weights; for planning.

    A plan is made from shapes and forwards of full precision, and holds for the packed weights.

    Yields:
        True if the model has packed weights; if not, nothing is changed.
    """
    shown: dict[nn.Module, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in model.modules():
        for key, child in parent._modules.items():
            packed = None if child is None else packed_matrix(child)
            if packed is not None:
                places.append((parent, key, packed.layer))
                shown.setdefault(packed.layer, _unpacked(packed))
    for parent, key, child in places:
        parent._modules[key] = shown[child]
    try:
        yield bool(places)
    finally:
        for parent, key, child in places:
            parent._modules[key] = child


def _unpacked(packed: PackedMatrix) -> nn.Linear:
    """A linear layer with the attributes and hooks of the packed one, and a weight on the meta device."""
    plain = nn.Linear.__new__(nn.Linear)
    plain.__dict__.update({name: value for name, value in vars(packed.layer).items() if name != "quant_state"})
    weight = nn.Parameter(torch.empty(packed.shape, dtype=packed.state.dtype, device="meta"), requires_grad=False)
    plain.__dict__["_parameters"] = {**packed.layer._parameters, "weight": weight}
    return plain
