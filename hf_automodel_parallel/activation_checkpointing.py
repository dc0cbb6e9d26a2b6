"""Activation checkpointing: none, full, submodule or selective; always non-reentrant, with the RNG state preserved.

A checkpoint wraps a module's ``forward``, not the module, so no name changes. Its recomputation runs through the
module's local-parameter scope again (:mod:`.tensor_parallel.local_parameters`). FSDP2's hooks stay outside.

A reentrant checkpoint runs its first forward without gradients. Code compiled inside of it would then have a graph
without a backward, and adapters would silently get no gradients. So all checkpoints are non-reentrant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import compat
from .core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from .core.options import CHECKPOINTING_MODES
from .errors import ConfigError, UnsupportedError


def normalized_mode(value: str | bool | None) -> str:
    """Return the mode of a validated config value: None and False mean "none", True means "full"."""
    return "full" if value is True else value or "none"


def mode_of_argument(value: str | bool | None) -> str:
    """Return the mode of an ``activation_checkpointing`` argument of the reference API.

    Args:
        value: a bool (True means "full"), or the name of a mode. Upper case, "-" and "_" are ignored ("Sub-Module");
            "off" means "none".

    Raises:
        ConfigError: ``value`` is not the name of a mode.
    """
    if value is None or isinstance(value, bool):
        return normalized_mode(value)
    mode = str(value).lower().replace("-", "").replace("_", "")
    if mode in ("off", "false", ""):
        return "none"
    if mode not in CHECKPOINTING_MODES:
        raise ConfigError(
            f"activation_checkpointing={value!r}: give True, False or one of {', '.join(CHECKPOINTING_MODES)}."
        )
    return mode


# ---- policies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavePolicy:
    """The results that a checkpoint saves for the backward; all others are recomputed.

    Attributes:
        name: for messages and debuggers.
        context_fn: argument of torch's ``checkpoint``; None: save the inputs only. It must be a module-level function:
            dynamo rejects bound methods, and treats the integers in a ``functools.partial`` as dynamic sizes.
        eager: the policy also pays off in a layer that is not compiled.
    """

    name: str
    context_fn: Callable[[], tuple[Any, Any]] | None = None
    eager: bool = True


def selective_contexts(every: int = 2, all_gathers: bool = True) -> tuple[Any, Any]:
    """Return (forward, recomputation) contexts of a checkpoint that saves matrix products, attention and collectives.

    Args:
        every: save one of ``every`` matrix products.
        all_gathers: also save the results of all-gathers.
    """
    # By is_recompute. Forward and recomputation run the same sequence of operators, so both decide alike.
    counts = {False: 0, True: 0}
    gathering = {False: False, True: False}  # the last collective was an all-gather that is not saved
    # Storage -> reference. The weak reference keeps the address from being reused, not the memory.
    saved: dict[int, StorageWeakRef] = {}

    def saves(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_recompute: bool) -> bool:
        if operator in _ALWAYS_SAVED:
            if not all_gathers and operator in _COLLECTIVES:
                if operator not in _WAITS:
                    gathering[is_recompute] = operator in _ALL_GATHERS
                return not gathering[is_recompute]
            # The recomputation starts from the RNG state of the forward. If it skipped an operator that draws random
            # numbers, all later operators would draw different ones.
            return not _draws(operator, args, kwargs)
        if operator in _MATMULS:
            counts[is_recompute] += 1
            return counts[is_recompute] % every == 1 % every
        return False

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if not context.is_recompute and operator._schema.is_mutable:
            _refuse_writing(operator, args, kwargs, saved)
        if not saves(operator, args, kwargs, context.is_recompute):
            return CheckpointPolicy.PREFER_RECOMPUTE
        output = getattr(context, "op_output", None)  # missing in torch 2.11, where in-place writes are not detected
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if type(tensor) is torch.Tensor:  # a traced tensor is a subclass; its graph has no in-place writes
                reference = StorageWeakRef(tensor.untyped_storage())
                saved[reference.cdata] = reference
        return CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


def _regathering_selective_contexts() -> tuple[Any, Any]:
    return selective_contexts(all_gathers=False)


def _regathering_contexts() -> tuple[Any, Any]:
    return selective_contexts(every=1, all_gathers=False)


#: Saves only the inputs of the layer.
FULL = SavePolicy("full")

#: Saves half of the matrix products: a compromise between memory and recomputation time (torchtitan's rule).
SELECTIVE = SavePolicy("selective", selective_contexts)

#: The same with ``sequence_parallel_regather``.
SELECTIVE_REGATHER = SavePolicy("selective, all-gathers repeated", _regathering_selective_contexts)

#: Saves all expensive results except all-gathers. This is how ``sequence_parallel_regather`` works in compiled layers:
#: cheap operators the compiler recomputes anyway. Uncompiled code would save results that no backward needs, so there
#: saved-tensor hooks repeat the all-gathers instead (:mod:`.tensor_parallel.saved_shards`).
REGATHER = SavePolicy("all-gathers repeated", _regathering_contexts, eager=False)


def layer_policy(mode: str, regather: bool, compiled: bool) -> SavePolicy | None:
    """Return the policy for checkpoints around layers; None if layers get no checkpoint.

    Args:
        mode: the mode of ``activation_checkpointing``.
        regather: the value of ``sequence_parallel_regather``.
        compiled: the layers are compiled.
    """
    if mode == "full":
        return FULL
    if mode == "selective":
        return SELECTIVE_REGATHER if regather else SELECTIVE
    return REGATHER if regather and compiled else None


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Checkpointed(ForwardWrapper):
    """A forward under a non-reentrant checkpoint. Without gradients the forward is called directly.

    Args:
        policy: selects the results to save.
        offload: move saved tensors to CPU memory (pinned if CUDA is available).
    """

    def __init__(self, policy: SavePolicy = FULL, offload: bool = False) -> None:
        self.policy, self.offload = policy, offload
        self.options: dict[str, Any] = {"context_fn": policy.context_fn} if policy.context_fn else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext():
            return checkpoint(self.inner, *args, use_reentrant=False, **self.options, **kwargs)


def checkpoint_module(module: nn.Module, policy: SavePolicy = FULL, offload: bool = False) -> None:
    """Wrap the forward of ``module`` with a checkpoint, in place; see :class:`Checkpointed`."""
    ForwardStack.of(module).push(ForwardSlot.CHECKPOINT, Checkpointed(policy, offload))


def is_checkpointed(module: nn.Module) -> bool:
    """True if :func:`checkpoint_module` has wrapped the forward of ``module``."""
    return ForwardSlot.CHECKPOINT in ForwardStack.of(module)


def is_checkpoint_wrapped(module: nn.Module) -> bool:
    """True if ``module`` is torch's checkpoint wrapper, or :func:`checkpoint_module` has wrapped its forward."""
    return compat.checkpoint_wrapped_module(module) is not None or is_checkpointed(module)


def checkpointable_parts(layer: nn.Module, shares_keys: bool = False) -> list[nn.Module]:
    """Return the attention and MLP blocks of a decoder layer: its children with a forward, children and parameters.

    Args:
        layer: a decoder layer.
        shares_keys: later layers read the keys and values that the attention of this layer writes. Its recomputation
            would write them a second time, so attention blocks are left out.
    """
    parts = [
        child
        for child in layer.children()
        if compat.has_implemented_forward(child)
        and any(True for _ in child.children())
        and any(True for _ in child.parameters())
    ]
    return [part for part in parts if not (shares_keys and "attention" in type(part).__name__.lower())]


def shares_keys_and_values(model: nn.Module) -> bool:
    """True if some layers reuse the keys and values of earlier ones (``num_kv_shared_layers`` of the config)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "num_kv_shared_layers", 0) or 0)


def switch_cache_off(model: nn.Module) -> None:
    """Pass ``use_cache=False`` to training forwards: a recomputed layer would write to a cache twice.

    All models inside with this argument get it, because a composite model (vision and language) may not pass it on. The
    config is not changed, because it would be saved. Evaluation and generation keep their cache.
    """
    from transformers import PreTrainedModel

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training and torch.is_grad_enabled():
            kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    for module in model.modules():
        is_model = module is model or isinstance(module, PreTrainedModel)
        if is_model and "use_cache" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(hook, with_kwargs=True)


# ---- operators -------------------------------------------------------------------------------------------------------


def _operators(*names: str) -> set[Any]:
    """Return all overloads of the named operators; names that this torch version lacks are skipped."""
    found: set[Any] = set()
    for name in names:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.update(getattr(packet, overload) for overload in packet.overloads())
    return found


_MATMULS = _operators("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_grouped_mm")
_ALL_GATHERS = _operators("_c10d_functional::all_gather_into_tensor")
_WAITS = _operators("_c10d_functional::wait_tensor")
_COLLECTIVES = (
    _operators(
        "_c10d_functional::all_reduce",
        "_c10d_functional::reduce_scatter_tensor",
        "_c10d_functional::all_to_all_single",
    )
    | _ALL_GATHERS
    | _WAITS
)
_ALWAYS_SAVED = _COLLECTIVES | _operators(
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if this call of ``operator`` draws random numbers.

    Attention has the tag ``nondeterministic_seeded``, but draws nothing with ``dropout_p=0``.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            given = kwargs.get("dropout_p", args[position] if position < len(args) else argument.default_value)
            return given != 0.0
    return True


def _refuse_writing(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], saved: dict[int, StorageWeakRef]
) -> None:
    """Raise if ``operator`` has written in place to a saved result, which the backward would then use.

    torch compares version counters. But the result of a reshaped matrix product (``_unsafe_view``) shares its memory
    and not its version counter, so torch would not raise and the gradients would be wrong.

    Raises:
        UnsupportedError: an argument that ``operator`` mutates shares its storage with a saved result.
    """
    for position, argument in enumerate(operator._schema.arguments):
        written = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write or type(written) is not torch.Tensor:
            continue
        if StorageWeakRef(written.untyped_storage()).cdata in saved:
            raise UnsupportedError(
                f"activation_checkpointing='selective': the model changes the result of a matrix product, of attention "
                f"or of a collective in place ({operator}), so that it cannot be saved for the backward. Use 'full' or "
                "'submodule'."
            )
