"""One layer as a step ran it: its modules in their order, and the collectives and the attention between them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..core.model_view import ModelView, class_of, layer_pattern
from ..core.sharding_spec import REPLICATED, ParameterSpec, ShardingSpec
from .counting import Collectives, Memory, tensors_in


class LayerTrace(Collectives):
    """Counts collectives, and writes down one layer: neither of the first nor the last ones, which are different.

    Args:
        mesh: the root mesh.
        memory: tells the phase of the step.
        model: the prepared model.
        layers: its layers, in their order.
        spec: placements of parameters on the tp axis; None without tensor parallelism.
        tp: number of ranks of the tp axis.

    Attributes:
        found: ``name`` (a pattern), ``class``, ``inside`` and ``backward`` ("kind axis" -> [calls, bytes of full
            tensors, bytes sent]). ``inside`` is a list in the order of the forward, of
            ``{"kind": "module", "name", "class", "weights", "input", "output", "from", "inside"}`` (shapes of a rank;
            modules with the same number "from" read the same tensor), of
            ``{"kind": "collective", "op", "axis", "tensor_bytes", "sent_bytes"}``, of
            ``{"kind": "attention", "query", "key"}`` and of ``{"kind": "add"}``, a sum beside modules (a residual).
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        memory: Memory,
        model: nn.Module,
        layers: list[nn.Module],
        spec: ShardingSpec | None,
        tp: int,
    ) -> None:
        super().__init__(mesh)
        index = max(len(layers) - 2, 0)
        self._layer, self._memory, self._tp = layers[index], memory, tp
        self._specs = {} if spec is None else spec.parameters
        self._backward = f"backward of layer {index}"
        view = ModelView.of(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._plan_names = {module: view.plan_name(name) for module, name in self._names.items()}
        self._weights = {module: self._weights_of(module) for module in self._layer.modules()}
        self._open: list[dict[str, Any]] = []
        self._handles: list[Any] = []
        self._read: list[weakref.ref[Any]] = []
        name = self._plan_names[self._layer]
        self.found: dict[str, Any] = {"name": layer_pattern(name), "class": class_of(self._layer).__name__}
        self.found |= {"inside": [], "backward": {}}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layer's modules, for a step; those of FSDP2 run inside of them."""
        for module in self._layer.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield
        finally:
            self._unhook()

    def _unhook(self, but: int = 0) -> None:
        for handle in self._handles[but:]:
            handle.remove()

    def seen(self, function: Any, args: Any, call: tuple[str, str, int, int] | None) -> None:
        """An operator, and if it is a collective, kind, axis, bytes of the full tensor and bytes sent."""
        if self._memory.phase == self._backward and call is not None:
            totals = self.found["backward"].setdefault(f"{call[0]} {call[1]}", [0, 0, 0])
            for place, number in enumerate((1, *call[2:])):
                totals[place] += number
        if not self._open:
            return
        inside = self._open[-1]["inside"]
        name = function.name()
        if call is not None:
            inside.append(dict(zip(("kind", "op", "axis", "tensor_bytes", "sent_bytes"), ("collective", *call))))
        elif "scaled_dot_product" in name:
            query, key = tensors_in(args)[:2]
            inside.append({"kind": "attention", "query": list(query.shape), "key": list(key.shape)})
        elif len(self._open) == 1 and name.partition(".")[0] in ("aten::add", "aten::add_"):
            shapes = [tensor.shape for tensor in tensors_in(args)]
            if len(shapes) == 2 and shapes[0] == shapes[1]:
                inside.append({"kind": "add"})

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._memory.phase != "forward":
            return
        if module is self._layer:
            self._open = [self.found]
            self.found["inside"] = []
            self.found["input"] = _shape([*args, *kwargs.values()])
            return
        if not self._open:
            return
        name = self._plan_names[module].removeprefix(f"{self._plan_names[self._layer]}.")
        node: dict[str, Any] = {"kind": "module", "name": name, "class": class_of(module).__name__}
        given = tensors_in([*args, *kwargs.values()])
        node |= {"weights": self._weights[module], "input": _shape(given), "output": [], "inside": []}
        node["from"] = self._number(given[0].untyped_storage()) if given else -1
        self._open[-1]["inside"].append(node)
        self._open.append(node)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self._open:
            return
        node = self._open.pop()
        node["output"] = _shape(output)
        if not self._open:
            # A call with hooks holds its arguments a little longer, which would count where a backward recomputes it.
            self._unhook(but=2)  # those of the layer, which torch is going through
        if self._open and not node["weights"] and not node["inside"]:
            self._open[-1]["inside"].pop()  # an activation function, dropout

    def _number(self, storage: Any) -> int:
        """The same for the same storage, while it is alive."""
        for number, other in enumerate(self._read):
            if other() is storage:
                return number
        self._read.append(weakref.ref(storage))
        return len(self._read) - 1

    def _weights_of(self, module: nn.Module) -> list[dict[str, Any]]:
        """The parameters that the module itself holds: full shape, shape in a forward on this rank, placement on tp."""
        found = []
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{self._names[module]}.{name}"
            spec = self._specs.get(full, REPLICATED)
            dim, parts = _sharded(spec, self._tp)
            local = [-(-size // parts) if place == dim else size for place, size in enumerate(parameter.shape)]
            row = {"name": name, "shape": list(parameter.shape), "local": local, "dim": dim, "placement": str(spec)}
            found.append(row | {"trained": parameter.requires_grad})
        return found


def _sharded(spec: ParameterSpec, tp: int) -> tuple[int | None, int]:
    if spec.forward_shard_dim is not None:
        return spec.forward_shard_dim, spec.forward_shards
    return spec.dim, tp if spec.dim is not None else 1


def _shape(value: Any) -> list[int]:
    """The shape of the first tensor in ``value``."""
    return next((list(tensor.shape) for tensor in tensors_in(value) if isinstance(tensor, torch.Tensor)), [])
