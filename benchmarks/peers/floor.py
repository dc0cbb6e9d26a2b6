"""The floor: the same arithmetic and the same collectives by hand, with nothing around them.

Weights are plain tensors with this rank's shard. The shared input of q, k and v (and of gate and up) is copied to tp
once, the row-wise projections' results are summed. With FSDP2, torch's ``fully_shard`` shards what is left.

Nothing of the package is imported, its few equal autograd functions neither: what makes them slower must not make the
floor slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from .case import Case, build, compile_layers, layers_of, mesh_of, trainable
from .floor_vocabulary import shard_vocabulary
from .peer import Peer

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
SEQUENCE = 1


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return collectives.wait_tensor(collectives.all_gather_tensor(x.contiguous(), SEQUENCE, group))


def _scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return collectives.wait_tensor(collectives.reduce_scatter_tensor(x.contiguous(), "sum", SEQUENCE, group))


def _shard(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(dist.get_world_size(group), SEQUENCE)[dist.get_rank(group)].contiguous()


class CopyToTP(torch.autograd.Function):
    """Forward: nothing. Backward: sum over tp."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _sum(gradient, ctx.group), None


class SumOverTP(torch.autograd.Function):
    """Forward: sum over tp. Backward: nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


class GatherSequence(torch.autograd.Function):
    """Forward: all-gather along the sequence. Backward: reduce-scatter, or this rank's slice of what is the same on
    all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.group, ctx.partial = group, partial
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return (_scatter_sum if ctx.partial else _shard)(gradient, ctx.group), None, None


class ScatterSequence(torch.autograd.Function):
    """Forward: reduce-scatter along the sequence, or this rank's slice of what is the same on all ranks. Backward:
    all-gather.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.group = group
        return (_scatter_sum if partial else _shard)(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _gather(gradient, ctx.group), None, None


class Linear(nn.Module):
    """This rank's shard of a linear layer, with its adapter if it has one; ``finish`` makes of the result what the
    next module gets.
    """

    def __init__(self, linear: Any, dimension: int, rank: int, ranks: int, finish: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.finish = finish
        base = linear.base_layer if hasattr(linear, "base_layer") else linear

        def own(weight: nn.Parameter, sharded: bool) -> nn.Parameter:
            mine = weight.detach().chunk(ranks, dimension)[rank] if sharded else weight.detach()
            return nn.Parameter(mine.clone(), requires_grad=weight.requires_grad)

        self.weight = own(base.weight, True)
        self.lora_a = self.lora_b = None
        if base is not linear:
            self.lora_a = own(linear.lora_A["default"].weight, dimension == 1)
            self.lora_b = own(linear.lora_B["default"].weight, dimension == 0)
            self.scaling = linear.scaling["default"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = F.linear(x, self.weight)
        if self.lora_a is not None and self.lora_b is not None:
            result = result + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scaling
        return result if self.finish is None else self.finish(result)


class Attention(LlamaAttention):
    """Its input is handed to tp once, for q, k and v."""

    enter: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.enter(hidden_states), *args, **kwargs)


class MLP(LlamaMLP):
    """Its input is handed to tp once, for gate and up."""

    enter: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.enter(x))


class FlatSum:
    """All-reduces the gradients of some parameters over a group, in one buffer that lives."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup, scale: float | None = None) -> None:
        self.parameters = parameters
        self.group, self.scale = group, scale
        locals_ = [_local(parameter.detach()) for parameter in parameters]
        self.buffer = torch.empty(sum(tensor.numel() for tensor in locals_))
        parts = self.buffer.split([tensor.numel() for tensor in locals_])
        self.views = [part.view(tensor.shape) for part, tensor in zip(parts, locals_)]

    def __call__(self) -> None:
        if not self.parameters:
            return
        gradients = [_local(parameter.grad) for parameter in self.parameters]
        torch._foreach_copy_(self.views, gradients)
        dist.all_reduce(self.buffer, group=self.group)
        if self.scale is not None:
            self.buffer.mul_(self.scale)
        torch._foreach_copy_(gradients, self.views)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_peer(case: Case) -> Peer:
    """The hand-written step."""
    model: Any = build(case)
    model = model.get_base_model() if case.lora else model
    mesh = mesh_of(case)
    tp_group = mesh["tp"].get_group()
    partial: list[str] = []
    loss = None
    if case.tp > 1:
        partial = _tensor_parallel(model, case, tp_group, mesh["tp"].get_local_rank())
        if case.whole:
            loss = shard_vocabulary(model, tp_group, mesh["tp"].get_local_rank(), case.tp)
    if case.compiled:
        compile_layers(model)
    sums = []
    if case.dp > 1:
        # adapters are small: whole on every rank, and their gradients averaged in one all-reduce
        adapters = trainable(model) if case.lora else []
        for module in (*layers_of(model), model):
            fully_shard(module, mesh=mesh["dp"], ignored_params=set(adapters))
        if adapters:
            sums.append(FlatSum(adapters, mesh["dp"].get_group(), scale=1 / case.dp))
    if case.tp > 1:
        found = [parameter for name in partial if (parameter := model.get_parameter(name)).requires_grad]
        sums.append(FlatSum(found, tp_group))

    def backward(value: torch.Tensor) -> None:
        value.backward()
        for flat in sums:
            flat()

    return Peer(model, loss=loss, backward=backward)


def _tensor_parallel(model: Any, case: Case, group: dist.ProcessGroup, rank: int) -> list[str]:
    """Shard the decoder layers; the names of the parameters whose gradients are partial."""

    def enter(x: torch.Tensor) -> torch.Tensor:
        return GatherSequence.apply(x, group, True) if case.sequence_parallel else CopyToTP.apply(x, group)

    def leave(x: torch.Tensor) -> torch.Tensor:
        return ScatterSequence.apply(x, group, True) if case.sequence_parallel else SumOverTP.apply(x, group)

    for layer in model.model.layers:
        for block, cls in ((layer.self_attn, Attention), (layer.mlp, MLP)):
            block.__class__ = cls
            block.enter = enter
            for name, child in list(block.named_children()):
                if name in COLUMN + ROW:
                    setattr(block, name, Linear(child, int(name in ROW), rank, case.tp, leave if name in ROW else None))
    partial = {"lora_a": COLUMN, "lora_b": ROW}
    names = [
        name for name, _ in model.named_parameters() if name.split(".")[-2] in partial.get(name.split(".")[-1], ())
    ]
    if case.sequence_parallel:
        first, last = model.model.layers[0], model.model.layers[-1]
        first.register_forward_pre_hook(lambda module, args: (ScatterSequence.apply(args[0], group, False), *args[1:]))
        last.register_forward_hook(lambda module, args, output: GatherSequence.apply(output, group, False))
        names += [name for name, _ in model.model.layers.named_parameters(prefix="model.layers") if "norm" in name]
    return names
