"""Activation checkpointing: none, full, submodule or selective; never reentrant, with the random state preserved.

A checkpoint is put around a module's ``forward``, so no module is wrapped and no name changes. Its recomputation runs
through the module's local-parameter scope again (:mod:`.tensor_parallel.local_parameters`). Hooks of FSDP2 stay
outside.

A reentrant checkpoint runs its first forward without gradients. Anything compiled inside of it then yields a graph
without a backward, and adapters lose their gradients silently. Hence non-reentrant everywhere.
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
    """The mode that a checked config value asks for: None and False mean "none", True means "full"."""
    return "full" if value is True else value or "none"


def mode_of_argument(value: str | bool | None) -> str:
    """The mode that an ``activation_checkpointing`` argument of the reference API asks for.

    Args:
        value: a truth value (True means "full"), or a mode, in any case and with or without "-" and "_" ("Sub-Module");
            "off" means "none".

    Raises:
        ConfigError: the word does not name a mode.
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
    """Which results a checkpoint saves for the backward; the others are recomputed.

    Attributes:
        name: for messages and debuggers.
        context_fn: argument of torch's checkpoint; None: it saves its inputs alone. A function of a module: dynamo
            refuses bound methods, and would take the numbers in a partial function for dynamic sizes.
        eager: worth its memory where the layer is not compiled, too.
    """

    name: str
    context_fn: Callable[[], tuple[Any, Any]] | None = None
    eager: bool = True


def selective_contexts(every: int = 2, all_gathers: bool = True) -> tuple[Any, Any]:
    """Contexts of one checkpoint that saves matrix products, attention and collectives: of forward and recomputation.

    Args:
        every: save one of so many matrix products.
        all_gathers: save the results of all-gathers, too.
    """
    counts = {False: 0, True: 0}  # by is_recompute: forward and recomputation see the same sequence of products
    gathering = {False: False, True: False}  # the last collective was an all-gather that is not saved
    saved: dict[int, StorageWeakRef] = {}

    def saves(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_recompute: bool) -> bool:
        if operator in _ALWAYS_SAVED:
            if not all_gathers and operator in _COLLECTIVES:
                if operator not in _WAITS:
                    gathering[is_recompute] = operator in _ALL_GATHERS
                return not gathering[is_recompute]
            # The recomputation starts from the random state of the forward: an operator that draws and is not repeated
            # would shift the stream under all that follow.
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
        output = getattr(context, "op_output", None)  # torch 2.11 has no such attribute; writes go unnoticed there
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if type(tensor) is torch.Tensor:  # not while the compiler traces: its graph has no writes in place
                reference = StorageWeakRef(tensor.untyped_storage())
                saved[reference.cdata] = reference
        return CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


def _regathering_selective_contexts() -> tuple[Any, Any]:
    return selective_contexts(all_gathers=False)


def _regathering_contexts() -> tuple[Any, Any]:
    return selective_contexts(every=1, all_gathers=False)


#: The inputs of the layer alone.
FULL = SavePolicy("full")

#: Half of the matrix products: the middle between the memory of saving all and the time of saving none (torchtitan's
#: rule).
SELECTIVE = SavePolicy("selective", selective_contexts)

#: The same under ``sequence_parallel_regather``.
SELECTIVE_REGATHER = SavePolicy("selective, all-gathers repeated", _regathering_selective_contexts)

#: All that is expensive but all-gathers: how the compiler is told ``sequence_parallel_regather``. What is cheap it
#: recomputes as it would without a checkpoint. Code that is not compiled would save all these results whether a
#: backward needs them or not; there hooks repeat the all-gathers (:mod:`.tensor_parallel.saved_shards`).
REGATHER = SavePolicy("all-gathers repeated", _regathering_contexts, eager=False)


def layer_policy(mode: str, regather: bool, compiled: bool) -> SavePolicy | None:
    """The policy for the checkpoints of whole layers, None if they have none.

    Args:
        mode: of ``activation_checkpointing``.
        regather: ``sequence_parallel_regather``.
        compiled: the layers are compiled.
    """
    if mode == "full":
        return FULL
    if mode == "selective":
        return SELECTIVE_REGATHER if regather else SELECTIVE
    return REGATHER if regather and compiled else None


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Checkpointed(ForwardWrapper):
    """A forward under a non-reentrant checkpoint; without gradients it is called directly.

    Args:
        policy: what the checkpoint saves.
        offload: save it in the memory of the CPU (pinned on a GPU machine).
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
    """Put a checkpoint around the forward of ``module``, in place; see :class:`Checkpointed`."""
    ForwardStack.of(module).push(ForwardSlot.CHECKPOINT, Checkpointed(policy, offload))


def is_checkpointed(module: nn.Module) -> bool:
    """True if :func:`checkpoint_module` has put a checkpoint around ``module``."""
    return ForwardSlot.CHECKPOINT in ForwardStack.of(module)


def is_checkpoint_wrapped(module: nn.Module) -> bool:
    """True if ``module`` is recomputed in backward: torch's wrapper, or our own around its forward."""
    return compat.checkpoint_wrapped_module(module) is not None or is_checkpointed(module)


def checkpointable_parts(layer: nn.Module, shares_keys: bool = False) -> list[nn.Module]:
    """The attention and MLP blocks of a decoder layer: its direct children that have layers of their own below them.

    Args:
        layer: a decoder layer.
        shares_keys: later layers read keys and values that this layer's attention writes; recomputing it would write
            them a second time, so modules that take part are left out.
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
    """True if the model's config says that some layers reuse the keys and values of earlier ones."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "num_kv_shared_layers", 0) or 0)


def switch_cache_off(model: nn.Module) -> None:
    """Pass ``use_cache=False`` in training forwards: a recomputed layer would fill a cache twice.

    Every model inside that names the argument gets it, because a model around others (vision and language) may not pass
    it on. The config, which would be saved, is not touched; evaluation and generation keep their cache.
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
    """The overloads of the named operators that this torch has."""
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

    Attention is tagged random, but does not draw with ``dropout_p=0``.
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
    """Raise if ``operator`` has written into something saved: the recomputation would start from the changed value.

    torch compares versions, but a product that was reshaped (``_unsafe_view``) shares its memory and not its version,
    so the gradients would be silently wrong.
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
