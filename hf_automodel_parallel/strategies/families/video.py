"""Video transformers of diffusers: their attention is sharded by heads, although it counts its heads itself and may
normalise across all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ...core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ...core.sharding_spec import PARTIAL_GRADIENT, OutputHook, ParameterSpec, ShardingSpec
from ...errors import PlanError, UnsupportedError
from ...tensor_parallel.collectives import copy_to_tp, reduce_from_tp
from ..context import ParallelizeContext
from .family import FamilyParallelizationStrategy

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class VideoParallelizationStrategy(FamilyParallelizationStrategy):
    """The default strategy, plus the head counts and norms in diffusers' attention, which a plan cannot express."""

    mixes_tokens = "its sequence arises inside of the model from frames and patches"
    no_sequence_parallel = (
        "its blocks scale and shift by vectors of each sample, and attend to a second sequence of another length"
    )

    def plan(self, context: ParallelizeContext) -> None:
        """Decide as for every model, without FSDP2's cast of the blocks' inputs: rotary tables, an argument of the
        blocks, stay in float32 as in one process.
        """
        context.fsdp.cast_between_layers = False
        super().plan(context)

    def select_tensor_parallel(self, context: ParallelizeContext) -> None:
        """Choose and resolve the plan, and add the norms of the attentions that it shards by heads."""
        super().select_tensor_parallel(context)
        size, spec = context.tp_mesh.size(), context.spec  # type: ignore[union-attr]
        for name, attention in head_sharded_attentions(context.model, spec):  # type: ignore[arg-type]
            _check_attention(name, attention, spec, size)  # type: ignore[arg-type]
            for norm_name, norm in _norms(attention):
                spec.parameters |= _norm_parameters(f"{name}.{norm_name}", norm, attention)  # type: ignore[union-attr]

    def apply_tensor_parallel(self, context: ParallelizeContext) -> None:
        """Shard the model, and set the head counts and norms of sharded attentions to the heads of this rank."""
        attentions = list(head_sharded_attentions(context.model, context.spec))  # type: ignore[arg-type]
        for name, attention in attentions:
            for norm_name, norm in _norms(attention):
                if context.spec.parameters[f"{name}.{norm_name}.weight"].dim is not None:  # type: ignore[union-attr]
                    sharded_norm = NormOverRanks(norm, context.tp_mesh)  # type: ignore[arg-type]
                    ForwardStack.of(norm).push(ForwardSlot.COMPUTATION, sharded_norm)
            # diffusers reshapes to self.heads.
            attention.heads //= context.tp_mesh.size()  # type: ignore[union-attr,operator,assignment]
        super().apply_tensor_parallel(context)


def head_sharded_attentions(model: nn.Module, spec: ShardingSpec) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each attention of diffusers with a projection that ``spec`` shards by heads."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "heads", None), int) and any(_is_sharded(spec, name, p) for p in _PROJECTIONS):
            yield name, module


def _is_sharded(spec: ShardingSpec, attention: str, projection: str) -> bool:
    boundary = spec.modules.get(f"{attention}.{projection}")
    return boundary is not None and boundary.native_style is None and boundary.output is OutputHook.NONE


def _check_attention(name: str, attention: nn.Module, spec: ShardingSpec, size: int) -> None:
    """Raise unless each rank gets entire heads of all projections."""
    if attention.heads % size:  # type: ignore[operator]
        raise PlanError(
            f"num_attention_heads={attention.heads} does not divide by tp_size={size}: {name} needs a whole number of "
            f"heads on each rank. Choose a tp_size that divides it, or leave {name} out of the tp_plan."
        )
    if getattr(attention, "fused_projections", False):
        raise UnsupportedError(
            f"{name} has fused projections, which tensor parallelism cannot shard by heads. Call "
            f"unfuse_qkv_projections() first, or use tp_size=1."
        )
    present = [p for p in _PROJECTIONS if isinstance(getattr(attention, p, None), nn.Module)]
    whole = [p for p in present if not _is_sharded(spec, name, p)]
    if whole:
        raise PlanError(
            f"the tp_plan shards some projections of {name} by heads, but not {', '.join(whole)}. Give all of "
            f"{', '.join(present)} the style 'colwise', or none."
        )


def _norms(attention: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norms of queries and keys that have a weight, of both streams."""
    for name, child in attention.named_children():
        if name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k") and any(True for _ in child.parameters()):
            yield name, child


def _norm_parameters(name: str, norm: nn.Module, attention: nn.Module) -> dict[str, ParameterSpec]:
    """Placements of a norm's parameters: ``Shard(0)`` for a norm across all heads.

    A norm over the features of one head has one weight for all heads. It is replicated, and since each rank has only
    some of the heads, its gradient is ``Partial``.

    Raises:
        UnsupportedError: any other norm.
    """
    width = attention.inner_dim
    shapes = {key: tuple(parameter.shape) for key, parameter in norm.named_parameters()}
    if all(shape[0] * attention.heads == width for shape in shapes.values()):  # type: ignore[operator]
        return {f"{name}.{key}": PARTIAL_GRADIENT for key in shapes}
    if isinstance(norm, nn.RMSNorm) and shapes == {"weight": (width,)}:
        return {f"{name}.weight": ParameterSpec(0)}
    raise UnsupportedError(
        f"{name} is a {type(norm).__name__} over {shapes}, neither a norm of each head nor an nn.RMSNorm across all of "
        f"them, so its attention cannot be sharded by heads. Give a tp_plan without this attention."
    )


class NormOverRanks(ForwardWrapper):
    """The forward of an ``nn.RMSNorm`` whose last dimension is sharded over tp.

    Forward all-reduces one number per token, the sum of squares. The features of every rank depend on that sum, so its
    gradient is all-reduced in backward.

    Args:
        norm: the norm; in its forward the weight is this rank's shard.
        mesh: the tp axis.
    """

    def __init__(self, norm: nn.RMSNorm, mesh: DeviceMesh) -> None:
        self.norm = norm
        self.width = norm.normalized_shape[0]
        self.group: dist.ProcessGroup = mesh.get_group()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Normalise ``x`` of shape (..., features / ranks)."""
        wide: Any = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if self.norm.eps is None else self.norm.eps
        total = copy_to_tp(reduce_from_tp(wide.square().sum(-1, keepdim=True), self.group), self.group)
        normed = wide * torch.rsqrt(total / self.width + eps)
        return (normed * self.norm.weight).to(x.dtype)
