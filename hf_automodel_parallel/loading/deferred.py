"""Parameters whose values are still in their files.

A :class:`DeferredTensor` has shape, dtype and device of the parameter it is going to be, and no memory. Whatever only
asks for those works on it. Casts, moves, copies and views give another one. Everything else reads the values, computes,
and forgets them again, so that the result is right, whoever asks. Written to, it remembers the tensor that comes out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import compat
from ..errors import UnsupportedError
from .values import Computed, Given, Value

#: Results that say something about shape and dtype alone.
_EMPTY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")


class Recorder:
    """While ``active``, every operator on deferred tensors is put off: transformers' conversions of a checkpoint."""

    def __init__(self) -> None:
        self.active = False

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: Any) -> None:
        self.active = False


#: For all threads, because transformers takes tensors from files in threads of its own.
RECORDER = Recorder()


class DeferredTensor(torch.Tensor):
    """A tensor without memory that knows where its values come from.

    Attributes:
        value: where.
    """

    value: Value

    @staticmethod
    def __new__(cls, value: Value, device: torch.device | str = "cpu") -> DeferredTensor:
        tensor = compat.wrapper_subclass(cls, tuple(value.shape), value.dtype, torch.device(device))
        tensor.value = value
        return tensor

    def __init__(self, value: Value, device: torch.device | str = "cpu") -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredTensor({tuple(self.shape)}, dtype={self.dtype}, requires_grad={self.requires_grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeferredTensor:
        copy = self.detach()
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy, self.requires_grad)  # type: ignore[assignment]
        memo[id(self)] = copy
        return copy  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "this parameter's values are still in the model's files: pickling and torch.save come after "
            "Accelerator.prepare (accelerator.get_state_dict), or load the model with its own class's from_pretrained."
        )

    @property
    def data(self) -> DeferredTensor:  # type: ignore[override]
        """The same values, detached."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        deferred = new if isinstance(new, DeferredTensor) else _given(new)
        with compat.without_torch_function():
            torch.Tensor.data.__set__(self, deferred)  # type: ignore[attr-defined]
        self.value = deferred.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with compat.without_torch_function():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        by_name = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        aliases = {argument.name: argument.alias_info for argument in schema.arguments if argument.alias_info}
        written = [t for name, alias in aliases.items() if alias.is_write and isinstance(t := by_name.get(name), cls)]
        if written:
            return _write(func, written, args, kwargs)
        if func is compat.cast_operator():
            device = kwargs.get("device")
            keep = device is None or torch.device(device).type == "meta"  # values are not given up
            return _later(func, args, {"dtype": kwargs.get("dtype")}, args[0].device if keep else device)
        if schema.name.removeprefix("aten::") in _EMPTY or schema.name.startswith("aten::new_"):
            args, kwargs = compat.tree_map_only(cls, _shape_of, (args, kwargs))
            return func(*args, **kwargs)
        puts_off = RECORDER.active and all("Tensor" in str(result.type) for result in schema.returns)
        is_view = bool(aliases) and not any(alias.is_write for alias in aliases.values())
        if is_view or func is torch.ops.aten.clone.default or puts_off:
            return _later(func, args, kwargs)
        args, kwargs = compat.tree_map_only(cls, whole, (args, kwargs))
        return func(*args, **kwargs)


def whole(tensor: DeferredTensor) -> torch.Tensor:
    """All values of ``tensor``, on its device, in memory of their own."""
    return tensor.value.read().to(tensor.device, tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def _given(tensor: torch.Tensor) -> DeferredTensor:
    tensor = tensor.detach()
    return DeferredTensor(Given(tensor.shape, tensor.dtype, tensor), tensor.device)


def _shape_of(tensor: DeferredTensor) -> torch.Tensor:
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _later(func: Any, args: Any, kwargs: Any, device: Any = None) -> Any:
    """The results of ``func`` as deferred tensors."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None and key != "device"}
    meta = compat.tree_map_only(
        torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), (args, kwargs)
    )
    results = func(*meta[0], **meta[1])
    if device is None:
        device = next(t.device for t in compat.tree_leaves((args, kwargs)) if isinstance(t, DeferredTensor))
    inputs = compat.tree_map_only(DeferredTensor, lambda tensor: tensor.value, (args, kwargs))

    def deferred(result: torch.Tensor, index: int | None) -> DeferredTensor:
        return DeferredTensor(Computed(result.shape, result.dtype, func, inputs[0], inputs[1], index), device)

    if isinstance(results, torch.Tensor):
        return deferred(results, None)
    return type(results)(deferred(result, index) for index, result in enumerate(results))


def _write(func: Any, written: list[DeferredTensor], args: Any, kwargs: Any) -> Any:
    """Write into tensors that are not there: compute what comes out and keep it in memory."""
    for tensor in written:
        if isinstance(tensor.value, Computed) and tensor.value.operator not in _COPIES:
            raise UnsupportedError(
                f"writing into a part of a parameter whose values are still in the model's files ({func}, part of "
                f"shape {tuple(tensor.shape)}) is not possible. Assign the whole parameter instead, or load the model "
                f"with its own class's from_pretrained."
            )
    real = {id(tensor): whole(tensor) for tensor in written}
    real_args, real_kwargs = compat.tree_map_only(
        DeferredTensor, lambda tensor: real[id(tensor)] if id(tensor) in real else whole(tensor), (args, kwargs)
    )
    func(*real_args, **real_kwargs)
    for tensor in written:
        tensor.value = _given(real[id(tensor)]).value
    return written[0] if len(written) == 1 else tuple(written)


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default, compat.cast_operator())
