"""One forward of a stack of layers without values, to see how each part of a layer meets a share of the sequence."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ... import compat
from ...core.sharding_spec import Input, Output, SequenceBlock, ShardingSpec
from ...errors import UnsupportedError, first_line
from .token_locality import FEATURES, TokenLocalityTrace, TokensMix

_BATCH = 2

REMEDY = "Use sequence_parallel=False; tensor parallelism alone computes the same."


@dataclass
class Found:
    """What the forward showed.

    Attributes:
        blocks: parts of layers that work on the whole sequence, and how they are entered and left.
        scatters: row-wise layers that give out shares.
        used: parameter name -> "share" and / or "whole", what it worked on.
        tail: the last module that works on shares.
        reasons: module -> why it does not work on shares, for those that might have.
    """

    blocks: dict[str, SequenceBlock] = field(default_factory=dict)
    scatters: list[str] = field(default_factory=list)
    used: dict[str, set[str]] = field(default_factory=dict)
    tail: str = ""
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class _Choice:
    """How a block is tried: ``scatters`` lets its row-wise layers give out shares."""

    scatters: bool


class _TailFails(Exception):
    """What follows the last layer cannot work on shares."""


class StackRunner:
    """One forward of the stack in which layers see shares; between the layers the model's own code runs on real
    numbers.

    Real, because that code may look at them (masks, rotary embeddings of long contexts). Its activations are zeros.

    Args:
        model: the model; it is only read.
        spec: its resolved tensor-parallel plan.
        stack: the module whose forward runs the layers.
        layers: the layers in forward order.
        names: module -> its name in ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ShardingSpec,
        stack: nn.Module,
        layers: list[nn.Module],
        names: dict[nn.Module, str],
    ) -> None:
        self.model, self.spec, self.names = model, spec, names
        self.stack, self.layers = stack, layers
        self.prefix = names[stack]
        self.share, self.whole = _marks(model)
        self.known: dict[tuple[type, str], _Choice] = {}  # what worked in the layers before
        self.keep: list[dict[int, Any]] = []

    def run(self) -> Found:
        """Run it.

        Raises:
            UnsupportedError: naming the module that can work neither on shares nor on the whole sequence in between.
        """
        try:
            return self._run(tail=None)
        except _TailFails:
            return self._run(tail=self.names[self.layers[-1]])

    def _run(self, tail: str | None) -> Found:
        self.found = Found(tail=tail or "")
        self.fake = compat.fake_tensor_mode()
        stack = self._skeleton()
        self.trace = TokenLocalityTrace(self.share, self.whole, self.parameters)
        self.path: list[str] = []
        self.last: torch.Tensor | None = None  # what the layer before returned
        self.left = list(self.layer_names)
        try:
            with torch.no_grad(), compat.quiet_fake_tensors():
                stack(**self._inputs(stack))
        except (UnsupportedError, _TailFails):
            raise
        except Exception as error:
            if tail is None and not self.left:  # something after the layers wants whole sequences
                raise _TailFails from error
            raise UnsupportedError(
                f"sequence_parallel=True: {self.prefix or 'the model'} ({type(self.stack).__name__}) cannot be "
                f"understood: {first_line(error)}. {REMEDY}"
            ) from error
        if self.left:
            raise UnsupportedError(
                f"sequence_parallel=True: {self.left[0]} is not called in a forward of {type(self.stack).__name__}. "
                f"{REMEDY}"
            )
        if not self.found.tail:
            raise _TailFails
        self.found.used = self.trace.used
        return self.found

    # ---- a copy of the stack without weights -------------------------------------------------------------------------

    def _skeleton(self) -> nn.Module:
        memo: dict[int, Any] = {}
        self.parameters: dict[int, str] = {}
        with self.fake:
            for name, parameter in self.model.named_parameters():
                empty = nn.Parameter(
                    torch.empty(self._shape(name, parameter), dtype=parameter.dtype), requires_grad=False
                )
                memo[id(parameter)] = empty
                # Under both ids: a forward that somebody replaced by a function reads the parameters of the original.
                self.parameters[id(empty)] = self.parameters[id(parameter)] = name
        # Parameters are known by their ids. One that a copy does not hold any more must not leave its id to another
        # tensor.
        self.keep.append(memo)
        for buffer in self.model.buffers():
            if buffer.device.type == "meta":
                memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            elif buffer.device.type != "cpu":
                memo[id(buffer)] = buffer.detach().cpu()  # the run is on the CPU
        try:
            stack = copy.deepcopy(self.stack, memo)
        except Exception as error:
            raise UnsupportedError(
                f"sequence_parallel=True: {self.prefix} ({type(self.stack).__name__}) cannot be copied to look at its "
                f"layers: {first_line(error)}. {REMEDY}"
            ) from error
        stack.train()
        config = getattr(stack, "config", None)
        if config is not None:
            config._attn_implementation = "eager"
        full = {module: f"{self.prefix}.{name}".strip(".") for name, module in stack.named_modules()}
        by_name = {name: module for module, name in full.items()}
        layers = [by_name[self.names[layer]] for layer in self.layers]
        self.layer_names = [self.names[layer] for layer in self.layers]
        for module in full:
            compat.without_hooks(module)
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]
            _call_every_layer(module)
        self.inside = {name for name in by_name if any(name.startswith(f"{layer}.") for layer in self.layer_names)}
        for name in self.inside:
            if compat.has_implemented_forward(by_name[name]):
                by_name[name].forward = _Watched(self, name, by_name[name].forward)  # type: ignore[method-assign]
        for layer in layers:
            layer.forward = self._layer(full[layer], type(layer), layer.forward)  # type: ignore[method-assign]
        self._wrap_around(stack, set(layers), full)
        return stack

    def _shape(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def _wrap_around(self, module: nn.Module, layers: set[nn.Module], full: dict[nn.Module, str]) -> None:
        """Modules beside the layers that own parameters have no values either."""
        for child in module.children():
            if child in layers:
                continue
            if any(inner in layers for inner in child.modules()):
                self._wrap_around(child, layers, full)
            elif any(True for _ in child.parameters()):
                child.forward = self._beside(full[child], child.forward)  # type: ignore[method-assign]

    def _inputs(self, stack: nn.Module) -> dict[str, Any]:
        accepted = inspect.signature(stack.forward).parameters
        inputs: dict[str, Any] = {}
        if "input_ids" in accepted:
            inputs["input_ids"] = torch.zeros((_BATCH, self.whole), dtype=torch.long)
        else:
            width = getattr(getattr(stack, "config", None), "hidden_size", None)
            if "inputs_embeds" not in accepted or not isinstance(width, int):
                raise TypeError("its forward takes neither input_ids nor inputs_embeds")
            inputs["inputs_embeds"] = torch.zeros((_BATCH, self.whole, width))
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return inputs

    # ---- what runs ---------------------------------------------------------------------------------------------------

    def _to_fake(self, value: Any, known: Any = None, instead: Any = None) -> Any:
        return compat.tree_map_only(torch.Tensor, lambda x: instead if x is known else self.fake.from_tensor(x), value)

    def _to_real(self, value: Any) -> Any:
        # One zero, shown in a large shape: nobody looks at hidden states.
        return compat.tree_map_only(torch.Tensor, lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), value)

    def _beside(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            on_sequence_shards = (
                self.last is not None and not self.left and any(x is self.last for x in (*args, *kwargs.values()))
            )
            args, kwargs = self._to_fake((args, kwargs))
            if not on_sequence_shards or self.found.tail:
                with self.fake:
                    return self._to_real(forward(*args, **kwargs))
            try:
                with self.fake, self.trace:
                    output = forward(*args, **kwargs)
                    if not isinstance(output, torch.Tensor) or not self._has_tokens(output, self.share):
                        raise TokensMix("it returns no share")
                    output = self._resized(output, self.whole)
            except Exception as error:
                raise _TailFails from error
            self.found.tail = name
            return self._to_real(output)

        return run

    def _layer(self, name: str, kind: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.left or self.left[0] != name:
                what = "more than once" if name not in self.left else f"before {self.left[0]}"
                raise UnsupportedError(f"sequence_parallel=True: the layer {name} is called {what}. {REMEDY}")
            hidden = args[0] if args else next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
            first = self.last is None
            expected = self.whole if first else self.share
            if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or not self._has_tokens(hidden, expected):
                shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
                raise UnsupportedError(
                    f"sequence_parallel=True: the first argument of {name} ({kind.__name__}) is no hidden state of "
                    f"shape (batch, length, width), but {shape}. {REMEDY}"
                )
            if not first and hidden is not self.last:
                raise UnsupportedError(
                    f"sequence_parallel=True: {type(self.stack).__name__} changes the hidden states before {name}. "
                    f"{REMEDY}"
                )
            output = self._try_layer(name, kind, forward, hidden, args, kwargs)
            self.left.pop(0)
            if self.found.tail == name:
                output = compat.tree_map_only(
                    torch.Tensor, lambda x: self._resized(x, self.whole) if self.trace.is_share(x) else x, output
                )
            output = self._to_real(output)
            self.last = output[0] if isinstance(output, tuple) else output
            return output

        return run

    def _try_layer(
        self, name: str, kind: type, forward: Callable[..., Any], hidden: torch.Tensor, args: Any, kwargs: Any
    ) -> Any:
        """Run a layer, changing how its blocks are treated until it works."""
        choices = {f"{name}.{part}": replace(c) for (k, part), c in self.known.items() if k is kind}
        while True:
            self.choices, self.path, self.trace.outdated = choices, [], []
            self.blocks: dict[str, SequenceBlock] = {}
            self.scatters: list[str] = []
            used = {parameter: set(where) for parameter, where in self.trace.used.items()}
            fake_hidden = self.fake.from_tensor(hidden)
            try:
                with self.fake, self.trace:
                    share = fake_hidden if self.trace.is_share(fake_hidden) else self._resized(fake_hidden, self.share)
                    fake_args, fake_kwargs = self._to_fake((args, kwargs), hidden, share)
                    output = forward(*fake_args, **fake_kwargs)
                self._check_output(output)
                break
            except Exception as error:
                self.trace.used = used
                self.found.reasons[self.path[0] if self.path else name] = first_line(error)
                if not self._adapt(name):
                    where = self.path[-1] if self.path else name
                    module = self.model.get_submodule(where)
                    raise UnsupportedError(
                        f"sequence_parallel=True: {where} ({type(module).__name__}) cannot work on a share of the "
                        f"sequence: {first_line(error)}. {REMEDY}"
                    ) from error
        for block, choice in choices.items():
            self.known[kind, block.removeprefix(f"{name}.")] = choice
        self.found.blocks |= self.blocks
        self.found.scatters += self.scatters
        return output

    def _adapt(self, layer: str) -> bool:
        """After a failure: the next thing to try, or False."""
        part = self.path[0] if self.path else None
        if part is not None and part not in self.choices:
            self.choices[part] = _Choice(scatters=False)  # it does not keep tokens apart: a block, too
            return True
        if part is not None and self.choices[part].scatters:
            self.choices[part].scatters = False
            return True
        scattering = [choice for choice in self.choices.values() if choice.scatters]
        for choice in scattering:
            choice.scatters = False
        return bool(scattering) and part is None

    def _check_output(self, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, torch.Tensor) or first.ndim != 3 or not self._has_tokens(first, self.share):
            raise TokensMix("its output is no share of the hidden states")
        others = [x for x in (output[1:] if isinstance(output, tuple) else ()) if isinstance(x, torch.Tensor)]
        if any(self.trace.is_share(x) for x in others):
            raise TokensMix("it returns other activations of a share beside the hidden states")

    # ---- modules inside of a layer -----------------------------------------------------------------------------------

    def called(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module inside of a layer is called."""
        outermost = not self.path
        self.path.append(name)
        if outermost and (name in self.choices or self._holds_boundary(name)):
            output = self._block(name, forward, args, kwargs)
        else:
            output = self._module(name, forward, args, kwargs)
        self.path.pop()  # left where it is by an exception
        return output

    def _holds_boundary(self, name: str) -> bool:
        return name in self.spec.modules or any(
            other.startswith(f"{name}.")
            for other in (*self.spec.modules, *(p for p, s in self.spec.parameters.items() if s.dim is not None))
        )

    def _block(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.choices.setdefault(name, _Choice(scatters=True))
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        shares = [x for x in given if self.trace.is_share(x)]
        gathers = bool(shares)
        if gathers:
            if len(shares) > 1 or given[0] is not shares[0] or not self._has_tokens(shares[0], self.share):
                raise TokensMix("it takes more of a share, or another shape of it, than one hidden state")
            self.trace.refuse_outdated(shares)
            whole = self._resized(shares[0], self.whole)
            before = compat.version_of(whole)
            args, kwargs = compat.tree_map_only(torch.Tensor, lambda x: whole if x is shares[0] else x, (args, kwargs))
        output = self._module(name, forward, args, kwargs)
        writes = gathers and compat.version_of(whole) != before
        if writes:  # into a copy of what the layer has, so nobody else sees it
            self.trace.outdated.append(shares[0])
        first = output[0] if isinstance(output, tuple) and output else output
        others = [x for x in (output[1:] if isinstance(output, tuple) else ()) if isinstance(x, torch.Tensor)]
        if not isinstance(first, torch.Tensor) or any(self.trace.is_share(x) for x in others):
            raise TokensMix("it returns something else than a hidden state first, or more than one share")
        splits = self._has_tokens(first, self.whole) and FEATURES not in self.trace.labels_of(first)
        if splits:
            share = self._resized(first, self.share)
            output = (share, *output[1:]) if isinstance(output, tuple) else share
        self.blocks[name] = SequenceBlock(gathers, splits, writes)
        return output

    def _module(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        boundary = self.spec.modules.get(name)
        if boundary is None or boundary.foreign is not None:
            return forward(*args, **kwargs)
        if boundary.input is Input.COPY_ALL:  # experts, which choose tokens by values: as many come out as go in
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            return torch.empty_like(first)
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if boundary.output is Output.NONE and boundary.input is not Input.SCALE:
            self.trace.label(first, [FEATURES])
            return output
        if boundary.output not in (Output.REDUCE, Output.GATHER):
            return output
        fresh = torch.empty(first.shape, dtype=first.dtype)
        if (
            boundary.output is Output.REDUCE
            and first.ndim > 2
            and self._has_tokens(first, self.whole)
            and self.choices[self.path[0]].scatters
        ):
            fresh = self._resized(first, self.share)
            self.scatters.append(name)
        return (fresh, *output[1:]) if isinstance(output, tuple) else fresh

    # ---- shapes ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _has_tokens(x: torch.Tensor, length: int) -> bool:
        """``x`` is an activation of ``length`` tokens: (batch, length, ...) or, flat, (batch * length, width)."""
        return x.shape[0] == _BATCH * length if x.ndim == 2 else x.ndim > 2 and x.shape[1] == length

    @staticmethod
    def _resized(x: torch.Tensor, length: int) -> torch.Tensor:
        shape = (_BATCH * length, x.shape[1]) if x.ndim == 2 else (x.shape[0], length, *x.shape[2:])
        return torch.empty(
            shape, dtype=x.dtype
        )  # on the CPU, where everything is, and from nothing: no operator on `x`


class _Watched:
    """The forward of a module inside of a layer."""

    def __init__(self, probe: StackRunner, name: str, forward: Callable[..., Any]) -> None:
        self.probe, self.name, self.forward = probe, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.probe.called(self.name, self.forward, args, kwargs)


def _call_every_layer(module: nn.Module) -> None:
    """Switch LayerDrop off, where ``module`` or its config has it: which layers a run shows must not be drawn."""
    for holder in (module, getattr(module, "config", None)):
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if isinstance(value, float) and re.search("layer_?drop", name, re.IGNORECASE):
                setattr(holder, name, 0.0)


def _marks(model: nn.Module) -> tuple[int, int]:
    """Two primes that divide no dimension of a parameter, as lengths of a share and of a whole sequence.

    The share is longer by far, so that lengths a block derives from the whole sequence (padded to a chunk, shifted by a
    convolution) are never taken for a share.
    """
    sizes = {size for parameter in model.parameters() for size in parameter.shape if size}

    def prime_from(start: int) -> int:
        while any(start % d == 0 for d in range(2, start)) or any(size % start == 0 for size in sizes):
            start += 1
        return start

    return prime_from(1000), prime_from(60)
