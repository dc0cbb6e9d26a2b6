"""Parameters whose values are still in their files.

A :class:`DeferredTensor` has the shape, dtype and device of the parameter and no memory. Casts, copies and views of it
are deferred, too. Any other operator reads the values, computes, and frees them, so code that does not know deferred
tensors gets correct results. After an in-place write the tensor holds the result in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.lazy_graph import Given, Node, Operation, read
from ..errors import UnsupportedError

#: Operators whose result depends only on shape and dtype of their input, in addition to ``new_*``.
_SHAPE_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
#: Operators whose result has all elements of their input: an in-place write to it replaces all values.
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default, compat.cast_operator())


class _DeferAll:
    """Context in which every operator on deferred tensors is deferred, while transformers converts a checkpoint.

    A flag of the process. A dispatch mode would be local to a thread, and transformers takes tensors from files in
    threads of its own.
    """

    def __init__(self) -> None:
        self.active = False

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: Any) -> None:
        self.active = False


DEFER_ALL = _DeferAll()


class DeferredTensor(torch.Tensor):
    """A tensor without memory, whose values are computed from files on demand.

    Attributes:
        node: its node in the lazy graph.
    """

    node: Node

    @staticmethod
    def __new__(cls, node: Node, device: torch.device | str = "cpu") -> DeferredTensor:
        tensor = compat.wrapper_subclass(cls, tuple(node.shape), node.dtype, torch.device(device))
        tensor.node = node
        return tensor

    def __init__(self, node: Node, device: torch.device | str = "cpu") -> None:
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
        self.node = deferred.node

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
            # Moving to the meta device would drop the values. A library's init context may ask for it: keep the device.
            keep = device is None or torch.device(device).type == "meta"
            return _defer(func, args, {"dtype": kwargs.get("dtype")}, args[0].device if keep else device)
        if schema.name.removeprefix("aten::") in _SHAPE_ONLY or schema.name.startswith("aten::new_"):
            args, kwargs = compat.tree_map_only(cls, _shape_of, (args, kwargs))
            return func(*args, **kwargs)
        defer_all = DEFER_ALL.active and all("Tensor" in str(result.type) for result in schema.returns)
        is_view = bool(aliases) and not any(alias.is_write for alias in aliases.values())
        if is_view or func is torch.ops.aten.clone.default or defer_all:
            return _defer(func, args, kwargs)
        args, kwargs = compat.tree_map_only(cls, materialize, (args, kwargs))
        return func(*args, **kwargs)


def materialize(tensor: DeferredTensor) -> torch.Tensor:
    """A plain tensor with all values of ``tensor``, on its device, in new memory."""
    return read(tensor.node).to(tensor.device, tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def _given(tensor: torch.Tensor) -> DeferredTensor:
    tensor = tensor.detach()
    return DeferredTensor(Given(tensor.shape, tensor.dtype, tensor), tensor.device)


def _shape_of(tensor: DeferredTensor) -> torch.Tensor:
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _defer(func: Any, args: Any, kwargs: Any, device: Any = None) -> Any:
    """The results of ``func`` as deferred tensors."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None and key != "device"}
    if device is None:
        device = next(t.device for t in compat.tree_leaves((args, kwargs)) if isinstance(t, DeferredTensor))
    # The operator runs on meta tensors to find shapes and dtypes of its results.
    meta_args, meta_kwargs = compat.tree_map_only(
        torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), (args, kwargs)
    )
    result = func(*meta_args, **meta_kwargs)
    inputs = compat.tree_map_only(DeferredTensor, lambda tensor: tensor.node, (args, kwargs))
    deferred = [DeferredTensor(node, device) for node in Operation.results(func, inputs[0], inputs[1], result)]
    return deferred[0] if isinstance(result, torch.Tensor) else type(result)(deferred)


def _write(func: Any, written: list[DeferredTensor], args: Any, kwargs: Any) -> Any:
    """Run an in-place operator on materialized tensors; the ``written`` ones hold these from then on."""
    for tensor in written:
        # A write to a view has to reach its base and the base's other views, which deferred tensors do not track.
        if isinstance(tensor.node, Operation) and tensor.node.operator not in _COPIES:
            raise UnsupportedError(
                f"writing into a part of a parameter whose values are still in the model's files ({func}, part of "
                f"shape {tuple(tensor.shape)}) is not possible. Assign the entire parameter instead, or load the model "
                f"with its own class's from_pretrained."
            )
    real = {id(tensor): materialize(tensor) for tensor in written}
    real_args, real_kwargs = compat.tree_map_only(
        DeferredTensor, lambda tensor: real[id(tensor)] if id(tensor) in real else materialize(tensor), (args, kwargs)
    )
    func(*real_args, **real_kwargs)
    for tensor in written:
        tensor.node = _given(real[id(tensor)]).node
    return written[0] if len(written) == 1 else tuple(written)
