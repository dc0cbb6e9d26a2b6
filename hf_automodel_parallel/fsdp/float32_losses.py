"""Mixed precision: losses are computed in float32, from the logits on, as autocast does in one process.

FSDP2 casts a model's inputs, and its output. In between every module computes in the policy's ``param_dtype``, and a
class whose loss does not upcast its logits (classification, question answering, T5) would compute the loss in
bfloat16, with 8 bits. So heads return float32. And float labels, the targets of a regression,
keep their dtype: :func:`keep_dtype_of_arguments`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ..core.model_structure import ModelStructure
from ..core.model_view import ModelView
from .options import ShardingOptions

logger = logging.getLogger(__name__)


def float32_losses(model: nn.Module, structure: ModelStructure, options: ShardingOptions, device: torch.device) -> None:
    """Let the loss inside of ``model`` be computed in float32, if the policy returns outputs in float32.

    Args:
        model: sharded with ``options.mp_policy``; the output hooks of tensor parallelism are registered.
        structure: its layers and embedding.
        options: see :class:`.options.ShardingOptions`. Nothing happens unless ``mp_policy.output_dtype`` is wider than
            ``param_dtype``.
        device: where this rank computes.
    """
    from transformers.utils import find_labels

    low, wide = options.mp_policy.param_dtype, options.mp_policy.output_dtype
    if low is None or wide is None or wide.itemsize <= low.itemsize:
        return
    own = {id(p) for name, p in model.named_parameters() if name in options.own_dtype}
    own |= {id(p) for p in options.ignored_parameters}  # FSDP2 does not cast what it does not manage
    for head in heads(ModelView.of(model).inner, structure):
        if not any(id(p) in own for p in head.parameters()):
            # A head may follow another one, whose output is now wide.
            head.register_forward_pre_hook(_CastInputs(low), with_kwargs=True)
        head.register_forward_hook(_CastOutput(low, wide))
    keep_dtype_of_arguments(model, find_labels(type(ModelView.of(model).inner)), device)
    ForwardStack.of(model).push(ForwardSlot.DTYPE, _LossCheck(low))


def heads(inner: nn.Module, structure: ModelStructure) -> list[nn.Module]:
    """The modules of ``inner`` that run behind its layers, outermost ones only, and have parameters.

    In a model of transformers with a base model these are all other children of it. Elsewhere they are the children
    that are registered behind the last child with layers, or else the heads of this child.
    """
    layers, embedding = set(structure.layers), structure.embedding

    def holds(module: nn.Module) -> bool:
        return any(part in layers or part is embedding for part in module.modules())

    children = [child for child in inner.children() if child is not structure.embedding]
    base = _base_model(inner)
    last = max((index for index, child in enumerate(children) if holds(child)), default=None)
    if base is not None and base is not inner and holds(base):
        return _callable(child for child in children if not holds(child))
    if last is None:
        return []
    behind, nested = _callable(children[last + 1 :]), children[last]
    return behind or (heads(nested, structure) if _base_model(nested) is not None else [])


def _base_model(module: nn.Module) -> nn.Module | None:
    """The base model of a model of transformers, maybe itself; None for any other module."""
    from transformers import PreTrainedModel

    return module.base_model if isinstance(module, PreTrainedModel) else None


def _callable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of ``modules`` with parameters; of a container without a forward its items."""
    found = []
    for module in modules:
        if not compat.has_implemented_forward(module):
            found += _callable(module.children())
        elif any(True for _ in module.parameters()):
            found.append(module)
    return found


class _CastInputs:
    """Forward pre-hook: cast floating inputs of another dtype to ``dtype``, as FSDP2 does for units."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return compat.tree_map_only(torch.Tensor, self._cast, (args, kwargs))

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class _CastOutput:
    """Forward hook: cast tensors of dtype ``low`` in the output to ``wide``. Sharded logits defer that to their use."""

    def __init__(self, low: torch.dtype, wide: torch.dtype) -> None:
        self.low, self.wide = low, wide

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return compat.tree_map_only(torch.Tensor, self._cast, output)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.wide) if tensor.dtype is self.low else tensor


class _LossCheck(ForwardWrapper):
    """Warns once if the model returns a loss of dtype ``low``: code outside of its heads has computed it so."""

    as_method = False

    def __init__(self, low: torch.dtype) -> None:
        self.low, self.told = low, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.dtype is self.low and not self.told:
            self.told = True
            logger.warning(
                "The model computes its loss in %s, outside of the modules behind its layers, which return float32. "
                "Under autocast one process computes it in float32: upcast what the loss is computed from "
                "(logits.float()).",
                self.low,
            )
        return output


# ---- arguments that keep their dtype ---------------------------------------------------------------------------------


def keep_dtype_of_arguments(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Pass the arguments ``names`` to ``model`` in the caller's dtype; FSDP2 casts all others to ``param_dtype``.

    Args:
        model: the root unit of FSDP2, plain or PEFT-wrapped.
        names: of arguments of the forward of the model inside of it.
        device: they are moved there, which FSDP2 does for all others.
    """
    wanted = frozenset(names)
    own = list(inspect.signature(type(model).forward).parameters)[1:]
    inner = list(inspect.signature(type(ModelView.of(model).inner).forward).parameters)[1:]
    order = own if wanted & set(own) else inner

    def wrap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(
            _Untouched(value) if index < len(order) and order[index] in wanted and _has_floats(value) else value
            for index, value in enumerate(args)
        )
        named = {k: _Untouched(value) if k in wanted and _has_floats(value) else value for k, value in kwargs.items()}
        return args, named

    # In front of FSDP2's pre-forward hook, which casts.
    model.register_forward_pre_hook(wrap, prepend=True, with_kwargs=True)
    ForwardStack.of(model).push(ForwardSlot.DTYPE, _UntouchedForward(device))


def _has_floats(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in compat.tree_leaves(value))


class _Untouched:
    """Hides a value from FSDP2's cast, which walks through containers but not through other objects."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _UntouchedForward(ForwardWrapper):
    """A forward whose :class:`_Untouched` arguments are unwrapped and moved to ``device``."""

    as_method = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _shown(self, value: Any) -> Any:
        if not isinstance(value, _Untouched):
            return value
        return compat.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), value.value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*map(self._shown, args), **{key: self._shown(value) for key, value in kwargs.items()})
