"""Activation checkpointing: none, full, submodule or selective; never reentrant, random state preserved.

A checkpoint is put around a module's ``forward``, so no module is wrapped and no name changes. What it recomputes runs
through the module's region again (:mod:`tensor_parallel.in_flight`), hooks of FSDP2 stay outside.

A reentrant checkpoint runs its first forward without gradients; anything compiled inside it then yields a graph without
a backward, and adapters lose their gradients silently. Hence non-reentrant everywhere.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import compat
from .core.options import CHECKPOINTING_MODES
from .errors import ConfigError, UnsupportedError

Contexts = Callable[[], tuple[Any, Any]]

#: Marks a layer that :func:`apply_selective_activation_checkpointing` has seen.
_MARK = "_selective_checkpoint"


def normalized_mode(value: str | bool | None) -> str:
    """The mode that a checked config value asks for: None and False mean "none", True means "full"."""
    return "full" if value is True else value or "none"


def mode_of_argument(value: str | bool | None) -> str:
    """The mode that an ``activation_checkpointing`` argument of the reference API asks for.

    Args:
        value: a truth value (True means "full"), or a mode, in any case and with or without "-" and "_" ("Sub-Module");
            "off" means "none".

    Raises:
        ConfigError: a word that is no mode.
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


class Checkpointed:
    """A forward under a non-reentrant checkpoint; without gradients it is called directly.

    Args:
        forward: the callable to checkpoint.
        keep: a context function of torch's checkpoint that says which operators' results are kept (see
            :func:`selective_contexts`); None: the inputs alone.
        offload: keep what the checkpoint saves in the memory of the CPU (pinned on a GPU machine).
    """

    def __init__(self, forward: Callable[..., Any], keep: Contexts | None = None, offload: bool = False) -> None:
        functools.update_wrapper(self, forward)  # first: it copies the attributes of a forward that is an object, too
        # Bound methods, here and in `checkpoint_module`: dynamo guards an object that is called by its identity, which
        # would cost a graph per layer (and, past its limit of recompilations, the compilation of deep models), a method
        # by its code.
        self.put_inside(forward)
        self.offload, self.keep = offload, keep
        self.options: dict[str, Any] = {"context_fn": keep} if keep else {}

    def put_inside(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Checkpoint ``forward`` from now on; returns what a module's forward should be."""
        self.forward = forward if inspect.isroutine(forward) else forward.__call__  # type: ignore[operator]
        return self.__call__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext():
            return checkpoint(self.forward, *args, use_reentrant=False, **self.options, **kwargs)


def checkpoint_module(module: nn.Module, keep: Contexts | None = None, offload: bool = False) -> None:
    """Put a checkpoint around ``module.forward``, in place; see :class:`Checkpointed`."""
    module.forward = Checkpointed(module.forward, keep, offload).__call__  # type: ignore[method-assign]


def is_checkpointed(module: nn.Module) -> bool:
    """True if :func:`checkpoint_module` has put a checkpoint around ``module``."""
    return isinstance(getattr(module.forward, "__self__", None), Checkpointed)


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

    To every model inside that names the argument, because a model around others (vision and language) may hand it on
    unnamed. The config, which would be saved, is not touched; evaluation and generation keep their cache.
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
    """True if this call of ``operator`` draws random numbers; attention with ``dropout_p=0`` is tagged random, but does
    not.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            given = kwargs.get("dropout_p", args[position] if position < len(args) else argument.default_value)
            return given != 0.0
    return True


def _refuse_writing(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kept: dict[int, StorageWeakRef]
) -> None:
    """Raise if ``operator`` has written into something kept: the recomputation would start from the changed value.

    torch compares versions, but a product that was reshaped (``_unsafe_view``) shares its memory and not its version,
    so the gradients would be wrong without a word.
    """
    for position, argument in enumerate(operator._schema.arguments):
        written = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write or type(written) is not torch.Tensor:
            continue
        if StorageWeakRef(written.untyped_storage()).cdata in kept:
            raise UnsupportedError(
                f"activation_checkpointing='selective': the model changes the result of a matrix product, of attention "
                f"or of a collective in place ({operator}), so that it cannot be kept for the backward. Use 'full' or "
                "'submodule'."
            )


def selective_contexts(every: int = 2, gathered: bool = True) -> tuple[Any, Any]:
    """Contexts of one selective checkpoint: keep attention, collectives and every second matrix product.

    Args:
        every: keep one of so many matrix products.
        gathered: keep the results of all-gathers, too.

    Keeping half of the matrix products is the middle between the memory of keeping all and the time of keeping none
    (torchtitan's rule). Counted separately in forward and recomputation, which see the same sequence.

    Whatever draws random numbers is recomputed, also attention with dropout: the recomputation starts from the random
    state of the forward, and one operator that is not repeated would shift the stream under all that follow.
    """
    counts = {False: 0, True: 0}
    gathering = {False: False, True: False}  # the last collective was an all-gather that is not kept
    kept: dict[int, StorageWeakRef] = {}

    def keep(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_recompute: bool) -> bool:
        if operator in _ALWAYS_SAVED:
            if not gathered and operator in _COLLECTIVES:
                if operator not in _WAITS:
                    gathering[is_recompute] = operator in _ALL_GATHERS
                return not gathering[is_recompute]
            return not _draws(operator, args, kwargs)
        if operator in _MATMULS:
            counts[is_recompute] += 1
            return counts[is_recompute] % every == 1 % every
        return False

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if not context.is_recompute and operator._schema.is_mutable:
            _refuse_writing(operator, args, kwargs, kept)
        if not keep(operator, args, kwargs, context.is_recompute):
            return CheckpointPolicy.PREFER_RECOMPUTE
        output = getattr(context, "op_output", None)  # torch 2.11 does not tell, and nothing is noticed there
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if type(tensor) is torch.Tensor:  # not while the compiler traces: its graph has no writes in place
                reference = StorageWeakRef(tensor.untyped_storage())
                kept[reference.cdata] = reference
        return CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


def selective_gathering_contexts() -> tuple[Any, Any]:
    """:func:`selective_contexts` that gather again in backward (``sequence_parallel_regather``)."""
    return selective_contexts(gathered=False)


def gathering_contexts() -> tuple[Any, Any]:
    """Contexts that keep whatever is expensive to recompute but all-gathers: ``sequence_parallel_regather`` for the
    compiler.

    What is cheap to recompute the compiler decides by itself, as it does without a checkpoint. Not for code that is not
    compiled, which would keep the results of all these operators whether a backward needs them or not.
    """
    return selective_contexts(every=1, gathered=False)


def what_is_kept(mode: str, regather: bool, compiled: bool) -> Contexts | None:
    """The context function for the checkpoints of layers.

    Args:
        mode: of ``activation_checkpointing``.
        regather: ``sequence_parallel_regather``.
        compiled: the layers are compiled; otherwise hooks gather again (:mod:`tensor_parallel.gathered_again`).
    """
    if mode == "selective":
        return selective_gathering_contexts if regather else selective_contexts
    return gathering_contexts if regather and compiled else None
