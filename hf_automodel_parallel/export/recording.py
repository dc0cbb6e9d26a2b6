"""Run code that rearranges a state dict without the values, and compute single results of it afterwards.

transformers turns the fused experts of a model back into one weight per expert when it saves, PEFT picks and renames
what belongs to an adapter: both expect a whole state dict in memory. Here they get tensors on the meta device, and what
they do is written down. A result is then computed alone, from the few tensors that it depends on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..compat import TorchDispatchMode, tree_leaves, tree_map_only
from ..errors import UnsupportedError


class Recording(TorchDispatchMode):
    """Writes down every operator on meta tensors while it is entered.

    Inputs are declared with :meth:`leaf`. Results are ordinary meta tensors; :meth:`compute` gives their values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._leaves: dict[int, str] = {}
        self._made_by: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any], int | None]] = {}
        self._alive: list[torch.Tensor] = []  # an id is taken again when its tensor is gone
        self._values: dict[int, torch.Tensor] = {}
        self._uses: Counter[int] = Counter()

    def leaf(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A stand-in on the meta device for the tensor ``name``."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._leaves[id(tensor)] = name
        self._alive.append(tensor)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(self._known(x) for x in inputs):
            return result
        if func._schema.is_mutable:
            raise UnsupportedError(
                f"saving: {func} writes in place to a weight that is being converted, which cannot be done tensor by "
                f"tensor. Gather the weights: save_pretrained(directory, state_dict=accelerator.get_state_dict(model))."
            )
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        for index, output in enumerate(outputs):
            if not any(output is x for x in inputs):
                self._made_by[id(output)] = (func, args, kwargs, None if isinstance(result, torch.Tensor) else index)
                self._alive.append(output)
        self._alive += inputs
        return result

    def _known(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._leaves or id(tensor) in self._made_by

    def leaves_of(self, tensor: torch.Tensor) -> list[str]:
        """Names of the inputs that ``tensor`` is computed from, in the order of their first use."""
        found: dict[str, None] = {}
        self._walk(tensor, lambda x: found.setdefault(self._leaves[id(x)]) if id(x) in self._leaves else None)
        return list(found)

    def _walk(self, tensor: torch.Tensor, visit: Callable[[torch.Tensor], Any]) -> None:
        if not self._known(tensor):
            return
        visit(tensor)
        if id(tensor) in self._made_by:
            _, args, kwargs, _ = self._made_by[id(tensor)]
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor):
                    self._walk(x, visit)

    def expect(self, results: Iterable[torch.Tensor]) -> None:
        """Announce what will be computed, so that what several results need is kept until the last of them has it."""
        self._values.clear()
        self._uses.clear()
        for result in results:
            self._walk(result, lambda x: self._uses.update((id(x),)))

    def compute(self, result: torch.Tensor, fetch: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The value of ``result``, which was announced.

        Args:
            result: a meta tensor, a leaf or made from leaves.
            fetch: gives the whole value of a leaf by name; asked once for each as long as announced results need it.
        """
        value = self._value(result, fetch)
        self._walk(result, self._release)
        return value

    def _value(self, tensor: torch.Tensor, fetch: Callable[[str], torch.Tensor]) -> torch.Tensor:
        key = id(tensor)
        if key not in self._values:
            if key in self._leaves:
                self._values[key] = fetch(self._leaves[key])
            elif key in self._made_by:
                func, args, kwargs, index = self._made_by[key]
                args, kwargs = tree_map_only(torch.Tensor, lambda x: self._value(x, fetch), (args, kwargs))
                made = func(*args, **kwargs)
                self._values[key] = made if index is None else made[index]
            else:
                raise UnsupportedError(
                    "saving: a weight is computed from a tensor that is no part of the state dict. Gather the weights: "
                    "save_pretrained(directory, state_dict=accelerator.get_state_dict(model))."
                )
        return self._values[key]

    def assemble(
        self, leaf: torch.Tensor, values: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The other way round: the value of a leaf from the values of all that is made of it.

        What rearranges numbers is a view of them, apart from copies; so each value is copied into its view of the leaf.

        Args:
            leaf: the leaf.
            values: by key, what ``results`` are.
            results: by the same keys, meta tensors made of this leaf alone, which together hold all of it.

        Raises:
            UnsupportedError: they do not hold all of it once, or are more than rearranged.
        """
        first = next(iter(values.values()))
        whole = torch.empty(leaf.shape, dtype=first.dtype)
        for key, value in values.items():
            view = self._view(results[key], whole)
            if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                name = self._leaves[id(leaf)]
                raise UnsupportedError(f"{name} is computed, not rearranged, in the files of this architecture.")
            view.copy_(value)
        if sum(value.numel() for value in values.values()) != whole.numel():
            raise UnsupportedError(f"the files of this architecture do not hold all of {self._leaves[id(leaf)]}.")
        return whole

    def _view(self, tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        if id(tensor) in self._leaves:
            return whole
        func, args, kwargs, index = self._made_by[id(tensor)]
        if func in (torch.ops.aten.clone.default, compat.cast_operator()):
            return self._view(args[0], whole)
        args, kwargs = tree_map_only(torch.Tensor, lambda x: self._view(x, whole), (args, kwargs))
        made = func(*args, **kwargs)
        return made if index is None else made[index]

    def _release(self, tensor: torch.Tensor) -> None:
        self._uses[id(tensor)] -= 1
        if self._uses[id(tensor)] <= 0:
            self._values.pop(id(tensor), None)


def storage_identity(tensor: torch.Tensor) -> int:
    """Equal for meta tensors that are views of one storage."""
    return StorageWeakRef(tensor.untyped_storage()).cdata
