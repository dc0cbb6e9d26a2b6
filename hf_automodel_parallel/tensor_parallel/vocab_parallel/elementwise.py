"""Handlers of :class:`ShardedLogits` for gradients, element-wise functions and views of the leading dimensions.

A handler is called with the function and its arguments and returns its result, or ``NotImplemented`` where these
arguments need the full logits. Functions without a handler always get the full logits (:func:`.logits.on_full`).
Functions over the vocabulary are in :mod:`.reductions`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..collectives import copy_to_tp, split_to_tp
from .logits import HANDLERS, METADATA, ShardedLogits, _functions, handles, with_full

# ---- metadata ------------------------------------------------------------------------------------------------------


def _getter(name: str) -> Any:
    """The function that ``__torch_function__`` gets when the attribute ``name`` is read."""
    return getattr(torch.Tensor, name).__get__


#: Attributes with values, and those of gradients, which belong to the slice; all others are metadata.
_WITH_NUMBERS = {
    "data",
    "grad",
    "T",
    "H",
    "mT",
    "mH",
    "real",
    "imag",
    "retains_grad",
    "__cuda_array_interface__",
    "_grad",
}
_METHODS = (
    "size dim numel nelement ndimension element_size is_floating_point is_complex is_signed is_conj is_neg "
    "is_inference get_device stride storage_offset is_same_size __len__ is_tensor is_shared is_pinned has_names"
).split()
METADATA.update(
    _getter(name)
    for name in dir(torch.Tensor)
    if name not in _WITH_NUMBERS and inspect.isdatadescriptor(getattr(torch.Tensor, name))
)
METADATA.update(_functions(_METHODS))


@handles("is_contiguous")
def _is_contiguous(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(args[0].stored(), *args[1:], **kwargs)


# ---- gradients -----------------------------------------------------------------------------------------------------


@handles("register_hook")
def _register_hook(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook gets the complete gradient of the logits, sharded like them."""
    logits, hook = args
    if not logits.requires_grad:
        return NotImplemented  # torch raises
    # The hook must not hold the logits: their graph holds the hook, and would never be freed.
    v, dtype = logits.vocabulary, logits.dtype

    def on_slice(gradient: torch.Tensor) -> torch.Tensor | None:
        changed = hook(ShardedLogits(gradient, v, dtype))
        if changed is None:
            return None
        if isinstance(changed, ShardedLogits):
            return changed.own().to(gradient.dtype)
        return split_to_tp(changed.to(gradient.dtype), v.group, v.rank, v.size)

    return logits.stored().register_hook(on_slice)


def _retain_grad(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args[0].stored().retain_grad()


def _grad(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0]
    part = logits.stored()
    gradient = part.grad if part.is_leaf or part.retains_grad else None
    return None if gradient is None else ShardedLogits(gradient, logits.vocabulary, logits.dtype)


def _retains_grad(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return args[0].stored().retains_grad


def _data(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].detach()


def _requires_grad_(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits, flag = args[0], (*args[1:], *kwargs.values(), True)[0]
    if flag == logits.requires_grad:
        return logits
    logits.writable().requires_grad_(flag)
    if flag:
        logits.written()
        return logits
    return NotImplemented


def _gradient_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.autograd.grad``: a gradient with respect to sharded logits is sharded like them."""
    outputs, inputs, *rest = args if len(args) > 1 else (*args, kwargs.pop("inputs", None))
    if inputs is None or any(
        isinstance(x, ShardedLogits) for x in (outputs if isinstance(outputs, (tuple, list)) else [outputs])
    ):
        return function(with_full(outputs), inputs, *with_full(rest), **with_full(kwargs))
    wanted = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    parts = [x.stored() if isinstance(x, ShardedLogits) else x for x in wanted]
    results = function(outputs, parts, *rest, **kwargs)
    return tuple(
        ShardedLogits(g, x.vocabulary, x.dtype) if isinstance(x, ShardedLogits) and g is not None else g
        for x, g in zip(wanted, results, strict=True)
    )


HANDLERS[torch.Tensor.retain_grad] = _retain_grad
HANDLERS[_getter("grad")] = _grad
HANDLERS[_getter("retains_grad")] = _retains_grad
HANDLERS[_getter("data")] = _data
HANDLERS[torch.Tensor.requires_grad_] = _requires_grad_
HANDLERS[torch.autograd.grad] = _gradient_of


# ---- element-wise --------------------------------------------------------------------------------------------------


def _own_operand(value: Any, logits: ShardedLogits) -> Any:
    """The operand to combine with the slice in the place of ``value``; NotImplemented if it needs the full logits.

    The gradient of a replicated operand that is combined with every rank's slice is Partial, so it is copied to TP.
    """
    if isinstance(value, ShardedLogits):
        return value.own() if value.vocabulary.group is logits.vocabulary.group else NotImplemented
    if not isinstance(value, torch.Tensor):
        return NotImplemented if isinstance(value, (list, tuple, dict)) else value
    if value.ndim == 0 or value.shape[-1] == 1:
        return copy_to_tp(value, logits.vocabulary.group)
    if value.shape[-1] == logits.shape[-1]:
        v = logits.vocabulary
        return split_to_tp(value, v.group, v.rank, v.size)
    return NotImplemented


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ShardedLogits, list[Any], dict[str, Any]] | None:
    logits = next((value for value in (*args, *kwargs.values()) if isinstance(value, ShardedLogits)), None)
    if logits is None or "out" in kwargs:
        return None
    own = [_own_operand(value, logits) for value in args]
    named = {key: _own_operand(value, logits) for key, value in kwargs.items()}
    if any(value is NotImplemented for value in (*own, *named.values())):
        return None
    return logits, own, named


@handles(
    *"mul multiply div divide true_divide floor_divide remainder fmod".split(),
    *"add sub subtract rsub neg negative abs absolute".split(),
    *"tanh sigmoid exp exp2 expm1 log log1p log2 log10 sqrt".split(),
    *"rsqrt square pow reciprocal sin cos erf relu clamp clip".split(),
    *"clamp_min clamp_max maximum minimum nan_to_num masked_fill where".split(),
    *"sign round floor ceil trunc clone lerp addcmul".split(),
    *"isnan isinf isfinite eq ne lt le gt".split(),
    *"ge logical_and logical_or logical_not logical_xor softplus logsigmoid silu".split(),
    *"gelu hardtanh leaky_relu".split(),
    *"__rsub__ __rdiv__ __rtruediv__ __rpow__ __rmul__ __radd__ __eq__ __ne__ __pow__ __pos__ positive".split(),
    *"bool int long".split(),
)
def _elementwise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _operands(args, kwargs)
    if found is None:
        return NotImplemented
    logits, own, named = found
    result = function(*own, **named)
    fits = isinstance(result, torch.Tensor) and result.shape[-1:] == logits.stored().shape[-1:]
    return logits.like(result) if fits else NotImplemented


@handles("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def _like(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A plain tensor of the full shape; the logits give shape, dtype and device only."""
    logits = args[0]
    return function(torch.empty(1, dtype=logits.dtype, device=logits.device).expand(logits.shape), *args[1:], **kwargs)


@handles("new_tensor", "new_zeros", "new_ones", "new_empty", "new_full")
def _new(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0]
    if not isinstance(logits, ShardedLogits):
        return NotImplemented
    return function(torch.empty(0, dtype=logits.dtype, device=logits.device), *args[1:], **kwargs)


@handles(
    *"mul_ multiply_ div_ divide_ true_divide_ add_ sub_ subtract_".split(),
    *"neg_ abs_ tanh_ sigmoid_ exp_ log_ sqrt_ pow_ clamp_".split(),
    *"clip_ clamp_min_ clamp_max_ nan_to_num_ masked_fill_ fill_ zero_ copy_".split(),
)
def _elementwise_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], ShardedLogits):
        return NotImplemented
    found = _operands(args, kwargs)
    if found is None:
        return NotImplemented
    logits, own, named = found
    function(logits.writable(), *own[1:], **named)
    logits.written()
    return logits


@handles("to", "float", "double", "half", "bfloat16", "type_as", "type")
def _to(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0]
    if not isinstance(logits, ShardedLogits):
        return NotImplemented
    probe = function(
        torch.empty(0, dtype=logits.dtype, device=logits.device), *with_metadata(args[1:]), **with_metadata(kwargs)
    )
    if not isinstance(probe, torch.Tensor):
        return probe  # type() without arguments: a string
    if probe.device != logits.device:
        return NotImplemented  # the group's collectives may not work there
    part = logits.stored()
    copies = kwargs.get("copy", False) or any(value is True for value in args[2:])
    if probe.dtype == logits.dtype and not copies:
        return logits
    if copies:
        part = part.clone()
    if probe.dtype.is_floating_point and torch.promote_types(probe.dtype, part.dtype) == probe.dtype:
        return logits.like(part, probe.dtype)
    return logits.like(logits.own().to(probe.dtype))


def with_metadata(value: Any) -> Any:
    """Arguments of ``to`` and ``type_as``, which read only dtype and device of a tensor: tensors without elements."""
    if isinstance(value, torch.Tensor):
        return torch.empty(0, dtype=value.dtype, device=value.device)
    if isinstance(value, tuple):
        return tuple(with_metadata(item) for item in value)
    return {key: with_metadata(item) for key, item in value.items()} if isinstance(value, dict) else value


@handles("detach", "contiguous")
def _same_values(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0]
    part = logits.stored()
    result = function(part, *args[1:], **kwargs)
    return logits if result is part else logits.like(result, logits.dtype, alias=True)


# ---- leading dimensions --------------------------------------------------------------------------------------------


def _views(logits: ShardedLogits, result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(logits.like(part, logits.dtype, alias=True) for part in result)
    return logits.like(result, logits.dtype, alias=True)


def _consumed(index: Any) -> int | None:
    """The number of dimensions that one item of an index uses up; None for items that are not supported."""
    if index is None:
        return 0
    if isinstance(index, bool):
        return None
    if isinstance(index, (int, slice)):
        return 1
    if isinstance(index, torch.Tensor) and not isinstance(index, ShardedLogits):
        return index.ndim if index.dtype in (torch.bool, torch.uint8) else 1
    return None


@handles("__getitem__")
def _getitem(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits, index = args
    if not isinstance(logits, ShardedLogits):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if sum(part is Ellipsis for part in parts) > 1:
        return NotImplemented
    used = [0 if part is Ellipsis else _consumed(part) for part in parts]
    if None in used:
        return NotImplemented
    missing = [slice(None)] * (logits.ndim - sum(used))  # type: ignore[arg-type]
    where = next((i for i, part in enumerate(parts) if part is Ellipsis), None)
    full = [*parts, *missing] if where is None else [*parts[:where], *missing, *parts[where + 1 :]]
    last = full[-1]
    if not isinstance(last, slice) or (last.start, last.stop, last.step) != (None, None, None):
        return NotImplemented
    return _views(logits, function(logits.stored(), index))


@handles("view", "reshape")
def _view(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits, *shape = args
    if kwargs or not isinstance(logits, ShardedLogits) or not shape:
        return NotImplemented
    if isinstance(shape[0], (tuple, list)):
        shape = list(shape[0])
    if not shape or not all(isinstance(n, int) for n in shape):
        return NotImplemented
    classes, others = logits.shape[-1], 1
    for n in shape[:-1]:
        others *= n
    if shape[-1] != classes and not (shape[-1] == -1 and others > 0 and others * classes == logits.numel()):
        return NotImplemented
    part = logits.stored()
    return _views(logits, function(part, (*shape[:-1], part.shape[-1])))


@handles("view_as", "reshape_as")
def _view_as(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Autograd calls this, too, if a custom function returns its input unchanged (the backward hooks of modules)."""
    logits = args[0]
    other = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(logits, ShardedLogits) or other is None:
        return NotImplemented
    return _view(
        torch.Tensor.view if function is torch.Tensor.view_as else torch.Tensor.reshape, (logits, *other.shape), {}
    )


def dim_of(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, default: int | None = None) -> Any:
    """The argument ``dim``, given at ``position`` or by name."""
    return args[position] if len(args) > position else kwargs.get("dim", default)


def _on_other_dims(position: int, default: int | None, names: str, added: int = 0) -> None:
    """Handle functions of one dimension (their argument at ``position``) that leave the other dimensions alone."""

    def handler(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logits = args[0] if args else None
        if not isinstance(logits, ShardedLogits) or "out" in kwargs:
            return NotImplemented
        dim, ndim = dim_of(args, kwargs, position, default), logits.ndim + added
        if not isinstance(dim, int) or not -ndim <= dim < ndim or dim % ndim == ndim - 1:
            return NotImplemented
        if any(isinstance(value, ShardedLogits) for value in (*args[1:], *kwargs.values())):
            return NotImplemented
        return _views(logits, function(logits.stored(), *args[1:], **kwargs))

    handles(*names.split())(handler)


_on_other_dims(1, None, "squeeze select narrow index_select")
_on_other_dims(1, 0, "unbind")
_on_other_dims(2, 0, "split chunk tensor_split")
_on_other_dims(1, None, "unsqueeze", added=1)


@handles("__iter__")
def _iterate(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return iter(args[0].unbind(0)) if args[0].ndim > 1 else NotImplemented


@handles("flatten")
def _flatten(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits = args[0]
    end = args[2] if len(args) > 2 else kwargs.get("end_dim", -1)
    if end % logits.ndim == logits.ndim - 1:
        return NotImplemented
    return _views(logits, function(logits.stored(), *args[1:], **kwargs))


@handles("transpose", "swapaxes")
def _transpose(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    logits, *dims = args
    if kwargs or len(dims) != 2 or any(dim % logits.ndim == logits.ndim - 1 for dim in dims):
        return NotImplemented
    return _views(logits, function(logits.stored(), *dims))


@handles("cat", "concat", "concatenate", "stack")
def _join(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0] if args else kwargs.get("tensors")
    if not tensors or not all(isinstance(t, ShardedLogits) for t in tensors) or "out" in kwargs:
        return NotImplemented
    first = tensors[0]
    ndim = first.ndim + (function is torch.stack)
    dim = dim_of(args, kwargs, 1, 0)
    if dim % ndim == ndim - 1 or any(t.vocabulary.group is not first.vocabulary.group for t in tensors):
        return NotImplemented
    dtype = first.dtype
    parts = [t.stored() for t in tensors]
    if any(t.dtype != dtype for t in tensors) or len({part.dtype for part in parts}) > 1:
        parts = [t.own() for t in tensors]
    return first.like(function(parts, dim=dim), None if parts[0].dtype == first.dtype else dtype)
