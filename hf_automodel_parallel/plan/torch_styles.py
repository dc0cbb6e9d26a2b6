"""Plans with torch's ``ParallelStyle`` objects: read as style names where both mean the same.

This package's own engine runs on style names, with which adapters, losses and FSDP2 work. A style object that no name
can express runs on torch's engine. So does a subclass, since its methods may do anything. Objects and dicts of the
caller are only read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from .. import compat
from ..core.sharding_spec import Plan, PlanEntry
from ..errors import PlanError
from .layer_kinds import as_matrix, expand_wrappers
from .styles import is_style_name

_REPLICATE, _FEATURES, _SEQUENCE = (Replicate(),), (Shard(-1),), (Shard(1),)


def check_sequence_layouts(plan: Plan, sequence_parallel: bool) -> None:
    """Refuse layouts along the sequence (``Shard(1)``, ``SequenceParallel``) in ``plan`` while sequence parallelism is
    off.

    While it is on, such layouts are ignored: sequence parallelism is derived from the plan, for the entire model.

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
        if _style_name(entry.style) is None:
            notes[entry.pattern, style] = f"{entry.pattern}: {entry.style_name} is read as {style!r}."
    return result, list(notes.values())


#: Attribute of a class whose objects stand for the name in their ``style_name``.
STANDS_FOR_NAME = "_stands_for_style_name"


def _style_name(style: Any) -> str | None:
    """The style name that an object stands for, as the reference API's plans have them."""
    # Of the class itself: a user's subclass may apply itself in another way, so it runs on torch's engine.
    if not vars(type(style)).get(STANDS_FOR_NAME, False):
        return None
    return style.style_name if is_style_name(style.style_name) else None


class _Reader:
    def __init__(
        self, matches: dict[str, PlanEntry], modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
    ) -> None:
        self.matches, self.modules, self.parameters = matches, modules, parameters

    def name_of(self, name: str, entry: PlanEntry) -> str | None:
        """The style name for the module or parameter ``name``, None if its style has to run on torch's engine."""
        style = entry.style
        if (known := _style_name(style)) is not None:
            return known
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
        """The layer at ``name``, without PEFT's wrapper around it."""
        _, module = next(iter(expand_wrappers(name, self.modules[name])))
        tuner = compat.peft_tuner_layer_type()
        while tuner is not None and isinstance(module, tuner):
            module = module.base_layer  # type: ignore[assignment]
        return module

    # ---- one method per class of torch ---------------------------------------------------------------------------

    def colwise(self, name: str, entry: PlanEntry) -> str | None:
        style, layer = entry.style, self.layer(name)
        if isinstance(layer, nn.Embedding):
            whole = style.output_layouts == _REPLICATE or (
                style.output_layouts == _FEATURES and not style.use_local_output
            )
            return "embedding_colwise" if whole and style.input_layouts == _REPLICATE else None
        self._check_matrix(name, entry, layer)
        if style.input_layouts not in (_REPLICATE, _SEQUENCE):
            return None
        if style.output_layouts == _REPLICATE:
            return "colwise_gather_output"
        if style.output_layouts != _FEATURES:
            return None
        # A DTensor is read as the full tensor. A local slice can replace it only if a row-wise layer reads it.
        return "colwise" if style.use_local_output or self._are_halves_of_pairs(name) else "colwise_gather_output"

    def rowwise(self, name: str, entry: PlanEntry) -> str | None:
        style, layer = entry.style, self.layer(name)
        outputs = (_REPLICATE, _SEQUENCE)
        if isinstance(layer, nn.Embedding):
            if style.input_layouts == _FEATURES:
                raise PlanError(
                    f"the plan entry {entry.pattern!r} says that the token ids for the embedding {name} are sharded "
                    "over tp (the default of RowwiseParallel), but every rank has them all. Use "
                    "RowwiseParallel(input_layouts=Replicate())."
                )
            return (
                "embedding_rowwise" if style.input_layouts == _REPLICATE and style.output_layouts in outputs else None
            )
        self._check_matrix(name, entry, layer)
        if style.output_layouts not in outputs:
            return None
        if style.input_layouts == _REPLICATE or (
            style.input_layouts == _FEATURES and self._reads_a_gathered_sibling(name)
        ):
            return "rowwise_split_input"
        return "rowwise" if style.input_layouts == _FEATURES else None

    def sequence(self, name: str, entry: PlanEntry) -> str | None:
        return "replicate" if entry.style.sequence_sharding == _SEQUENCE else None

    def prepared(self, name: str, entry: PlanEntry) -> str | None:
        """Replicated inputs and outputs need no hook between plain tensors; a ``Partial`` output is all-reduced."""
        pairs = _layout_pairs(entry.style)
        if all(pair <= {Replicate(), Shard(1), None} for pair in map(set, pairs)):
            return "replicate"
        if type(entry.style) is PrepareModuleOutput and pairs == [(Partial(), Replicate())]:
            return "all_reduce"
        return None

    # ---- layers with the same parent -----------------------------------------------------------------------------

    def _siblings(self, name: str, kind: type) -> list[str]:
        parent = name.rpartition(".")[0]
        return [
            other
            for other, entry in self.matches.items()
            if type(entry.style) is kind and other.rpartition(".")[0] == parent and other in self.modules
        ]

    def _are_halves_of_pairs(self, name: str) -> bool:
        """True if a row-wise sibling of ``name`` reads DTensors, and the column-wise siblings that return them can be
        sharded like its input features. ``name`` itself may be one of them.

        The number of input features must be a multiple of the output features of each: equal for gate, up and query,
        a multiple for keys and values of grouped heads. More output features mean several projections in one matrix;
        a contiguous shard of it would not be the shard that a rank needs.
        """
        readers = [n for n in self._siblings(name, RowwiseParallel) if self._style(n).input_layouts == _FEATURES]
        read = {self._features(reader, "in") for reader in readers}
        own = {self._features(other, "out") for other in self._dtensor_siblings(name)}
        return bool(read) and all(r is not None and o is not None and r % o == 0 for r in read for o in own)

    def _reads_a_gathered_sibling(self, name: str) -> bool:
        """True if ``name`` reads the output of a column-wise sibling that is all-gathered in this plan."""
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
