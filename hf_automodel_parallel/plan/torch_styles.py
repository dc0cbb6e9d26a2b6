"""Style names and torch's ``ParallelStyle`` objects: from one to the other, and back.

This package's own engine runs on style names. A plan that comes in as torch styles is read as names where both mean the
same, so that adapters, losses and FSDP2 work with it; what a name cannot say runs on torch's engine. A subclass, whose
code nobody but its author knows, always runs there. Objects and dicts of the caller are only read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from .. import compat
from ..core.sharding_spec import Plan, PlanEntry
from ..errors import PlanAssertionError, PlanError, UnsupportedError
from .layer_kinds import as_matrix, expand_wrappers
from .styles import KNOWN_STYLES, REFUSED_STYLES, check_style

_WHOLE, _FEATURES, _SEQUENCE = (Replicate(),), (Shard(-1),), (Shard(1),)


class NamedStyle(ParallelStyle):
    """A style name that none of torch's own styles can express, as an object that may stand in a dict of them.

    In a plan for this package it is the name. torch's ``parallelize_module`` can carry out those that leave the
    parameters whole; of the others it says that it cannot.

    Attributes:
        style_name: one of the names of :mod:`styles`, or one that was registered with transformers.
    """

    def __init__(self, name: str) -> None:
        check_style("NamedStyle", name)
        self.style_name = name

    def __repr__(self) -> str:
        return f"NamedStyle({self.style_name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedStyle) and other.style_name == self.style_name

    def __hash__(self) -> int:
        return hash((NamedStyle, self.style_name))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Called by ``parallelize_module``.

        Raises:
            UnsupportedError: torch's engine cannot carry out this style.
        """
        if self.style_name == "replicated_with_grad_allreduce":
            from ..tensor_parallel.grad_sync import sum_gradients

            sum_gradients(module, device_mesh)
        elif self.style_name not in ("replicate", "local_params"):
            raise UnsupportedError(
                f"the style {self.style_name!r} has no counterpart in torch.distributed.tensor.parallel, so "
                "parallelize_module cannot apply it. Pass the plan to this package (tp_plan / tp_shard_plan), whose "
                "own engine can."
            )
        return module


def translate_to_torch_parallel_style(style: str) -> ParallelStyle:
    """The torch style that means the same as a style name of transformers' ``_tp_plan``; a new object at each call.

    The names are those of :data:`styles.KNOWN_STYLES`, ``sequence_parallel``, and what a user has registered with
    transformers. Those without a counterpart in torch become a :class:`NamedStyle`, among them
    ``replicated_with_grad_allreduce``, whose partial gradients (``q_norm``, ``k_norm``) would be wrong if it were left
    out. A gathered output is returned whole, as a plain
    tensor: models compute their losses from it.

    Raises:
        PlanAssertionError: (an AssertionError, too) ``style`` is no string.
        PlanError: the name is unknown, or of expert parallelism.
    """
    if not isinstance(style, str):
        raise PlanAssertionError(
            f"a parallel style must be a string, but is {style!r} of type {type(style).__name__}. Known styles: "
            f"{', '.join(KNOWN_STYLES)}."
        )
    if style == "sequence_parallel":
        return SequenceParallel()
    if style in REFUSED_STYLES:
        raise PlanError(f"the style {style!r} cannot be used. {REFUSED_STYLES[style]}")
    if style in ("colwise_gather_output", "colwise_rep", "embedding_colwise"):
        return ColwiseParallel(output_layouts=Replicate())
    if style in ("rowwise_split_input", "rowwise_rep", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=Replicate())
    if style == "colwise":
        return ColwiseParallel()
    if style == "rowwise":
        return RowwiseParallel()
    if style == "all_reduce":
        return PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    if style in KNOWN_STYLES or style in compat.transformers_parallel_styles():
        return NamedStyle(style)
    raise PlanError(f"unknown parallel style {style!r}. Known styles: {', '.join(KNOWN_STYLES)}.")


def check_sequence_layouts(plan: Plan, sequence_parallel: bool) -> None:
    """Refuse layouts along the sequence (``Shard(1)``, ``SequenceParallel``) in ``plan`` while sequence parallelism is
    off.

    Where it is on, they say nothing more: it is derived anew from the plan, for the whole model, so they are dropped
    when the plan is resolved.

    Raises:
        PlanError: the message names the entries.
    """
    along = [entry for entry in plan.entries.values() if _is_along_the_sequence(entry.style)]
    if along and not sequence_parallel:
        raise PlanError(
            f"the plan entries {', '.join(repr(entry.pattern) for entry in along[:4])} shard activations along the "
            f"sequence ({along[0].style!r}), but sequence_parallel=False. Use sequence_parallel=True, or a plan "
            "without such layouts."
        )


def _is_along_the_sequence(style: Any) -> bool:
    if type(style) is SequenceParallel:
        return style.sequence_sharding == _SEQUENCE
    if type(style) is PrepareModuleInputOutput:
        return _is_along_the_sequence(style.prepare_module_input) or _is_along_the_sequence(style.prepare_module_output)
    layouts: list[Any] = []
    if type(style) in (ColwiseParallel, RowwiseParallel, PrepareModuleInput, PrepareModuleOutput):
        for name in ("input_layouts", "output_layouts", "desired_input_layouts", "desired_output_layouts"):
            layouts.extend(getattr(style, name, None) or ())
        for name in ("input_kwarg_layouts", "desired_input_kwarg_layouts"):
            layouts.extend(getattr(style, name, {}).values())
    return Shard(1) in layouts


def read_torch_styles(
    matches: dict[str, PlanEntry], modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, PlanEntry], list[str]]:
    """Replace the torch styles in ``matches`` by style names where a name says the same.

    Layouts along the sequence are dropped here, see :func:`check_sequence_layouts`.

    Args:
        matches: name of a module or parameter -> its plan entry.
        modules: name -> module, at least those that are matched.
        parameters: name -> parameter, at least those that are matched.

    Returns:
        The new matches (entries that need no change are the same objects), and one note per pattern that was read.

    Raises:
        PlanError: a style that torch could not apply to its module either, or that cannot be combined with the entries
            for modules inside of it.
    """
    reader = _Reader(matches, modules, parameters)
    result, notes = dict(matches), {}
    for name, entry in matches.items():
        if isinstance(entry.style, str):
            continue
        style = reader.name_of(name, entry)
        if style is None:
            reader.check_foreign(name, entry)
            continue
        result[name] = replace(entry, style=style)
        if not isinstance(entry.style, NamedStyle):
            notes[entry.pattern, style] = f"{entry.pattern}: {entry.style_name} is read as {style!r}."
    return result, list(notes.values())


class _Reader:
    def __init__(
        self, matches: dict[str, PlanEntry], modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
    ) -> None:
        self.matches, self.modules, self.parameters = matches, modules, parameters

    def name_of(self, name: str, entry: PlanEntry) -> str | None:
        """The style name for the module or parameter ``name``, None if its style has to run on torch's engine."""
        style = entry.style
        if type(style) is NamedStyle:
            return style.style_name
        if type(style) not in _READERS:
            return None
        if name in self.parameters:
            if type(style) in (ColwiseParallel, RowwiseParallel):
                return "colwise" if type(style) is ColwiseParallel else "rowwise"
            raise PlanError(
                f"the plan entry {entry.pattern!r} has the style {entry.style_name}, which is for modules, but {name} "
                f"is a parameter."
            )
        return _READERS[type(style)](self, name, entry)

    def layer(self, name: str) -> nn.Module:
        """The layer at ``name`` without what PEFT put around it."""
        _, module = next(iter(expand_wrappers(name, self.modules[name])))
        tuner = compat.peft_tuner_layer_type()
        while tuner is not None and isinstance(module, tuner):
            module = module.base_layer  # type: ignore[assignment]
        return module

    # ---- one method per class of torch ---------------------------------------------------------------------------

    def colwise(self, name: str, entry: PlanEntry) -> str | None:
        style, layer = entry.style, self.layer(name)
        if isinstance(layer, nn.Embedding):
            whole = style.output_layouts == _WHOLE or (style.output_layouts == _FEATURES and not style.use_local_output)
            return "embedding_colwise" if whole and style.input_layouts == _WHOLE else None
        self._check_matrix(name, entry, layer)
        if style.input_layouts not in (_WHOLE, _SEQUENCE):
            return None
        if style.output_layouts == _WHOLE:
            return "colwise_gather_output"
        if style.output_layouts != _FEATURES:
            return None
        # A DTensor is read as the whole that it stands for, which a slice can only be for the other half of a pair.
        return "colwise" if style.use_local_output or self._are_halves_of_pairs(name) else "colwise_gather_output"

    def rowwise(self, name: str, entry: PlanEntry) -> str | None:
        style, layer = entry.style, self.layer(name)
        outputs = (_WHOLE, _SEQUENCE)
        if isinstance(layer, nn.Embedding):
            if style.input_layouts == _FEATURES:
                raise PlanError(
                    f"the plan entry {entry.pattern!r} says that the token ids for the embedding {name} are sharded "
                    "over tp (the default of RowwiseParallel), but every rank has them all. Use "
                    "RowwiseParallel(input_layouts=Replicate())."
                )
            return "embedding_rowwise" if style.input_layouts == _WHOLE and style.output_layouts in outputs else None
        self._check_matrix(name, entry, layer)
        if style.output_layouts not in outputs:
            return None
        if style.input_layouts == _WHOLE or (style.input_layouts == _FEATURES and self._reads_a_gathered_sibling(name)):
            return "rowwise_split_input"
        return "rowwise" if style.input_layouts == _FEATURES else None

    def sequence(self, name: str, entry: PlanEntry) -> str | None:
        return "replicate" if entry.style.sequence_sharding == _SEQUENCE else None

    def prepared(self, name: str, entry: PlanEntry) -> str | None:
        """Whole activations in, whole activations out: nothing to do between plain tensors; or a sum over the ranks."""
        pairs = _layout_pairs(entry.style)
        if all(pair <= {Replicate(), Shard(1), None} for pair in map(set, pairs)):
            return "replicate"
        if type(entry.style) is PrepareModuleOutput and pairs == [(Partial(), Replicate())]:
            return "all_reduce"
        return None

    # ---- neighbours ----------------------------------------------------------------------------------------------

    def _siblings(self, name: str, kind: type) -> list[str]:
        parent = name.rpartition(".")[0]
        return [
            other
            for other, entry in self.matches.items()
            if type(entry.style) is kind and other.rpartition(".")[0] == parent and other in self.modules
        ]

    def _are_halves_of_pairs(self, name: str) -> bool:
        """True if the column-wise layers beside ``name`` (it may be one) whose DTensors are read by a row-wise one can
        be sharded like the features that it reads.

        Each has as many of them (gate and up, query), or a whole number of times fewer (keys and values of grouped
        heads). More features than that are several projections in one matrix, of which each rank would get other parts
        than it needs.
        """
        readers = [n for n in self._siblings(name, RowwiseParallel) if self._style(n).input_layouts == _FEATURES]
        read = {self._features(reader, "in") for reader in readers}
        own = {self._features(other, "out") for other in self._dtensor_siblings(name)}
        return bool(read) and all(r is not None and o is not None and r % o == 0 for r in read for o in own)

    def _reads_a_gathered_sibling(self, name: str) -> bool:
        """True if the features that ``name`` reads come from a column-wise layer beside it whose DTensor is read
        whole.
        """
        return bool(self._dtensor_siblings(name)) and not self._are_halves_of_pairs(name)

    def _dtensor_siblings(self, name: str) -> list[str]:
        column_wise = self._siblings(name, ColwiseParallel)
        return [
            n for n in column_wise if not self._style(n).use_local_output and self._style(n).output_layouts == _FEATURES
        ]

    def _style(self, name: str) -> Any:
        return self.matches[name].style

    def _features(self, name: str, side: str) -> int | None:
        matrix = as_matrix(self.layer(name), name)
        return None if matrix is None else matrix.size(side)

    # ---- refusals ------------------------------------------------------------------------------------------------

    def _check_matrix(self, name: str, entry: PlanEntry, layer: nn.Module) -> None:
        if as_matrix(layer, name) is None:
            raise PlanError(
                f"the plan entry {entry.pattern!r} has the style {entry.style_name}, which shards linear layers and "
                f"embeddings, but {name} is a {type(layer).__name__}. Name its parameters instead, or use another "
                "style."
            )

    def check_foreign(self, name: str, entry: PlanEntry) -> None:
        """Refuse what would put DTensors of torch's engine into layers that this package runs on local tensors."""
        inside = [other for other in self.matches if other.startswith(f"{name}.")]
        if type(entry.style) in _READERS and inside:
            raise PlanError(
                f"the plan entry {entry.pattern!r} has the style {entry.style!r}, whose layouts only torch's engine "
                f"can carry out, and it would hand DTensors to {inside[0]}, which runs on this package's. Leave the "
                f"entry out: sharded layers take care of their inputs and outputs themselves."
            )


def _layout_pairs(style: Any) -> list[tuple[Any, Any]]:
    """(layout, desired layout) of every input and output that a ``PrepareModule...`` style names."""
    if type(style) is PrepareModuleInputOutput:
        return _layout_pairs(style.prepare_module_input) + _layout_pairs(style.prepare_module_output)
    if type(style) is PrepareModuleOutput:
        return list(zip(style.output_layouts, style.desired_output_layouts))
    pairs = list(zip(style.input_layouts or (), style.desired_input_layouts or ()))
    return pairs + [
        (layout, style.desired_input_kwarg_layouts.get(key)) for key, layout in style.input_kwarg_layouts.items()
    ]


_READERS: dict[type, Any] = {
    ColwiseParallel: _Reader.colwise,
    RowwiseParallel: _Reader.rowwise,
    SequenceParallel: _Reader.sequence,
    PrepareModuleInput: _Reader.prepared,
    PrepareModuleOutput: _Reader.prepared,
    PrepareModuleInputOutput: _Reader.prepared,
}
