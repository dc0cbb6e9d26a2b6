"""One forward of a stack of layers on fake tensors, with a callback at each call of a layer and of the modules in it.

The stack is the module whose forward runs the layers. Its own code, between the layers, runs on real tensors, because
it may look at values (masks, rotary embeddings of long contexts). What owns parameters, the layers and the modules
beside them, runs on fake tensors, so the run needs neither the weights nor their memory.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn

from ... import compat
from ...errors import UnsupportedError, first_line
from .equal_layers import EqualLayers, track

#: Rows of the batch that the stack is called with.
BATCH = 2

#: Called instead of a module's forward: (name in the model, the forward, its args, its kwargs) -> its result.
Callback = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class StackRunner:
    """A copy of a stack of layers whose parameters are fake tensors.

    Args:
        model: the model, on any device including meta; it is only read.
        stack: the module of ``model`` whose forward runs the layers.
        layers: the layers, in forward order.
        names: module -> its name in ``model``.
        on_layer: called for each layer, with real arguments; it has to return real tensors.
        on_module: called for each module inside of a layer, with the layer's arguments; None: the module just runs.
        on_beside: called for each outermost module beside the layers that owns parameters, with real arguments; it has
            to return real tensors. None: the module runs on fake tensors.
        shape: shape of the fake tensor of a parameter; None: its own.
        fake: the fake mode of the copy; None: a new one.
        equal: groups of equal layers. Only the first layer of a group is copied. Another one is copied when
            :meth:`forward_of` is called, or when the stack's code reads a part of it. None: all layers are copied.
        counts: name of a module -> attributes that its copy gets.

    Attributes:
        copy: the copied stack, in training mode, without hooks, LayerDrop and gradient checkpointing.
        prefix: name of the stack in the model.
        layer_names: names of the layers in the model.
        shard_length, length: the two of :func:`sequence_marks`; each row of the batch has ``length`` tokens.
        parameters: id of a parameter -> its name in the model.
        on_parameter: called with the id and the name of each parameter that is copied later.

    Raises:
        UnsupportedError: the stack cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: nn.Module,
        layers: list[nn.Module],
        names: dict[nn.Module, str],
        *,
        on_layer: Callback,
        on_module: Callback | None = None,
        on_beside: Callback | None = None,
        shape: Callable[[str, nn.Parameter], tuple[int, ...]] | None = None,
        fake: Any = None,
        equal: EqualLayers | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        self.prefix = names[stack]
        self.layer_names = [names[layer] for layer in layers]
        self._model, self._stack, self._shape, self._counts = model, stack, shape, counts or {}
        self._equal = equal
        self._on_layer, self._on_module, self._on_beside = on_layer, on_module, on_beside or self.run_beside
        self.shard_length, self.length = sequence_marks(model)
        self.fake = compat.fake_tensor_mode() if fake is None else fake
        self.parameters: dict[int, str] = {}
        self.on_parameter: Callable[[int, str], None] | None = None
        # Keeps every copied parameter alive. Callers know parameters by their ids, and one that a caller takes out of
        # the copy must not leave its id to another tensor: memory, and with it the outcome, differs between ranks.
        self._copies: dict[int, Any] = {}
        self._stand_ins: dict[str, nn.Module] = {}
        later = equal.first if equal is not None else {}
        self.copy = self._copied({names[layer]: layer for layer in layers if names[layer] in later})
        for name in self.layer_names:
            if name not in self._stand_ins:
                self._track_index(name)

    def run(self) -> Any:
        """Call the copy with a batch of zeros.

        Raises:
            TypeError: its forward takes neither ``input_ids`` nor ``inputs_embeds``.
            Exception: any error of the model's code or of the callbacks.
        """
        with compat.quiet_fake_tensors():
            return self.copy(**self._inputs())

    def submodule(self, name: str) -> nn.Module:
        """The copy of the module of that name in the model."""
        return self.copy.get_submodule(name.removeprefix(self.prefix).lstrip("."))

    def to_fake(self, value: Any) -> Any:
        """``value`` with a fake tensor for each tensor."""
        return compat.tree_map_only(torch.Tensor, self.fake.from_tensor, value)

    @staticmethod
    def to_real(value: Any) -> Any:
        """``value`` with zeros for each tensor, in the memory of one element: activations are large and unread."""
        return compat.tree_map_only(torch.Tensor, lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), value)

    def run_beside(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module beside the layers on fake tensors; the default of ``on_beside``."""
        args, kwargs = self.to_fake((args, kwargs))
        with self.fake:
            return self.to_real(forward(*args, **kwargs))

    # ---- the copy ----------------------------------------------------------------------------------------------------

    def _copied(self, later: dict[str, nn.Module]) -> nn.Module:
        """A copy of the stack with a stand-in for each of the layers ``later``."""
        self._copies = self._replaced_tensors({id(p) for layer in later.values() for p in layer.parameters()})
        for name, layer in later.items():
            stand_in = _stand_in(layer, name, self)
            if stand_in is not None:
                self._stand_ins[name] = self._copies[id(layer)] = stand_in
        copied = self._deep_copy(self._stack)
        for name, stand_in in self._stand_ins.items():
            _fill(stand_in, later[name], self._deep_copy)
        inside = (m for name in self._stand_ins for m in list(later[name].modules())[1:])
        if any(id(module) in self._copies for module in inside):  # something refers to a part of such a layer
            self._stand_ins.clear()
            self.parameters.clear()
            return self._copied({})
        self._set_up(copied, self.prefix, self.layer_names)
        return copied

    def forward_of(self, name: str) -> Callable[..., Any]:
        """The forward of the copy of the layer ``name``, which is copied now if it was not."""
        intercepted: Any = self.copied_layer(name).forward
        return intercepted.forward

    def copied_layer(self, name: str) -> nn.Module:
        """The copy of the layer ``name``, made now if there is a stand-in."""
        stand_in = self._stand_ins.pop(name, None)
        if stand_in is not None:
            layer = self._model.get_submodule(name)
            for own, parameter in layer.named_parameters():
                self._copies[id(parameter)] = self._fake_parameter(f"{name}.{own}", parameter)
            del self._copies[id(layer)]
            copied = self._deep_copy(layer)
            parent, _, key = name.rpartition(".")
            self.submodule(parent)._modules[key] = copied
            self._set_up(copied, name, [name])
            self._track_index(name)
        return self.submodule(name)

    def _deep_copy(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._copies)
        except Exception as error:
            raise UnsupportedError(
                f"{self.prefix or 'the model'} ({type(self._stack).__name__}) cannot be copied to run its layers on "
                f"fake tensors: {first_line(error)}."
            ) from error

    def _replaced_tensors(self, left_out: set[int]) -> dict[int, Any]:
        """The memo of the copy: id of a parameter or buffer -> its replacement."""
        memo: dict[int, Any] = {}
        for name, parameter in self._model.named_parameters():
            # A forward that was replaced by a function reads the parameters of the original.
            self.parameters[id(parameter)] = name
            if id(parameter) in left_out:  # a layer that may not be copied at all
                memo[id(parameter)] = _without_memory(parameter)
            else:
                memo[id(parameter)] = self._fake_parameter(name, parameter)
        for buffer in self._model.buffers():  # real, because the stack's own code reads them; the run is on the CPU
            if buffer.device.type == "meta":
                memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            elif buffer.device.type != "cpu":
                memo[id(buffer)] = buffer.detach().cpu()
        return memo

    def _fake_parameter(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        size = tuple(parameter.shape) if self._shape is None else self._shape(name, parameter)
        with self.fake:
            fake = nn.Parameter(torch.empty(size, dtype=parameter.dtype), requires_grad=False)
        self.parameters[id(fake)] = name
        if self.on_parameter is not None:
            self.on_parameter(id(fake), name)
        return fake

    def _set_up(self, copied: nn.Module, prefix: str, layer_names: list[str]) -> None:
        """Prepare the copy of a part of the model for the run, and call back from its modules."""
        copied.train()
        config = getattr(copied, "config", None)
        if config is not None:
            config._attn_implementation = "eager"
        for module in copied.modules():
            compat.without_hooks(module)
            # Not hasattr(module, ...): asked for what it lacks, a stand-in is copied.
            if "gradient_checkpointing" in vars(module) or hasattr(type(module), "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
            _without_layer_drop(module)
        by_name = {f"{prefix}.{name}".strip("."): module for name, module in copied.named_modules()}
        layers = {name: by_name[name] for name in layer_names}
        for name, module in by_name.items() if self._on_module is not None else ():
            if is_below(name, layers) and compat.has_implemented_forward(module):
                intercepted: Any = _Intercepted(self._on_module, name, module.forward)  # type: ignore[arg-type]
                module.forward = intercepted
        for name, layer in layers.items():
            layer.forward = _Intercepted(self._on_layer, name, layer.forward)  # type: ignore[method-assign]
        names = {module: name for name, module in by_name.items()}
        if copied not in layers.values():
            for module in _beside(copied, set(layers.values())):
                beside: Any = _Intercepted(self._on_beside, names[module], module.forward)
                module.forward = beside
        for name, counts in self._counts.items():
            for attribute, count in counts.items() if name in by_name else ():
                setattr(by_name[name], attribute, count)

    def _track_index(self, name: str) -> None:
        """Note when the copy of a layer that has equal ones reads its index; else they are not taken for equal."""
        group = self._equal.group(name) if self._equal is not None else None
        modules: dict[str, list[str]] = {}
        for path, attribute in self._equal.indices[group] if self._equal is not None and group is not None else ():
            modules.setdefault(path, []).append(attribute)
        try:
            for path, attributes in modules.items():
                track(self.submodule(name).get_submodule(path), attributes)
        except TypeError:
            del self._equal.indices[group]  # type: ignore[union-attr,arg-type]

    def _inputs(self) -> dict[str, Any]:
        accepted = inspect.signature(self.copy.forward).parameters
        inputs: dict[str, Any] = {}
        if "input_ids" in accepted:
            inputs["input_ids"] = torch.zeros((BATCH, self.length), dtype=torch.long)
        else:
            width = getattr(getattr(self.copy, "config", None), "hidden_size", None)
            if "inputs_embeds" not in accepted or not isinstance(width, int):
                raise TypeError("its forward takes neither input_ids nor inputs_embeds")
            inputs["inputs_embeds"] = torch.zeros((BATCH, self.length, width))
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return inputs


class _Intercepted:
    """The forward of a module that calls back instead."""

    def __init__(self, callback: Callback, name: str, forward: Callable[..., Any]) -> None:
        self.callback, self.name, self.forward = callback, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.callback(self.name, self.forward, args, kwargs)


def _stand_in(layer: nn.Module, name: str, runner: StackRunner) -> nn.Module | None:
    """An empty module of the class of ``layer``; what it does not have is read from the copy, which is made then."""
    kind: Any = type(layer)

    def read(module: nn.Module, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(runner.copied_layer(name), attribute)

    try:
        members = {"__getattr__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return object.__new__(type(kind)(kind.__name__, (kind,), members))
    except TypeError:
        return None


def _fill(stand_in: nn.Module, layer: nn.Module, copied: Callable[[Any], Any]) -> None:
    """Give a stand-in the attributes of the layer, without hooks and children."""
    for key, value in vars(layer).items():
        empty = type(value)() if key in ("_parameters", "_buffers", "_modules") or key.endswith("hooks") else None
        vars(stand_in)[key] = empty if empty is not None else copied(value)


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)


def is_below(name: str, layers: Container[str]) -> bool:
    """True if ``name`` is that of something inside of one of the layers of these names."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return True
    return False


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The first argument of a call that is a tensor."""
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


def smallest_stack(model: nn.Module, wanted: list[str]) -> nn.Module | None:
    """The smallest module around all modules of the names ``wanted`` that can be called with tokens, None without."""
    path = wanted[0] if wanted else ""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if all(not path or name.startswith(f"{path}.") for name in wanted) and compat.has_implemented_forward(module):
            if {"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters):
                return module
    return None


def sequence_marks(model: nn.Module) -> tuple[int, int]:
    """Two primes that divide no dimension of a parameter, as lengths of a sequence shard and of a full sequence.

    The shard is longer by far, so that lengths which a block derives from the full sequence (padded to a chunk, shifted
    by a convolution) are never taken for that of a shard.
    """
    sizes = {size for parameter in model.parameters() for size in parameter.shape if size}

    def prime_from(start: int) -> int:
        while any(start % d == 0 for d in range(2, start)) or any(size % start == 0 for size in sizes):
            start += 1
        return start

    return prime_from(1000), prime_from(60)


def _beside(module: nn.Module, layers: set[nn.Module]) -> list[nn.Module]:
    """The outermost modules with parameters below ``module`` that neither are nor hold one of ``layers``."""
    found: list[nn.Module] = []
    for child in module.children():
        if child in layers:
            continue
        if any(inner in layers for inner in child.modules()):
            found += _beside(child, layers)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


def _without_layer_drop(module: nn.Module) -> None:
    """Switch LayerDrop off, where ``module`` or its config has it: it would skip layers at random."""
    for holder in (module, vars(module).get("config")):
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if isinstance(value, float) and re.search("layer_?drop", name, re.IGNORECASE):
                setattr(holder, name, 0.0)
