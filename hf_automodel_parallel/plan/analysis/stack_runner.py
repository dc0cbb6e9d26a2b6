"""One forward of a stack of layers on fake tensors, with a callback at each call of a layer and of the modules in it.

The stack is the module whose forward runs the layers. Its own code, between the layers, runs on real tensors, because
it may look at values (masks, rotary embeddings of long contexts). What owns parameters, the layers and the modules
beside them, runs on fake tensors, so the run needs neither the weights nor their memory.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ... import compat
from ...errors import UnsupportedError, first_line

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

    Attributes:
        copy: the copied stack, in training mode, without hooks, LayerDrop and gradient checkpointing.
        prefix: name of the stack in the model.
        layer_names: names of the layers in the model.
        shard_length, length: the two of :func:`sequence_marks`; each row of the batch has ``length`` tokens.
        parameters: id of a parameter -> its name in the model.

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
    ) -> None:
        self.prefix = names[stack]
        self.layer_names = [names[layer] for layer in layers]
        self.shard_length, self.length = sequence_marks(model)
        self.fake = compat.fake_tensor_mode() if fake is None else fake
        self.parameters: dict[int, str] = {}
        # Keeps every copied parameter alive. Callers know parameters by their ids, and one that a caller takes out of
        # the copy must not leave its id to another tensor: memory, and with it the outcome, differs between ranks.
        self._copies = self._fake_parameters(model, shape)
        self.copy = self._copied(stack)
        self._call_back(on_layer, on_module, on_beside or self.run_beside)

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

    def _fake_parameters(
        self, model: nn.Module, shape: Callable[[str, nn.Parameter], tuple[int, ...]] | None
    ) -> dict[int, Any]:
        """The memo of the copy: id of a parameter or buffer -> its replacement."""
        memo: dict[int, Any] = {}
        with self.fake:
            for name, parameter in model.named_parameters():
                size = tuple(parameter.shape) if shape is None else shape(name, parameter)
                fake = nn.Parameter(torch.empty(size, dtype=parameter.dtype), requires_grad=False)
                memo[id(parameter)] = fake
                # Under both ids: a forward that was replaced by a function reads the parameters of the original.
                self.parameters[id(fake)] = self.parameters[id(parameter)] = name
        for buffer in model.buffers():  # real, because the stack's own code reads them; the run is on the CPU
            if buffer.device.type == "meta":
                memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            elif buffer.device.type != "cpu":
                memo[id(buffer)] = buffer.detach().cpu()
        return memo

    def _copied(self, stack: nn.Module) -> nn.Module:
        try:
            copied = copy.deepcopy(stack, self._copies)
        except Exception as error:
            raise UnsupportedError(
                f"{self.prefix or 'the model'} ({type(stack).__name__}) cannot be copied to run its layers on fake "
                f"tensors: {first_line(error)}."
            ) from error
        copied.train()
        config = getattr(copied, "config", None)
        if config is not None:
            config._attn_implementation = "eager"
        for module in copied.modules():
            compat.without_hooks(module)
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
            _without_layer_drop(module)
        return copied

    def _call_back(self, on_layer: Callback, on_module: Callback | None, on_beside: Callback) -> None:
        by_name = {f"{self.prefix}.{name}".strip("."): module for name, module in self.copy.named_modules()}
        layers = {name: by_name[name] for name in self.layer_names}
        for name, module in by_name.items() if on_module is not None else ():
            inside = any(name.startswith(f"{layer}.") for layer in layers)
            if inside and compat.has_implemented_forward(module):
                module.forward = _Intercepted(on_module, name, module.forward)  # type: ignore[arg-type,method-assign]
        for name, layer in layers.items():
            layer.forward = _Intercepted(on_layer, name, layer.forward)  # type: ignore[method-assign]
        names = {module: name for name, module in by_name.items()}
        for module in _beside(self.copy, set(layers.values())):
            module.forward = _Intercepted(on_beside, names[module], module.forward)  # type: ignore[method-assign]

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
    for holder in (module, getattr(module, "config", None)):
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if isinstance(value, float) and re.search("layer_?drop", name, re.IGNORECASE):
                setattr(holder, name, 0.0)
