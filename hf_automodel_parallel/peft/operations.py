"""PEFT's operations on a sharded model: switch, merge, unload and load adapters; others raise.

PEFT computes with full weights. So its own code runs on full tensors: one layer at a time is all-gathered, PEFT merges
it, and each rank writes its shard of the result. That is right for every PEFT method, placement and mesh, and never
holds more than one full layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..core.model_view import ModelView
from ..core.ranks import raise_on_all_ranks
from ..core.swap import swapped_parameters
from ..errors import UnsupportedError
from ..fsdp.shard import fsdp_units
from ..tensor_parallel.dora import unsharded_weight_norm

if TYPE_CHECKING:
    from ..tensor_parallel.apply import TensorParallelState

#: Methods that change ``requires_grad`` or the set of parameters. That has to happen to the sharded parameters, and not
#: to the unsharded ones that FSDP2 shows after a forward.
SWITCHING = (
    "set_adapter",
    "delete_adapter",
    "set_requires_grad",
    "enable_adapter_layers",
    "disable_adapter_layers",
    "enable_adapters",
    "disable_adapters",
    "merge_adapter",
    "unmerge_adapter",
    "load_adapter",
)
#: Methods that add parameters, which would belong to no FSDP unit and have no placement on the tp axis.
ADDING = ("add_adapter", "add_weighted_adapter", "inject_adapter", "initialize_peft_layers")
#: Methods that replace PEFT's layers by the base layers.
UNLOADING = ("merge_and_unload", "unload")


#: PEFT methods that read the weights of all layers outside of the layers' forward, where they are shards.
_OUTSIDE_OF_LAYERS = {"ADALORA": "adds a penalty on the weights of its layers to the loss"}


def check_trainable_as_shards(model: nn.Module) -> None:
    """Raise for models that would be trained wrong, without an error, once they are sharded.

    Raises:
        UnsupportedError: a parameter has hooks on its gradient (the sharded parameter is another object, and its
            gradient is a shard), two parameters are views of the same memory, or a PEFT method reads all weights
            outside of the layers.
    """
    hooked = [name for name, parameter in model.named_parameters() if compat.has_gradient_hooks(parameter)]
    if hooked:
        raise UnsupportedError(
            f"{len(hooked)} parameters have gradient hooks ({', '.join(hooked[:3])}{', ...' if hooked[3:] else ''}), "
            f"which the sharded parameters that replace them would not have. If they belong to a layer-wise optimizer "
            f"(LOMO, layer-wise GaLore and APOLLO), use one that works in step(); if to a PEFT method (OSF, CPT), "
            f"another method; else change the gradients, which are shards, between accelerator.backward and "
            f"optimizer.step."
        )
    check_no_views(model)
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        method = str(getattr(config.peft_type, "value", config.peft_type))
        if method in _OUTSIDE_OF_LAYERS:
            raise UnsupportedError(
                f"the adapter {adapter!r} is PEFT's {method}, which {_OUTSIDE_OF_LAYERS[method]}, where they are "
                f"shards; it is not available. Use LoRA (rank_pattern gives layers different ranks)."
            )


def check_no_views(model: nn.Module) -> None:
    """Raise for trainable parameters that are different objects with common memory: a step changes both at once.

    Their shards have memory of their own, so they would become different. (A tied parameter is one object with several
    names, and stays one.)
    """
    trained = _ever_trained(model)
    by_storage: dict[int, list[tuple[range, str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            key = StorageWeakRef(parameter.untyped_storage()).cdata
            by_storage.setdefault(key, []).append((_bytes(parameter), name, parameter))
    for group in by_storage.values():
        # Those that reach to where the next one begins; the memory map of a file holds many parameters.
        reaching: list[tuple[range, str, nn.Parameter]] = []
        for own, name, parameter in sorted(group, key=lambda entry: entry[0].start):
            reaching = [entry for entry in reaching if entry[0].stop > own.start]
            for _, other_name, other in reaching:
                if {id(parameter), id(other)} & trained and _overlap(parameter, other):
                    raise _views_of_one_memory(model, {other_name: other, name: parameter})
            reaching.append((own, name, parameter))


def _ever_trained(model: nn.Module) -> set[int]:
    """Ids of the trainable parameters, and of those of all adapters, which ``set_adapter`` may make trainable."""
    result = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tuner = compat.peft_tuner_layer_type()
    for layer in model.modules() if tuner is not None else ():
        if isinstance(layer, tuner):  # type: ignore[arg-type]
            names: Any = layer.adapter_layer_names
            held = [getattr(layer, name, None) for name in names]
            result |= {id(p) for holder in held if isinstance(holder, nn.Module) for p in holder.parameters()}
    return result


def _bytes(tensor: torch.Tensor) -> range:
    """From the first to the last byte of ``tensor`` in its storage."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, width = tensor.storage_offset(), tensor.element_size()
    return range(start * width, (start + last + 1) * width)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two views whose byte ranges overlap have an element in common; columns of one matrix have none."""
    if one.dtype != other.dtype:
        return True
    size = max(_bytes(one).stop, _bytes(other).stop) // one.element_size()
    touched = torch.zeros(size, dtype=torch.bool, device="cpu")
    touched.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(touched.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _views_of_one_memory(model: nn.Module, views: dict[str, nn.Parameter]) -> UnsupportedError:
    configs = (getattr(model, "peft_config", None) or {}).items()
    tying = [adapter for adapter, config in configs if getattr(config, "ensure_weight_tying", False)]
    asked, remedy = "", "Let both places hold one nn.Parameter, or give each memory of its own (clone)."
    if tying:
        asked = f"ensure_weight_tying=True of the adapter {tying[0]!r}: "
        remedy = (
            "Use ensure_weight_tying=False and adapt one of the tied layers, or train them whole (modules_to_save)."
        )
    shapes = " and ".join(f"{name} of shape {tuple(view.shape)}" for name, view in views.items())
    return UnsupportedError(
        f"{asked}{shapes} are views of the same memory, which keeps them equal in one process; their shards would come "
        f"apart at the first step. {remedy}"
    )


#: Marks a model whose operations are managed.
_MANAGED = "_automodel_parallel_adapters"


def manage_adapters(
    model: nn.Module,
    state: TensorParallelState | None,
    on_unload: Callable[[nn.Module], None],
    add: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Let PEFT's operations on ``model`` do the same as in one process, or raise.

    Args:
        model: the sharded model: a ``PeftModel``, or a model with adapters of its own (transformers' integration).
        state: its tensor parallelism, None without.
        on_unload: called with the plain model after ``merge_and_unload`` or ``unload``.
        add: a ``PeftModel``'s ``add_adapter`` -> the one for the sharded model.
    """
    if model.__dict__.get(_MANAGED):  # a strategy may run the default strategy inside of its own flow
        return
    model.__dict__[_MANAGED] = True
    model.register_load_state_dict_pre_hook(_shard_loaded_values)
    merge_whole_weights(model)
    inner = ModelView.of(model).inner
    for owner in {id(o): o for o in (model, getattr(model, "base_model", None), inner)}.values():
        if not isinstance(owner, nn.Module):
            continue
        for name in SWITCHING:
            _bind(owner, name, lambda original: _resharded(model, original))
            if name == "load_adapter" and compat.is_peft_model(owner):
                _bind(owner, name, _readable_everywhere)
        # transformers' own load_adapter() always makes a new one.
        for name in (*ADDING, "load_adapter") if not compat.is_peft_model(owner) else ADDING:
            _bind(owner, name, lambda original: _refusal(original.__name__))
        if compat.is_peft_model(owner):
            del owner.__dict__["add_adapter"]
            _bind(owner, "add_adapter", add)
        for name in UNLOADING:
            _bind(owner, name, lambda original: _unloading(model, inner, state, original, on_unload))
    if compat.peft_tuner_layer_type() is not None:
        # Before FSDP2's hook, which unshards the parameters of the root.
        model.register_forward_pre_hook(_UnmergeDisabled(), prepend=True)


def merge_whole_weights(model: nn.Module) -> None:
    """Let the PEFT layers of ``model`` merge and unmerge full weights; may be called again for new layers."""
    tuner, auxiliary = compat.peft_tuner_layer_type(), compat.peft_auxiliary_wrapper_type()
    for layer in model.modules():
        if tuner is not None and isinstance(layer, (tuner, auxiliary)):  # type: ignore[arg-type]
            for name in ("merge", "unmerge"):
                if callable(getattr(layer, name, None)) and name not in layer.__dict__:
                    layer.__dict__[name] = _on_whole_weights(layer, getattr(layer, name))


def _bind(owner: nn.Module, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace the method ``name`` of ``owner`` if its class has it. (A PeftModel forwards other names to its model.)"""
    if callable(getattr(type(owner), name, None)):
        owner.__dict__[name] = wrap(getattr(owner, name))


def _resharded(model: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, called when all units are resharded: after a forward some of them show unsharded parameters."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        for unit in fsdp_units(model):
            unit.reshard()
        return original(*args, **kwargs)

    return call


def _readable_everywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_adapter``, which raises on all ranks if one of them cannot read the adapter's config."""

    @functools.wraps(original)
    def load_adapter(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        from peft import PeftConfig

        with raise_on_all_ranks("load_adapter"):
            PeftConfig.from_pretrained(
                model_id, **{k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "token", "cache_dir")}
            )
        return original(model_id, *args, **kwargs)

    return load_adapter


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"{name}() on a model that is sharded already: the new parameters would belong to no FSDP2 unit and have "
            f"no placement on the tp axis, so each rank would train its own replica. Use add_adapter() or "
            f"load_adapter() of the PeftModel instead, or do it before accelerator.prepare."
        )

    return refuse


# ---- merging -------------------------------------------------------------------------------------------------------


def _on_whole_weights(layer: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(getattr(module, "quant_state", None) is not None for module in layer.modules()):
            raise UnsupportedError(
                f"{original.__name__}() on a sharded layer with quantised weights is not available: merging quantises "
                f"them anew. Save the adapter, load the base model unquantised in one process, and merge there."
            )
        _MERGES.count += 1
        with full_parameters(layer):
            return original(*args, **kwargs)

    return call


@contextmanager
def full_parameters(layer: nn.Module) -> Iterator[None]:
    """Show the parameters of ``layer`` as full plain tensors; each rank writes its shard of changed values back.

    Collective: all ranks enter it for the same layers in the same order, between forwards.
    """

    @torch.no_grad()
    def full(name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not isinstance(parameter, DTensor):
            return None
        return nn.Parameter(parameter.full_tensor().clone(), parameter.requires_grad)

    def write_shard(parameter: DTensor, merged: torch.Tensor) -> None:
        parameter.to_local().copy_(_shard_like(merged.detach(), parameter).to_local())

    # DoRA's weight norm must not be all-reduced over tp while its inputs are full.
    with unsharded_weight_norm(layer), swapped_parameters(layer, full, write_shard):
        yield


def _shard_like(value: torch.Tensor, parameter: DTensor) -> DTensor:
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class _UnmergeDisabled:
    """Forward pre-hook: unmerge disabled adapters. PEFT does it in the forward, where it would change the unsharded
    parameters and not the shards.
    """

    def __init__(self) -> None:
        self._seen = -1  # calls of merge when the layers were looked through
        self._merged: list[nn.Module] = []

    def __call__(self, model: nn.Module, args: Any) -> None:
        if self._seen != _MERGES.count:
            self._seen, tuner = _MERGES.count, compat.peft_tuner_layer_type()
            self._merged = [m for m in model.modules() if tuner is not None and isinstance(m, tuner) and m.merged]
        for layer in self._merged:
            if layer.disable_adapters and layer.merged:
                for unit in fsdp_units(model):
                    unit.reshard()
                layer.unmerge()  # type: ignore[operator]


class _Merges:
    """Counts the calls of ``merge`` in this process: a walk through all modules per forward takes longer than a layer.

    Attributes:
        count: their number.
    """

    count = 0


_MERGES = _Merges()


# ---- unloading -----------------------------------------------------------------------------------------------------


def _unloading(
    model: nn.Module,
    inner: nn.Module,
    state: TensorParallelState | None,
    original: Callable[..., Any],
    on_unload: Callable[[nn.Module], None],
) -> Callable[..., Any]:
    """``merge_and_unload`` or ``unload``, with TP hooks and FSDP units moved from PEFT's layers to the base layers."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> nn.Module:
        for unit in fsdp_units(model):
            unit.reshard()
        before = dict(inner.named_modules(remove_duplicate=False))
        result = original(*args, **kwargs)
        after = dict(inner.named_modules(remove_duplicate=False))
        for name, old in before.items():
            new = after.get(name)
            if new is None or new is old:
                continue
            for gone in _around(old, new):
                if state is not None:
                    state.move_hooks(gone, new)
                if isinstance(gone, FSDPModule):
                    _gather_with(new, gone)
        # The root unit was on PEFT's wrapper, whose forward is not called any more.
        if model is not inner and model in fsdp_units(model):
            compat.initialize_fsdp(model)
            _gather_with(inner, model)
        on_unload(inner)
        return result

    return call


def _around(old: nn.Module, new: nn.Module) -> list[nn.Module]:
    """``old`` and the modules between it and ``new``, whose forwards are not called any more."""
    return [m for m in old.modules() if m is old or (m is not new and any(inner is new for inner in m.modules()))]


def _gather_with(module: nn.Module, unit: Any) -> None:
    """Unshard the parameters of ``unit``, whose own forward is not called any more, while ``module`` runs."""
    module.register_forward_pre_hook(lambda *_: unit.unshard() and None, prepend=True)
    module.register_forward_hook(lambda *_: unit.reshard(), always_call=True)


# ---- loading -------------------------------------------------------------------------------------------------------


def _shard_loaded_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let full plain tensors be loaded into sharded parameters: each rank takes its shard of them."""
    for unit in fsdp_units(module):
        unit.reshard()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            if value.shape == parameter.shape:
                state_dict[prefix + name] = _shard_like(value, parameter)
