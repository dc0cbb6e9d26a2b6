"""Sequence parallelism: between the blocks of a layer, hidden states are this rank's shard of the sequence.

Norms, dropout and residuals work on shards. A *block* (attention, MLP) works on the full sequence, exactly as under
tensor parallelism alone: its input is all-gathered on the way in, its output is scattered on the way out.

Active in forwards that record gradients. In all others (evaluation, generation with a cache) nothing is scattered,
because there are no saved activations to shard; then the model is tensor parallel only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ..core.sharding_spec import SequenceBlock, SequenceSpec
from ..errors import UnsupportedError
from ..plan.analysis.sequence_parallel import recomputes_anyway
from .boundary_hooks import CopyInput, SharedInputs, first_tensor, map_tensor, replace_first
from .collectives import gather_sequence, split_sequence
from .dropout_rng import TPRngTracker
from .local_parameters import LocalParamForward
from .sequence_guards import warn_of_hooks
from .shared_sequence import ScatterOutput, SharedSequence, TailInputs

#: Keyword argument for a layer or a block: the length of the full sequence. It travels with the call, so that a
#: checkpoint recomputes with the length of its own forward, and a compiled layer takes it as an input.
LENGTH = "sequence_length"


class LayerForward(ForwardWrapper):
    """The forward of a layer on sequence shards: takes the length and gives it to the hooks inside."""

    shared: SharedSequence | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        length = kwargs.pop(LENGTH, None)
        if length is None:
            return self.inner(*args, **kwargs)
        # Inside of a checkpoint, so that its recomputation starts from the common random state again.
        return self.shared.run(length, self.inner, *args, **kwargs)  # type: ignore[union-attr]


class BlockForward(ForwardWrapper):
    """The forward of a block: full sequences inside, shards outside.

    The hooks :meth:`before` and :meth:`after` stay outside of a checkpoint around the block. So the checkpoint saves
    the shard, and its recomputation all-gathers once more.
    """

    def __init__(self, spec: SequenceBlock) -> None:
        self.spec = spec
        self.shared: SharedSequence | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Input hook: full sequences from here on, so the ranks draw their common random numbers."""
        if self.shared is None or self.shared.length is None:
            return None
        self.shared.draw_common()
        return args, {**kwargs, LENGTH: self.shared.length}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Output hook: sequence shards from here on."""
        if self.shared is not None and self.shared.length is not None:
            self.shared.draw_own()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        length = kwargs.pop(LENGTH, None)
        if length is None:
            return self.inner(*args, **kwargs)
        shared: SharedSequence = self.shared  # type: ignore[assignment]
        around, shared.length = shared.length, length
        try:
            if self.spec.gathers:
                args, kwargs = replace_first(
                    args, kwargs, shared.gather(first_tensor(args, kwargs), self.spec.mutates_input)
                )
            output = self.inner(*args, **kwargs)
            return map_tensor(output, shared.split) if self.spec.scatters else output
        finally:
            shared.draw_common()
            shared.length = around


class BoundaryBlock(BlockForward):
    """A block that is one projection: its copy to TP is an input hook, so it has to all-gather before that hook."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.shared is None or self.shared.length is None:
            return None
        self.shared.draw_common()
        if not self.spec.gathers:
            return None
        return replace_first(args, kwargs, self.shared.gather(first_tensor(args, kwargs), self.spec.mutates_input))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.shared is None or self.shared.length is None:
            return None
        if self.spec.scatters:
            self.shared.draw_own()
        return map_tensor(output, self.shared.split) if self.spec.scatters else None


class SequenceParallel:
    """The hooks and forwards of sequence parallelism on one model.

    The model around the layers sees full sequences: the first layer that is called scatters, the tail all-gathers.

    Args:
        model: the model, before FSDP2.
        spec: where to scatter and gather.
        mesh: the tp axis.
        boundaries: names of the modules with tp input or output hooks.

    Attributes:
        length: tokens of the full sequence from the first layer to the tail, else None.
        records: autograd records the running forward of the stack; None outside of a forward.
        ended: the running forward has all-gathered the output of the layers.
        shards: inputs and outputs of the layers in this forward, which the model may return as hidden states.
        members: hooks and forwards that use a layer's :class:`SharedSequence`, by module name.
    """

    def __init__(self, model: nn.Module, spec: SequenceSpec, mesh: DeviceMesh, boundaries: set[str]) -> None:
        self.spec, self.mesh = spec, mesh
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.tail = TailInputs(mesh)
        self.length: int | None = None
        #: Of a first layer that was called outside of the stack's forward: not empty when its tail has run.
        self.by_hand: list[bool] | None = None
        self.records: bool | None = None
        self.ended = False
        self.shards: list[weakref.ref[torch.Tensor]] = []
        self.members: dict[str, Any] = {}
        self.scopes: list[LocalParamForward] = []
        self.numbers: TPRngTracker | None = None
        self.first = True
        self.layers = [model.get_submodule(name) for name in spec.layers]

        stack = model.get_submodule(spec.stack)
        stack.register_forward_pre_hook(self.begin)
        stack.register_forward_hook(self.finish, always_call=True)
        model.register_forward_hook(self.forget, always_call=True)
        for name, layer in zip(spec.layers, self.layers, strict=True):
            forward = LayerForward()
            ForwardStack.of(layer).push(ForwardSlot.SEQUENCE, forward)
            self.members[name] = forward
            layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True)
            layer.register_forward_hook(self.leave_layer)
        for name, block_spec in spec.blocks.items():
            block = model.get_submodule(name)
            if name in boundaries:
                around: BlockForward = BoundaryBlock(block_spec)
                block.register_forward_pre_hook(around.before, with_kwargs=True, prepend=True)
                block.register_forward_hook(around.after)
            else:
                around = BlockForward(block_spec)
                ForwardStack.of(block).push(ForwardSlot.SEQUENCE, around)
                block.register_forward_pre_hook(around.before, with_kwargs=True)
                block.register_forward_hook(around.after)
            self.members[f"{name}:block"] = around
        tail = model.get_submodule(spec.tail)
        if tail not in self.layers:
            tail.register_forward_pre_hook(self.enter_tail, with_kwargs=True)
        tail.register_forward_hook(self.gather_tail)

    # ---- wiring ------------------------------------------------------------------------------------------------------

    def add(self, name: str, scatter: ScatterOutput) -> None:
        """Register the output hook of the row-wise layer ``name``."""
        self.members[name] = scatter

    def memory(self, layer: str) -> SharedInputs:
        """The all-gathered sequences and copies to TP of ``layer``, given to the hooks and forwards inside of it."""
        if layer not in self.spec.layers:
            return SharedInputs()
        shared = SharedSequence(self.mesh, self.spec.regather)
        shared.numbers = self.numbers
        for name, member in self.members.items():
            if name == layer or name.startswith(f"{layer}."):
                member.shared = shared
        return shared

    def complete(self, scopes: dict[nn.Module, LocalParamForward], others: list[CopyInput]) -> None:
        """Connect with the local-parameter scopes of all modules.

        Args:
            scopes: by module; each layer has to be in it.
            others: the copies to TP outside of the layers.

        Raises:
            UnsupportedError: a layer has no scope of its own.
        """
        for name, layer in zip(self.spec.layers, self.layers, strict=True):
            if layer not in scopes or self.members[name].shared is None:
                raise UnsupportedError(
                    f"sequence_parallel=True: {name} is not an FSDP2 unit, because another unit lies inside of it. "
                    "Use sequence_parallel=False or a wrap policy that names the layers."
                )
        self.scopes = [scopes[layer] for layer in self.layers]
        for scope in scopes.values():
            self.connect(scope)
        for copy in others:
            copy.shared = self.tail

    def connect(self, scope: LocalParamForward) -> None:
        """Let ``scope`` recognise calls on sequence shards, in which gradients of replicated parameters are Partial."""
        scope.on_sequence_shards = functools.partial(self.on_sequence_shards, scope.shared)

    def on_sequence_shards(self, shared: SharedInputs | None, kwargs: dict[str, Any]) -> bool:
        """True if a call with these arguments works on sequence shards; ``shared`` is None outside of the layers."""
        if shared is None:
            return self.length is not None
        return LENGTH in kwargs or shared.length is not None

    # ---- one forward -------------------------------------------------------------------------------------------------

    def begin(self, *_: Any) -> None:
        """Input hook of the stack: this forward works on sequence shards if autograd records it."""
        self.forget()
        own = any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in self.layers)
        if own and torch.is_grad_enabled() and compat.checkpoints_around_calls():
            raise UnsupportedError(
                "sequence_parallel=True with the model's own gradient checkpointing needs transformers 5.23 or later: "
                "the installed one recomputes around the layer, where the length of the sequence is not known. "
                "Use activation_checkpointing='full' in AutoParallelismConfig instead."
            )
        if own and torch.is_grad_enabled() and self.spec.regather:
            raise recomputes_anyway("the model's own gradient checkpointing")
        self.records, self.length, self.ended, self.by_hand = torch.is_grad_enabled(), None, False, None
        if self.records and self.first:
            self.first = False
            warn_of_hooks(dict(zip(self.spec.layers, self.layers, strict=True)), self.spec.blocks, self.size)
        self.shards = []
        for scope in self.scopes:  # transformers before 5.23 checkpoints outside of the layer's forward
            scope.adopt_checkpoint_function()

    def finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Output hook of the stack: hidden states in its output are all-gathered.

        Raises:
            UnsupportedError: the hidden states that it returns are still shards.
        """
        length, self.length, self.records = self.length, None, None
        shards, self.shards = self.shards, []
        if length is None or output is None:
            return output
        if not self.ended:
            raise UnsupportedError(
                f"sequence_parallel=True: {self.spec.tail}, which returns the full sequence, was not called in this "
                f"forward of {type(module).__name__}. Call all layers (layerdrop=0 in the model's config), or use "
                "sequence_parallel=False."
            )
        # By identity: an output that the model computed from a shard is not all-gathered.
        known = {id(x) for x in (ref() for ref in shards) if x is not None}
        return _map_known(output, known, lambda x: gather_sequence(x, self.group, self.rank, self.size, length))

    def forget(self, *_: Any) -> None:
        """Output hook of the model: the head has run."""
        self.tail.clear()

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Input hook of a layer: the first one that is called (LayerDrop may leave some out) scatters."""
        if self.records is None:  # outside of a forward of the stack
            begins = layer is self.layers[0] and torch.is_grad_enabled()
        else:
            begins = self.records and self.length is None
        if begins:
            args, kwargs = self.split_first(args, kwargs)
            if self.records is None:
                self.by_hand = []
        if self.length is None:
            return None
        return args, {**kwargs, LENGTH: self.length}

    def check_ended(self, ends: list[bool], _: torch.Tensor) -> None:
        """Gradient hook of the first layer's output in a call by hand: the full sequence has been gathered since."""
        if not ends:
            raise UnsupportedError(
                f"sequence_parallel=True: {self.spec.layers[0]} was called outside of the model's forward, and its "
                f"sequence shards were never gathered, as {self.spec.tail} does. Call the model, or use "
                f"sequence_parallel=False."
            )

    def enter_tail(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Input hook of the last module on shards: its parameters expect them, also if no layer was called."""
        return self.split_first(args, kwargs) if self.records and self.length is None else None

    def split_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with this rank's sequence shard of the hidden states."""
        x = first_tensor(args, kwargs)
        self.length = x.shape[1]
        shard = split_sequence(x, self.group, self.rank, self.size)
        self.shards.append(weakref.ref(shard))
        return replace_first(args, kwargs, shard)

    def leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Output hook of a layer: remember its output, which the model may return as a hidden state."""
        if self.length is not None:
            states = output[0] if isinstance(output, tuple) else output
            self.shards.append(weakref.ref(states))
            if self.by_hand is not None and layer is self.layers[0] and states.requires_grad:
                states.register_hook(functools.partial(self.check_ended, self.by_hand))

    def gather_tail(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Output hook of the last module on shards."""
        if self.length is None:
            return None
        self.ended = True
        if self.by_hand is not None:
            self.by_hand.append(True)

        def gather(shard: torch.Tensor) -> torch.Tensor:
            full = gather_sequence(shard, self.group, self.rank, self.size, self.length)  # type: ignore[arg-type]
            self.tail.gathered = (shard, full)
            return full

        return map_tensor(output, gather)


def _map_known(value: Any, known: set[int], function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Replace the tensors in ``value`` (nested outputs of a model) whose ids are ``known``."""
    if isinstance(value, torch.Tensor):
        return function(value) if id(value) in known else value
    if isinstance(value, dict):
        for key, item in list(value.items()):
            new = _map_known(item, known, function)
            if new is not item:
                value[key] = new
        return value
    if type(value) in (tuple, list):
        items = [_map_known(item, known, function) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
