"""PEFT's operations on a sharded model: switching, merging, unloading, loading; what cannot be done is refused.

PEFT computes with whole weights and knows nothing of shards. So its own code runs, on whole tensors: one layer at a
time is gathered, PEFT merges it, and each rank keeps its part of the result. That is right for every method, placement
and mesh, and never holds more than one whole layer.
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

#: They change which parameters are trainable or there, which has to happen to the shards and not to gathered copies.
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
#: They add parameters, for which no unit of FSDP2 and no place on the tp axis exists.
ADDING = ("add_adapter", "add_weighted_adapter", "inject_adapter", "initialize_peft_layers")
#: They put the base layers back into the place of PEFT's.
UNLOADING = ("merge_and_unload", "unload")


#: PEFT's methods whose model reads the weights of all layers outside of the layers' forward, where they are shards.
_OUTSIDE_OF_LAYERS = {"ADALORA": "adds a penalty on the weights of its layers to the loss"}


def check_trainable_as_shards(model: nn.Module) -> None:
    """Refuse what sharding would train wrong in silence, on every mesh.

    Raises:
        UnsupportedError: a parameter has hooks on its gradient (the sharded parameter is another object, and it gets
            only a part of the gradient), two parameters are views of the same memory, or a PEFT method works with all
            weights outside of the layers.
    """
    hooked = [name for name, parameter in model.named_parameters() if compat.has_gradient_hooks(parameter)]
    if hooked:
        raise UnsupportedError(
            f"{len(hooked)} parameters have gradient hooks ({', '.join(hooked[:3])}{', ...' if hooked[3:] else ''}), "
            f"which the shards that take their place would not have. If they belong to a layer-wise optimizer (LOMO, "
            f"layer-wise GaLore and APOLLO), use one that works in step(); if to a PEFT method (OSF, CPT), another "
            f"method; else change the gradients, which are shards, between accelerator.backward and optimizer.step."
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
    """Refuse trainable parameters that share memory as different objects: what a step writes to one changes the other.

    Their shards have memory of their own, so they would come apart. (A parameter with several names is one object and
    stays one.)
    """
    trained = _ever_trained(model)
    by_storage: dict[int, list[tuple[range, str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            key = StorageWeakRef(parameter.untyped_storage()).cdata
            by_storage.setdefault(key, []).append((_bytes(parameter), name, parameter))
    for group in by_storage.values():
        reaching: list[
            tuple[range, str, nn.Parameter]
        ] = []  # to where the next one begins; a file's mapping holds many
        for own, name, parameter in sorted(group, key=lambda entry: entry[0].start):
            reaching = [entry for entry in reaching if entry[0].stop > own.start]
            for _, other_name, other in reaching:
                if {id(parameter), id(other)} & trained and _overlap(parameter, other):
                    raise _views_of_one_memory(model, {other_name: other, name: parameter})
            reaching.append((own, name, parameter))


def _ever_trained(model: nn.Module) -> set[int]:
    """Ids of the parameters that are trainable, and of the adapters, which ``set_adapter`` may make so."""
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
    """True if two views whose bytes reach into each other have a number in common; columns of one matrix have none."""
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
    """Let PEFT's operations on ``model`` do what they do in one process, or say why they cannot.

    Args:
        model: the sharded model: a ``PeftModel``, or a model that carries adapters without one.
        state: its tensor parallelism, None without.
        on_unload: called with the plain model after ``merge_and_unload`` or ``unload``.
        add: makes of a ``PeftModel``'s ``add_adapter`` the one for the sharded model.
    """
    if model.__dict__.get(_MANAGED):  # by a strategy that runs the default one inside of its own flow
        return
    model.__dict__[_MANAGED] = True
    model.register_load_state_dict_pre_hook(_shard_loaded_values)
    merge_whole_weights(model)
    inner = ModelView.of(model).inner
    for owner in {id(o): o for o in (model, getattr(model, "base_model", None), inner)}.values():
        if not isinstance(owner, nn.Module):
            continue
        for name in SWITCHING:
            _bind(owner, name, lambda original: _at_rest(model, original))
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
        # Before FSDP2's hook, which gathers the parameters of the root.
        model.register_forward_pre_hook(_unmerge_disabled, prepend=True)


def merge_whole_weights(model: nn.Module) -> None:
    """Let the PEFT layers of ``model`` merge and unmerge whole weights; may be called again for layers that are new."""
    tuner, auxiliary = compat.peft_tuner_layer_type(), compat.peft_auxiliary_wrapper_type()
    for layer in model.modules():
        if tuner is not None and isinstance(layer, (tuner, auxiliary)):  # type: ignore[arg-type]
            for name in ("merge", "unmerge"):
                if callable(getattr(layer, name, None)) and name not in layer.__dict__:
                    layer.__dict__[name] = _on_whole_weights(layer, getattr(layer, name))


def _bind(owner: nn.Module, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace the method ``name`` of this one object, if its class (and not an object that it forwards to) has it."""
    if callable(getattr(type(owner), name, None)):
        owner.__dict__[name] = wrap(getattr(owner, name))


def _at_rest(model: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, called when all parameters are shards: after a forward some units show gathered copies instead."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        for unit in fsdp_units(model):
            unit.reshard()
        return original(*args, **kwargs)

    return call


def _readable_everywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_adapter``, after all ranks have seen that they can read the adapter's config: a rank may lack the
    files.
    """

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
            f"no place on the tp axis, so each rank would train its own copy. Use add_adapter() or load_adapter() of "
            f"the PeftModel instead, or do it before accelerator.prepare."
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
        with whole(layer):
            return original(*args, **kwargs)

    return call


@contextmanager
def whole(layer: nn.Module) -> Iterator[None]:
    """Show the parameters of ``layer`` as whole plain tensors; what is written to them is kept, each rank its part.

    Collective: all ranks enter it for the same layers in the same order. The parameters must be at rest.
    """

    @torch.no_grad()
    def full(name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not isinstance(parameter, DTensor):
            return None
        return nn.Parameter(parameter.full_tensor().clone(), parameter.requires_grad)

    def write_shard(parameter: DTensor, merged: torch.Tensor) -> None:
        parameter.to_local().copy_(_shard_like(merged.detach(), parameter).to_local())

    with unsharded_weight_norm(layer), swapped_parameters(layer, full, write_shard):
        yield


def _shard_like(value: torch.Tensor, parameter: DTensor) -> DTensor:
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _unmerge_disabled(model: nn.Module, args: Any) -> None:
    """Unmerge switched-off adapters before the forward; PEFT does it inside, where it would write to gathered
    copies.
    """
    tuner = compat.peft_tuner_layer_type()
    for layer in model.modules():
        if tuner is not None and isinstance(layer, tuner) and layer.disable_adapters and layer.merged:
            for unit in fsdp_units(model):
                unit.reshard()
            layer.unmerge()  # type: ignore[operator]


# ---- unloading -----------------------------------------------------------------------------------------------------


def _unloading(
    model: nn.Module,
    inner: nn.Module,
    state: TensorParallelState | None,
    original: Callable[..., Any],
    on_unload: Callable[[nn.Module], None],
) -> Callable[..., Any]:
    """``merge_and_unload`` or ``unload``: what was attached to PEFT's layers moves to the layers that take their
    place.
    """

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
                    state.move_boundaries(gone, new)
                if isinstance(gone, FSDPModule):
                    _gather_with(new, gone)
        if model is not inner and isinstance(model, FSDPModule):
            compat.initialize_fsdp(model)
            _gather_with(inner, model)
        on_unload(inner)
        return result

    return call


def _around(old: nn.Module, new: nn.Module) -> list[nn.Module]:
    """``old`` and what stood between it and ``new`` inside of it: nobody calls these any more. A copy that stood beside
    stays.
    """
    return [m for m in old.modules() if m is old or (m is not new and any(inner is new for inner in m.modules()))]


def _gather_with(module: nn.Module, unit: Any) -> None:
    """Gather the parameters of ``unit``, whose own forward nobody calls any more, while ``module`` runs."""
    module.register_forward_pre_hook(lambda *_: unit.unshard() and None, prepend=True)
    module.register_forward_hook(lambda *_: unit.reshard(), always_call=True)


# ---- loading -------------------------------------------------------------------------------------------------------


def _shard_loaded_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let whole plain tensors be loaded into shards: every rank reads the same file and keeps its part."""
    for unit in fsdp_units(module):
        unit.reshard()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            if value.shape == parameter.shape:
                state_dict[prefix + name] = _shard_like(value, parameter)
