"""Numerical check of fused experts: do the outputs of the ranks sum to what one process computes?

Whether the gate and the up projection of a fused weight lie one after the other or interleaved is known to the forward
of the experts only, and plans get it wrong. So a small copy of the experts is run, unsharded and on each rank's
shards.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ...core.sharding_spec import REPLICATED, InputHook, OutputHook, ParameterSpec, ShardingSpec
from ...errors import PlanError, first_line
from ..layer_kinds import is_parameter_adapter
from .numerical_checks import CannotRun, holds_layers, is_close, local_shards, own_parameters, small_copy

#: Sizes of the small copy; they differ from each other, so that a size identifies its dimension.
_EXPERTS, _WIDTH, _TOKENS, _CHOSEN = 4, 6, 5, 2


def check_experts(model: nn.Module, spec: ShardingSpec, tp_size: int, strict: bool) -> None:
    """Check into how many blocks ``spec`` cuts fused experts, and correct it where another number is right, in place.

    Args:
        model: the model; only read.
        spec: its resolved plan.
        tp_size: number of ranks on the tp axis.
        strict: the plan is the user's own: a wrong number is an error instead.

    Raises:
        PlanError: no number of blocks is right, or that of the user's own plan is not.
    """
    names = {name for name, _ in model.named_modules()}
    known: dict[Any, tuple[dict[str, int] | None, str]] = {}  # class and shapes -> fitting blocks, why not checked
    for name, hooks in list(spec.modules.items()):
        if hooks.input is not InputHook.COPY_ALL_TO_TP or hooks.output is not OutputHook.REDUCE_FROM_TP:
            continue
        path = name
        while f"{path}.base_layer" in names:
            path = f"{path}.base_layer"
        module = model.get_submodule(path)
        parameters = own_parameters(module)
        own = {key: spec.parameters.get(f"{path}.{key}", REPLICATED) for key in parameters}
        if not any(s.dim is not None for s in own.values()) or holds_layers(module):
            continue
        kind = type(module), tuple((key, tuple(p.shape), own[key]) for key, p in parameters.items())
        if kind not in known:
            try:
                known[kind] = _fitting_blocks(module, own, tp_size), ""
            except CannotRun as error:
                known[kind] = {}, str(error)
        blocks, trouble = known[kind]
        if trouble:
            spec.notes.append(f"{name} ({type(module).__name__}) was not checked numerically: {trouble}.")
            continue
        changed = {key: n for key, n in (blocks or {}).items() if n != own[key].blocks}
        if blocks is None or (changed and strict):
            hint = "".join(f" {key} is {'packed' if n > 1 else 'not packed'}." for key, n in changed.items())
            raise PlanError(
                f"the tensor-parallel plan shards the weights of {name} ({type(module).__name__}) so that the outputs "
                f"of {tp_size} ranks do not sum to that of one process.{hint} Correct the entries (colwise or "
                f"packed_colwise), or leave them and 'moe_tp_experts' out."
            )
        for key, n in changed.items():
            _set_blocks(model, spec, path, key, n)
            spec.notes.append(
                f"{path}.{key}: sharded in {n} blocks, because only then the outputs of the ranks sum to that of one "
                "process."
            )


def _set_blocks(model: nn.Module, spec: ShardingSpec, path: str, key: str, blocks: int) -> None:
    spec.parameters[f"{path}.{key}"] = replace(spec.parameters[f"{path}.{key}"], blocks=blocks)
    owner = path
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
        adapter = model.get_submodule(owner)
        if not is_parameter_adapter(adapter) or adapter.parameter_name != key:
            continue
        for name, _ in adapter.named_parameters():
            full = f"{owner}.{name}"
            if name.startswith("lora_B.") and spec.parameters.get(full, REPLICATED).dim is not None:
                spec.parameters[full] = replace(spec.parameters[full], blocks=blocks)


def _fitting_blocks(module: nn.Module, own: dict[str, ParameterSpec], tp_size: int) -> dict[str, int] | None:
    """Blocks of each parameter with which the ranks' outputs sum up, the planned ones first; None without any."""
    small, values = _small_experts(module, own, tp_size)
    arguments = _arguments(small)
    try:
        want = _run(small, values, arguments)
    except Exception as error:
        raise CannotRun(first_line(error)) from error
    if want.abs().max() == 0 or not want.isfinite().all():
        raise CannotRun("it returns zeros or no numbers")
    packable = [k for k, s in own.items() if s.dim is not None and values[k].shape[s.dim] >= 2 * 2 * tp_size]
    planned = {key: s.blocks for key, s in own.items()}
    choices = [planned]
    for counts in itertools.product((1, 2), repeat=len(packable)):
        choices.append(planned | dict(zip(packable, counts, strict=True)))
    for blocks in choices:
        specs = {key: replace(own[key], blocks=n) for key, n in blocks.items()}
        total = torch.zeros_like(want)
        try:
            for rank in range(tp_size):
                total = total + _run(small, local_shards(values, specs, rank, tp_size), arguments)
        except Exception:  # shapes that do not fit: another number of blocks
            continue
        if is_close(total, want):
            return blocks
    return None


def _small_experts(
    module: nn.Module, own: dict[str, ParameterSpec], tp_size: int
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of ``module`` with few small experts, and values for its parameters."""
    shapes = {key: tuple(p.shape) for key, p in own_parameters(module).items()}
    matrices = {k: s for k, s in shapes.items() if len(s) == 3 and own[k].dim in (1, 2)}
    if not matrices:
        raise CannotRun("its weights have no dimension of experts")
    inner = min(s[own[k].dim] for k, s in matrices.items())  # type: ignore[index]
    experts = next(iter(matrices.values()))[0]
    widths = {s[3 - own[k].dim] for k, s in matrices.items()}  # type: ignore[operator]
    if len(widths) != 1:
        raise CannotRun(f"its weights have widths of {sorted(widths)}")
    (width,) = widths
    small_inner = 2 * tp_size
    sizes = {2 * inner: 2 * small_inner, inner: small_inner, width: _WIDTH, experts: _EXPERTS}
    generator = torch.Generator().manual_seed(0)
    values = {}
    for key, shape in shapes.items():
        small = [sizes.get(size, size) for size in shape]
        if key in matrices:
            dim: int = own[key].dim  # type: ignore[assignment]
            small = [_EXPERTS, _WIDTH, _WIDTH]
            small[dim] = shape[dim] // inner * small_inner
        values[key] = torch.randn(small, generator=generator)
    copied = small_copy(module, values)
    for key, value in vars(copied).items():
        if type(value) is int and value in sizes:
            setattr(copied, key, sizes[value])
    config = getattr(copied, "config", None)
    if config is not None:
        config._experts_implementation = "eager"
    return copied, values


def _arguments(module: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    if len(names) == 1:  # the same number of tokens for each expert
        return [torch.randn(_EXPERTS * _TOKENS, _WIDTH, generator=generator)]
    result: list[torch.Tensor] = [torch.randn(_TOKENS, _WIDTH, generator=generator)]
    for name in names[1:]:
        if "ind" in name:
            rows = [torch.randperm(_EXPERTS, generator=generator)[:_CHOSEN] for _ in range(_TOKENS)]
            result.append(torch.stack(rows))
        else:
            result.append(torch.rand(_TOKENS, _CHOSEN, generator=generator))
    return result


def _run(module: nn.Module, values: dict[str, torch.Tensor], arguments: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = functional_call(module, values, tuple(x.clone() for x in arguments), tie_weights=False)
    if not isinstance(output, torch.Tensor):
        raise CannotRun("it returns no tensor")
    return output.float()
