"""Sequence parallelism at run time: the hidden states between the blocks of a layer are this rank's share of the
sequence.

Norms, dropout and residuals work on shares. A *block* (attention, MLP) works on the whole sequence, exactly as under
tensor parallelism alone: its input is gathered on the way in, its output is split on the way out. Two shortcuts make
this cost what tensor parallelism alone costs (Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2), and change no
value: a column-wise layer that reads the gathered input needs no all-reduce in backward, since a reduce-scatter does
both; a row-wise layer whose output leaves the block needs no all-reduce in forward, for the same reason.

Active in forwards that record gradients. In all others (evaluation, generation with a cache) nothing is split, because
there are no saved activations to save; then the model is tensor parallel only.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..core.sharding_spec import SequenceBlock, SequenceSpec
from ..errors import UnsupportedError
from ..plan.analysis.sequence_parallel import recomputes_anyway
from .boundary_hooks import CopyInput, ReduceOutput, SharedInputs, first_tensor, map_tensor, replace_first
from .collectives import (
    copy_to_tp,
    gather_sequence,
    is_gathered,
    is_watched,
    partial_view,
    scatter_sequence,
    split_sequence,
    watched_view,
)
from .dropout_rng import TPRngTracker
from .local_parameters import LocalParamForward
from .saved_shards import SavedShards, same_storage, saving_shards
from .sequence_guards import note_version, refuse_changed, warn_of_hooks

logger = logging.getLogger(__name__)

#: Keyword with which a layer or a block is told the length of the whole sequence. It travels with the call, so that a
#: checkpoint recomputes with the length of its own forward, and a compiled layer takes it as an input.
LENGTH = "sequence_length"


class SharedSequence(SharedInputs):
    """The memory of one layer: what is gathered already, and how long the whole sequence is.

    Attributes:
        length: tokens of the whole sequence while the layer runs on shares, else None.
        gathered: (share, whole) pairs; two blocks that read the same activation share one all-gather.
        again: under ``sequence_parallel_regather``, (whole, its version, how to gather it again) of a layer that is not
            compiled.
    """

    def __init__(self, axis: DeviceMesh, regather: bool = False) -> None:
        super().__init__()
        self.group, self.rank, self.size = axis.get_group(), axis.get_local_rank(), axis.size()
        self.regather = regather
        self.again: list[tuple[torch.Tensor, int, SavedShards]] = []
        self.length: int | None = None
        self.gathered: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.numbers: TPRngTracker | None = None

    def run(self, length: int | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``, which works on shares of a sequence of ``length``, with random numbers of this rank's
        own.
        """
        around, self.length = self.length, length
        self.draw_own()
        try:
            if self.regather:
                if not torch.compiler.is_compiling():
                    with saving_shards(self.source_of):
                        return function(*args, **kwargs)
                if not self.told_compiler:
                    _warn_of_foreign_compilation()
            return function(*args, **kwargs)
        finally:
            self.draw_common()
            self.length = around
            if around is None:
                self.clear()

    def resumed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.draw_common()  # so that the checkpoint keeps, and its recomputation starts from, the common random state
        return functools.partial(self.run, self.length, function)

    def draw_own(self) -> None:
        """Draw this rank's own random numbers from here on: activations are shares."""
        if self.numbers is not None:
            self.numbers.enter()

    def draw_common(self) -> None:
        """Draw the random numbers that all ranks share from here on: activations are whole."""
        if self.numbers is not None:
            self.numbers.leave()

    def gather(self, share: torch.Tensor, writes: bool = False) -> torch.Tensor:
        """The whole sequence ``(batch, length, ...)`` of ``share``. Its gradient has to be complete on every rank.

        With ``writes``, the caller changes it in place: it gets one of its own, and takes no shortcut past its own
        history.
        """
        for known, whole in self.gathered:
            if known is share and not writes:
                return whole
        length: int = self.length  # type: ignore[assignment]
        if share.ndim == 2:  # a flat list of tokens; no shortcut, since what is gathered is then a view
            tokens = -(-length // self.size)
            share = share.reshape(-1, tokens, share.shape[1])
            whole = gather_sequence(share, self.group, self.rank, self.size, length)
            self.note(share, whole, length)
            return whole.flatten(0, 1)
        whole = gather_sequence(share, self.group, self.rank, self.size, length)
        if not writes:
            self.gathered.append((share, whole))
            if torch.compiler.is_compiling():
                note_version(whole)
        self.note(share, whole, length)
        return whole

    def note(self, share: torch.Tensor, whole: torch.Tensor, length: int) -> None:
        """Remember how ``whole`` is gathered again."""
        if not self.regather or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return

        def gather(share: torch.Tensor) -> torch.Tensor:
            return gather_sequence(share, self.group, self.rank, self.size, length)

        self.again.append((whole, compat.version_of(whole), SavedShards(share, gather)))

    def source_of(self, tensor: torch.Tensor) -> SavedShards | None:
        """How ``tensor`` is gathered again, None if it is nothing that was gathered, or has been changed in place
        since.
        """
        for whole, version, source in self.again:
            if same_storage(tensor, whole):
                return source if compat.version_of(whole) == version else None
        return None

    def split(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's share of ``whole``, ``(batch, length, ...)`` or, flat, ``(batch * length, width)``."""
        if whole.ndim == 2:
            whole = whole.reshape(-1, self.length, whole.shape[1])  # type: ignore[arg-type]
            return split_sequence(whole, self.group, self.rank, self.size).flatten(0, 1)
        return split_sequence(whole, self.group, self.rank, self.size)

    def copy(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """A column-wise consumer of a gathered activation gives its part of the gradient straight to the share."""
        for _share, whole in self.gathered:
            if whole is x and torch.compiler.is_compiling():
                refuse_changed(whole)
        known = self.copied(x)
        if known is not None:
            return known
        for share, whole in self.gathered:
            if whole is x and _is_unchanged(whole) and (torch.compiler.is_compiling() or not is_watched(whole)):
                return self.remember(x, partial_view(share, whole, self.group, self.size))
        return super().copy(x, group)

    def clear(self) -> None:
        super().clear()
        self.gathered.clear()
        self.again.clear()


@torch.compiler.assume_constant_result  # called once while the compiler traces, and no part of the graph
def _warn_of_foreign_compilation() -> bool:
    if not _warned:
        _warned.append(True)
        logger.warning(
            "sequence_parallel_regather=True has no effect: this model was compiled as a whole, after prepare, where "
            "nothing tells the compiler what to gather again. Results are right. Compile with compile=True in "
            "AutoParallelismConfig or with torch_compile=True in TrainingArguments instead of torch.compile(model)."
        )
    return True


_warned: list[bool] = []


class TailInputs(SharedInputs):
    """The memory for what follows the layers: the head reads the gathered hidden states, perhaps through a view of
    them.
    """

    def __init__(self, axis: DeviceMesh) -> None:
        super().__init__()
        self.size = axis.size()
        self.gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    def copy(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        if self.gathered is not None and torch.is_grad_enabled() and _is_unchanged(self.gathered[1]):
            share, whole = self.gathered
            if torch.compiler.is_compiling():
                return partial_view(share, x, group, self.size) if x is whole else copy_to_tp(x, group)
            # The head usually reads hidden_states[:, slice(0, None)]: another object, the same values and history.
            if (x is whole or _is_plain_view(x, whole)) and not (is_watched(x) or is_watched(whole)):
                return watched_view(share, whole, x, group, self.size)
        return copy_to_tp(x, group)

    def clear(self) -> None:
        super().clear()
        self.gathered = None


def _is_unchanged(whole: torch.Tensor) -> bool:
    """False if the model has written into what was gathered: it has another history since, which leads elsewhere.

    While the compiler traces, :func:`refuse_changed` asks the same.
    """
    return torch.compiler.is_compiling() or whole.grad_fn is None or is_gathered(whole)


def _is_plain_view(x: torch.Tensor, whole: torch.Tensor) -> bool:
    """True if ``x`` is all of ``whole``, and no function with a backward of its own (a scaled gradient) lies
    between.
    """
    place, same = ((t.shape, t.stride(), t.dtype, t.data_ptr()) for t in (x, whole))
    return place == same and x.numel() > 0 and compat.is_view_of(x, whole)


class ScatterOutput(ReduceOutput):
    """Hook of a row-wise layer that ends a block: sum the ranks' outputs, each rank keeps its share, then add the
    bias.
    """

    def __init__(self, group: dist.ProcessGroup, bias_owner: nn.Module | None) -> None:
        super().__init__(group, bias_owner)
        self.shared: SharedSequence | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared
        if shared is None or shared.length is None:
            return super().reduce(x)
        share = scatter_sequence(x, shared.group, shared.size)
        shared.draw_own()  # what follows, up to the end of the block, works on shares
        return share


class LayerForward:
    """The forward of a layer on shares: told the length, it tells the boundaries inside."""

    def __init__(self, layer: nn.Module) -> None:
        self.inner: Callable[..., Any] = layer.forward
        self.shared: SharedSequence | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        length = kwargs.pop(LENGTH, None)
        if length is None:
            return self.inner(*args, **kwargs)
        # Inside of the checkpoint, if there is one: its recomputation starts from the common random state again.
        return self.shared.run(length, self.inner, *args, **kwargs)  # type: ignore[union-attr]


class BlockForward:
    """The forward of a block: whole inside, shares outside.

    The hooks :meth:`before` and :meth:`after` stay outside of a checkpoint around the block, which therefore keeps the
    share and gathers once more in its recomputation.
    """

    def __init__(self, block: nn.Module, spec: SequenceBlock) -> None:
        self.inner: Callable[..., Any] = block.forward
        self.spec = spec
        self.shared: SharedSequence | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: replicated from here on, so the ranks draw their common random numbers."""
        if self.shared is None or self.shared.length is None:
            return None
        self.shared.draw_common()
        return args, {**kwargs, LENGTH: self.shared.length}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: on shares from here on."""
        if self.shared is not None and self.shared.length is not None:
            self.shared.draw_own()

    def call(self, *args: Any, **kwargs: Any) -> Any:
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
    """A block that is one projection: its own boundary is a hook, so gathering has to come before that hook."""

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
    """All that sequence parallelism puts on one model.

    Args:
        model: the model, before FSDP2.
        spec: where to split and gather.
        mesh: the tp axis.
        boundaries: names of the modules that own a boundary of tensor parallelism.
    """

    def __init__(self, model: nn.Module, spec: SequenceSpec, mesh: DeviceMesh, boundaries: set[str]) -> None:
        self.spec, self.mesh = spec, mesh
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.tail = TailInputs(mesh)
        self.length: int | None = None
        self.records: bool | None = None  # does the running forward of the stack record gradients; None outside of one
        self.ended = False  # the running forward has gathered what the layers returned
        self.shares: list[weakref.ref[torch.Tensor]] = []
        self.members: dict[str, Any] = {}
        self.regions: list[LocalParamForward] = []
        self.numbers: TPRngTracker | None = None
        self.first = True
        self.layers = [model.get_submodule(name) for name in spec.layers]

        stack = model.get_submodule(spec.stack)
        stack.register_forward_pre_hook(self.begin)
        stack.register_forward_hook(self.finish, always_call=True)
        model.register_forward_hook(self.forget, always_call=True)
        for name, layer in zip(spec.layers, self.layers, strict=True):
            forward = LayerForward(layer)
            layer.forward = forward.call  # type: ignore[method-assign]
            self.members[name] = forward
            layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True)
            layer.register_forward_hook(self.leave_layer)
        for name, block_spec in spec.blocks.items():
            block = model.get_submodule(name)
            if name in boundaries:
                around: BlockForward = BoundaryBlock(block, block_spec)
                block.register_forward_pre_hook(around.before, with_kwargs=True, prepend=True)
                block.register_forward_hook(around.after)
            else:
                around = BlockForward(block, block_spec)
                block.forward = around.call  # type: ignore[method-assign]
                block.register_forward_pre_hook(around.before, with_kwargs=True)
                block.register_forward_hook(around.after)
            self.members[f"{name}:block"] = around
        tail = model.get_submodule(spec.tail)
        if tail not in self.layers:
            tail.register_forward_pre_hook(self.enter_tail, with_kwargs=True)
        tail.register_forward_hook(self.gather_tail)

    # ---- wiring ------------------------------------------------------------------------------------------------------

    def add(self, name: str, scatter: ScatterOutput) -> None:
        """Register the boundary of the row-wise layer ``name``."""
        self.members[name] = scatter

    def memory(self, layer: str) -> SharedInputs:
        """The memory for the region ``layer``, made known to the boundaries inside."""
        if layer not in self.spec.layers:
            return SharedInputs()
        shared = SharedSequence(self.mesh, self.spec.regather)
        shared.numbers = self.numbers
        for name, member in self.members.items():
            if name == layer or name.startswith(f"{layer}."):
                member.shared = shared
        return shared

    def complete(self, regions: dict[nn.Module, LocalParamForward], others: list[CopyInput]) -> None:
        """Called when all regions are there, with the column-wise layers outside of them.

        Raises:
            UnsupportedError: a layer is no region of its own.
        """
        for name, layer in zip(self.spec.layers, self.layers, strict=True):
            if layer not in regions or self.members[name].shared is None:
                raise UnsupportedError(
                    f"sequence_parallel=True: {name} is no FSDP2 unit of its own, because another unit lies inside of "
                    f"it. Use sequence_parallel=False or a wrap policy that names whole layers."
                )
        self.regions = [regions[layer] for layer in self.layers]
        for region in regions.values():
            self.tell(region)
        for copy in others:
            copy.shared = self.tail

    def tell(self, region: LocalParamForward) -> None:
        """Let ``region`` know which calls work on shares."""
        region.on_sequence_shards = functools.partial(self.on_sequence_shards, region.shared)

    def on_sequence_shards(self, shared: SharedInputs | None, kwargs: dict[str, Any]) -> bool:
        """Does a call of a module with these arguments work on shares? ``shared`` is the memory of its region."""
        if shared is None:  # outside of the layers
            return self.length is not None
        return LENGTH in kwargs or shared.length is not None

    # ---- one forward -------------------------------------------------------------------------------------------------

    def begin(self, *_: Any) -> None:
        """Pre-hook of the stack: this forward works on shares if it records gradients."""
        self.forget()
        own = any(getattr(layer, "gradient_checkpointing", False) and layer.training for layer in self.layers)
        if own and torch.is_grad_enabled() and compat.checkpoints_around_calls():
            raise UnsupportedError(
                "sequence_parallel=True with the model's own gradient checkpointing needs transformers 5.23 or later: "
                "the installed one recomputes around the layer, where the length of the sequence is not known any "
                "more. Use activation_checkpointing='full' in AutoParallelismConfig instead."
            )
        if own and torch.is_grad_enabled() and self.spec.regather:
            raise recomputes_anyway("the model's own gradient checkpointing")
        self.records, self.length, self.ended = torch.is_grad_enabled(), None, False
        if self.records and self.first:
            self.first = False
            warn_of_hooks(dict(zip(self.spec.layers, self.layers, strict=True)), self.spec.blocks, self.size)
        self.shares = []
        for region in self.regions:  # transformers before 5.23 checkpoints outside of the layer's forward
            region.adopt_checkpoint_function()

    def finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook of the stack: recorded hidden states become whole.

        Raises:
            UnsupportedError: the hidden states that it returns are not whole.
        """
        length, self.length, self.records = self.length, None, None
        shares, self.shares = self.shares, []
        if length is None or output is None:
            return output
        if not self.ended:
            raise UnsupportedError(
                f"sequence_parallel=True: {self.spec.tail}, which returns the whole sequence, was not called in this "
                f"forward of {type(module).__name__}. Call all layers (layerdrop=0 in the model's config), or use "
                "sequence_parallel=False."
            )
        known = {id(x) for x in (ref() for ref in shares) if x is not None}
        return _map_known(output, known, lambda x: gather_sequence(x, self.group, self.rank, self.size, length))

    def forget(self, *_: Any) -> None:
        """Hook of the model: the head has run."""
        self.tail.clear()

    def enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of a layer: the first one that is called (LayerDrop may leave some out) splits."""
        if self.records is None:  # outside of a forward of the stack
            begins = layer is self.layers[0] and torch.is_grad_enabled()
        else:
            begins = self.records and self.length is None
        if begins:
            args, kwargs = self.split_first(args, kwargs)
        if self.length is None:
            return None
        return args, {**kwargs, LENGTH: self.length}

    def enter_tail(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the last module on shares: its parameters expect them, also if no layer was called."""
        return self.split_first(args, kwargs) if self.records and self.length is None else None

    def split_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with hidden states that are whole -> with this rank's share of them."""
        x = first_tensor(args, kwargs)
        self.length = x.shape[1]
        share = split_sequence(x, self.group, self.rank, self.size)
        self.shares.append(weakref.ref(share))
        return replace_first(args, kwargs, share)

    def leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Hook of a layer: remember its output, which somebody may have recorded."""
        if self.length is not None:
            self.shares.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    def gather_tail(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook of the last module on shares."""
        if self.length is None:
            return None
        self.ended = True

        def gather(share: torch.Tensor) -> torch.Tensor:
            whole = gather_sequence(share, self.group, self.rank, self.size, self.length)  # type: ignore[arg-type]
            self.tail.gathered = (share, whole)
            return whole

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
