"""Can the layers of a stack work on sequence shards? One forward on fake tensors, in which each part is tried.

The layers get sequence shards instead of full sequences, and every operator on them has to keep tokens apart
(:mod:`token_locality`). A part of a layer that fails is made a block: its input is all-gathered along the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ... import compat
from ...core.sharding_spec import InputHook, OutputHook, SequenceBlock, ShardingSpec
from ...errors import UnsupportedError, first_line
from .equal_layers import EqualLayers, WatchedRun, arguments_of_call, holds_tensors_only, renamed
from .stack_runner import BATCH, StackRunner, first_tensor
from .token_locality import FEATURES, TokenLocalityTrace, TokensMix

REMEDY = "Use sequence_parallel=False; tensor parallelism alone computes the same."


@dataclass
class Found:
    """The result of the forward.

    Attributes:
        blocks: parts of layers that work on the full sequence, and how they are entered and left.
        scatters: row-wise layers whose output is reduce-scattered along the sequence.
        used: parameter name -> "shard" and / or "full": the activations that it was applied to.
        tail: the last module that works on sequence shards.
        reasons: module -> why it does not work on sequence shards, where that was tried.
    """

    blocks: dict[str, SequenceBlock] = field(default_factory=dict)
    scatters: list[str] = field(default_factory=list)
    used: dict[str, set[str]] = field(default_factory=dict)
    tail: str = ""
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class _Outcome:
    """What one call of a layer has shown: its output (fake tensors), its blocks, and how it used its parameters.

    ``choices`` are the treatment of its blocks, by their names in the layer.
    """

    output: Any
    choices: dict[str, bool]
    blocks: dict[str, SequenceBlock]
    scatters: list[str]
    used: dict[str, set[str]]


class _TailFails(Exception):
    """The code after the last layer cannot work on sequence shards."""


class SequenceCheck:
    """One forward of a stack whose layers get sequence shards.

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
        # Class of a layer, block in it -> True if its row-wise layers reduce-scatter: what worked in earlier layers.
        self.known: dict[tuple[type, str], bool] = {}

    def run(self) -> Found:
        """Run the stack.

        Raises:
            UnsupportedError: naming the module that works neither on sequence shards nor as a block.
        """
        try:
            return self._run(tail="")
        except _TailFails:
            return self._run(tail=self.names[self.layers[-1]])

    def _run(self, tail: str) -> Found:
        self.found = Found(tail=tail)
        self.equal = EqualLayers(self.model, self.spec, self.layers, self.names)
        try:
            self.runner = StackRunner(
                self.model,
                self.stack,
                self.layers,
                self.names,
                on_layer=self._layer,
                on_module=self._called,
                on_beside=self._beside,
                equal=self.equal,
            )
        except UnsupportedError as error:
            raise UnsupportedError(f"sequence_parallel=True: {error} {REMEDY}") from error
        self.shard, self.full = self.runner.shard_length, self.runner.length
        self.trace = TokenLocalityTrace(self.shard, self.full, self.runner.parameters)
        self.runner.on_parameter = self.trace.know
        self.path: list[str] = []  # names of the modules inside of a layer that are running
        self.last: torch.Tensor | None = None  # output of the previous layer
        self.left = list(self.runner.layer_names)
        try:
            with torch.no_grad():
                self.runner.run()
        except (UnsupportedError, _TailFails):
            raise
        except Exception as error:
            if not tail and not self.left:  # something after the layers needs full sequences
                raise _TailFails from error
            raise UnsupportedError(
                f"sequence_parallel=True: {self.runner.prefix or 'the model'} ({type(self.stack).__name__}) cannot be "
                f"run on fake tensors: {first_line(error)}. {REMEDY}"
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

    # ---- modules beside the layers -----------------------------------------------------------------------------------

    def _beside(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module after the last layer (a norm) works on sequence shards, too, if it can."""
        after_layers = self.last is not None and not self.left
        if self.found.tail or not (after_layers and any(x is self.last for x in (*args, *kwargs.values()))):
            return self.runner.run_beside(name, forward, args, kwargs)
        args, kwargs = self.runner.to_fake((args, kwargs))
        try:
            with self.runner.fake, self.trace:
                output = forward(*args, **kwargs)
                if not isinstance(output, torch.Tensor) or not _has_tokens(output, self.shard):
                    raise TokensMix("its output is not a sequence shard")
                output = _resized(output, self.full)
        except Exception as error:
            raise _TailFails from error
        self.found.tail = name
        return self.runner.to_real(output)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        kind = type(self.model.get_submodule(name))
        if not self.left or self.left[0] != name:
            what = "more than once" if name not in self.left else f"before {self.left[0]}"
            raise UnsupportedError(f"sequence_parallel=True: the layer {name} is called {what}. {REMEDY}")
        hidden = args[0] if args else next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
        first = self.last is None
        expected = self.full if first else self.shard
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or not _has_tokens(hidden, expected):
            shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise UnsupportedError(
                f"sequence_parallel=True: the first argument of {name} ({kind.__name__}) is not a hidden state of "
                f"shape (batch, length, width), but {shape}. {REMEDY}"
            )
        if not first and hidden is not self.last:
            raise UnsupportedError(
                f"sequence_parallel=True: {type(self.stack).__name__} changes the hidden states before {name}. {REMEDY}"
            )
        output = self._output_of(name, kind, hidden, args, kwargs)
        self.left.pop(0)
        if self.found.tail == name:
            output = compat.tree_map_only(
                torch.Tensor, lambda x: _resized(x, self.full) if self.trace.is_shard(x) else x, output
            )
        output = self.runner.to_real(output)
        self.last = output[0] if isinstance(output, tuple) else output
        return output

    def _output_of(self, name: str, kind: type, hidden: torch.Tensor, args: Any, kwargs: Any) -> Any:
        """Run a layer, or take the outcome of an equal one."""
        equal = self.equal.group(name)
        arguments = arguments_of_call((args, kwargs), lambda x: None, hidden) if equal is not None else None
        known = self.equal.outcome(name, arguments)
        if known is not None and known[1].choices == self._known_choices(kind):
            layer, outcome = known
            self.found.blocks |= {renamed(n, layer, name): block for n, block in outcome.blocks.items()}
            self.found.scatters += [renamed(n, layer, name) for n in outcome.scatters]
            for parameter, where in outcome.used.items():
                self.trace.used.setdefault(renamed(parameter, layer, name), set()).update(where)
            return outcome.output
        forward = self.runner.forward_of(name)
        watched = WatchedRun(self.runner.submodule(name)) if arguments is not None else None
        before = {parameter: set(where) for parameter, where in self.trace.used.items()}
        output = self._try_layer(name, kind, forward, hidden, args, kwargs)
        if watched is not None and watched.speaks_for_equal_layers() and holds_tensors_only(output):
            used = {n: where - before.get(n, set()) for n, where in self.trace.used.items() if where != before.get(n)}
            outcome = _Outcome(output, self._known_choices(kind), self.blocks, self.scatters, used)
            self.equal.outcomes.setdefault(equal or "", []).append((name, arguments, outcome))
        return output

    def _known_choices(self, kind: type) -> dict[str, bool]:
        return {part: scatters for (k, part), scatters in self.known.items() if k is kind}

    def _try_layer(
        self, name: str, kind: type, forward: Callable[..., Any], hidden: torch.Tensor, args: Any, kwargs: Any
    ) -> Any:
        """Run a layer, changing how its blocks are treated until it works."""
        fake = self.runner.fake
        #: block -> True if its row-wise layers reduce-scatter
        self.choices = {f"{name}.{part}": scatters for part, scatters in self._known_choices(kind).items()}
        while True:
            self.path, self.trace.outdated = [], []
            self.blocks: dict[str, SequenceBlock] = {}
            self.scatters: list[str] = []
            used = {parameter: set(where) for parameter, where in self.trace.used.items()}
            shard = fake.from_tensor(hidden)
            try:
                with fake, self.trace:
                    shard = _resized(shard, self.shard)
                    fake_args, fake_kwargs = self._to_fake((args, kwargs), hidden, shard)
                    output = forward(*fake_args, **fake_kwargs)
                self._check_output(output)
                break
            except Exception as error:
                self.trace.used = used
                self.found.reasons[self.path[0] if self.path else name] = first_line(error)
                if not self._adapt():
                    where = self.path[-1] if self.path else name
                    module = self.model.get_submodule(where)
                    raise UnsupportedError(
                        f"sequence_parallel=True: {where} ({type(module).__name__}) cannot work on a sequence shard: "
                        f"{first_line(error)}. {REMEDY}"
                    ) from error
        for block, scatters in self.choices.items():
            self.known[kind, block.removeprefix(f"{name}.")] = scatters
        self.found.blocks |= self.blocks
        self.found.scatters += self.scatters
        return output

    def _to_fake(self, value: Any, hidden: torch.Tensor, shard: torch.Tensor) -> Any:
        """``value`` with a fake tensor for each tensor, ``shard`` for the hidden states."""
        fake = self.runner.fake.from_tensor
        return compat.tree_map_only(torch.Tensor, lambda x: shard if x is hidden else fake(x), value)

    def _adapt(self) -> bool:
        """After a failure: change the choices to the next ones to try, or return False."""
        if self.path:
            part = self.path[0]
            if self.choices.get(part) is False:
                return False
            # A part that does not keep tokens apart becomes a block; of a block, the output is split at its end.
            self.choices[part] = False
            return True
        scattering = [block for block, scatters in self.choices.items() if scatters]
        self.choices |= dict.fromkeys(scattering, False)
        return bool(scattering)

    def _check_output(self, output: Any) -> None:
        first, others = _first_and_others(output)
        if not isinstance(first, torch.Tensor) or first.ndim != 3 or not _has_tokens(first, self.shard):
            raise TokensMix("its output is not a sequence shard of the hidden states")
        if any(self.trace.is_shard(x) for x in others):
            raise TokensMix("it returns other sequence shards beside the hidden states")

    # ---- modules inside of a layer -----------------------------------------------------------------------------------

    def _called(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outermost = not self.path
        self.path.append(name)
        if outermost and (name in self.choices or self._holds_sharded(name)):
            output = self._block(name, forward, args, kwargs)
        else:
            output = self._module(name, forward, args, kwargs)
        self.path.pop()  # not after an exception, where the path names the module that failed
        return output

    def _holds_sharded(self, name: str) -> bool:
        sharded = (*self.spec.modules, *(p for p, s in self.spec.parameters.items() if s.dim is not None))
        return name in self.spec.modules or any(other.startswith(f"{name}.") for other in sharded)

    def _block(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block on the full sequence, and split its output, if it is one hidden state for each token."""
        self.choices.setdefault(name, True)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        shards = [x for x in given if self.trace.is_shard(x)]
        gathers = bool(shards)
        if gathers:
            if len(shards) > 1 or given[0] is not shards[0] or not _has_tokens(shards[0], self.shard):
                raise TokensMix("its sequence shards are more than one hidden state, or of another shape")
            self.trace.refuse_outdated(shards)
            full = _resized(shards[0], self.full)
            before = compat.version_of(full)
            args, kwargs = compat.tree_map_only(torch.Tensor, lambda x: full if x is shards[0] else x, (args, kwargs))
        output = self._module(name, forward, args, kwargs)
        writes = gathers and compat.version_of(full) != before
        if writes:  # into what was gathered; the shard that the layer goes on with does not have it
            self.trace.outdated.append(shards[0])
        first, others = _first_and_others(output)
        if not isinstance(first, torch.Tensor) or any(self.trace.is_shard(x) for x in others):
            raise TokensMix("its first output is not a hidden state, or it returns more than one sequence shard")
        splits = _has_tokens(first, self.full) and FEATURES not in self.trace.labels_of(first)
        if splits:
            output = _with_first(output, _resized(first, self.shard))
        self.blocks[name] = SequenceBlock(gathers, splits, writes)
        return output

    def _module(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module, with the shapes and labels that its TP hooks make."""
        hooks = self.spec.modules.get(name)
        if hooks is None or hooks.native_style is not None:
            return forward(*args, **kwargs)
        if hooks.input is InputHook.COPY_ALL_TO_TP:  # experts choose tokens by values, which there are none of
            return torch.empty_like(first_tensor(args, kwargs))
        output = forward(*args, **kwargs)
        first, _ = _first_and_others(output)
        if hooks.output is OutputHook.NONE and hooks.input is not InputHook.DIVIDE:
            self.trace.label(first, [FEATURES])
            return output
        if hooks.output not in (OutputHook.REDUCE_FROM_TP, OutputHook.GATHER):
            return output
        fresh = torch.empty(first.shape, dtype=first.dtype)
        reduces = hooks.output is OutputHook.REDUCE_FROM_TP and first.ndim > 2 and _has_tokens(first, self.full)
        if reduces and self.choices[self.path[0]]:
            fresh = _resized(first, self.shard)
            self.scatters.append(name)
        return _with_first(output, fresh)


def _first_and_others(output: Any) -> tuple[Any, list[torch.Tensor]]:
    """The first of several outputs, or the only one, and the tensors among the others."""
    if not isinstance(output, tuple) or not output:
        return output, []
    return output[0], [x for x in output[1:] if isinstance(x, torch.Tensor)]


def _with_first(output: Any, first: torch.Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first


def _has_tokens(x: torch.Tensor, length: int) -> bool:
    """True if ``x`` is an activation of ``length`` tokens: (batch, length, ...) or, flat, (batch * length, width)."""
    return x.shape[0] == BATCH * length if x.ndim == 2 else x.ndim > 2 and x.shape[1] == length


def _resized(x: torch.Tensor, length: int) -> torch.Tensor:
    """An activation like ``x`` of ``length`` tokens; made from nothing, so that no operator on ``x`` is seen."""
    shape = (BATCH * length, x.shape[1]) if x.ndim == 2 else (x.shape[0], length, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype)  # on the CPU, where everything runs
