"""Search for a plan on a tiny proxy model: for each group of layers, the best variant that matches one process."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import compat
from ..core.sharding_spec import Plan, PlanEntry
from ..errors import AutoParallelError, PlanError, without_stop
from ..plan.validate import config_with_heads, counted_heads
from .candidates import Group, Observed, Variant, pattern_of
from .carried_modules import copy_model, once_per_kind, proxy_with_replaced_modules
from .parity_check import ParityCheck
from .proxy_model import HEADS, LONGER, build_proxy_model

logger = logging.getLogger(__name__)

SOURCE = "derived and verified on a tiny proxy model"
_RANKS = 2


@dataclass
class _Draft:
    styles: dict[str, str] = field(default_factory=dict)
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    gathered: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def with_variant(self, variant: Variant) -> _Draft:
        return _Draft(
            self.styles | variant.styles,
            self.counts | variant.counts,
            self.head_arguments | variant.head_arguments,
            self.gathered + ([] if variant.inside else list(variant.styles)),
            self.left_out,
        )

    def plan(self, notes: tuple[str, ...] = ()) -> Plan:
        entries = {pattern: PlanEntry(pattern, style, SOURCE) for pattern, style in self.styles.items()}
        return Plan("derived", entries, notes=notes, counts=self.counts, head_arguments=self.head_arguments)


# A failed search is kept as its message, because searching again would take as long.
_KNOWN: dict[Any, Plan | str] = {}


def derived_plan(model: nn.Module, tp_size: int | None = None) -> Plan:
    """A plan for ``model`` that was verified on a tiny proxy model, in this process and without communication.

    It depends on class and config only, so it is the same on every rank. A process searches once per class and config.

    Args:
        model: the model, unwrapped, on any device including meta. Only its class and its config are used.
        tp_size: number of tp ranks, if known; attention is not sharded by heads if it does not divide the heads.

    Returns:
        The plan, with a note for each layer that stays replicated, and the reason.

    Raises:
        PlanError: there is no proxy model, or none of its layers can be sharded; with the reason.
    """
    by_heads = _heads_divide(model, tp_size)
    return once_per_kind(_KNOWN, model, lambda: by_heads, lambda: _search(model, by_heads))


def _heads_divide(model: nn.Module, tp_size: int | None) -> bool:
    config = config_with_heads(model)
    return tp_size is None or config is None or all(count % tp_size == 0 for count in counted_heads(config).values())


def _search(model: nn.Module, by_heads: bool) -> Plan:
    started = time.monotonic()
    try:
        small = proxy_with_replaced_modules(model)
    except PlanError:  # modules that cannot be made small; prepare runs them on fake tensors
        small = build_proxy_model(model)
    try:
        check = ParityCheck(small, _RANKS)
        observed = Observed(copy_model(small), check.inputs)
    except AutoParallelError:
        raise
    except Exception as error:  # code of the model, which may raise any error
        raise PlanError(
            f"a tiny proxy model of {type(model).__name__} cannot be run: {type(error).__name__}: "
            f"{without_stop(error)}."
        ) from error
    # Greedy: a group that is verified stays in the draft. The entire plan is checked at the end.
    draft = _Draft()
    for group in observed.groups:
        draft = _with_group(draft, group, observed, check, by_heads)
    if not draft.styles:
        raise PlanError(
            f"no linear layer of {type(model).__name__} computes the same when it is sharded"
            + "".join(f"; {name}: {reason}" for name, reason in list(draft.left_out.items())[:2])
        )
    draft = _with_ends(draft, small, check)
    failure = _entire_plan_failure(draft.plan(), small, check)
    if failure is not None:
        raise PlanError(
            f"the derived plan of {type(model).__name__} does not compute the same on a tiny proxy model: {failure}."
        )
    seconds = time.monotonic() - started
    notes = [
        f"derived in {seconds:.1f} s; outputs and every gradient of a tiny proxy model are equal on {_RANKS} ranks."
    ]
    if draft.gathered:
        notes.append(
            f"{', '.join(draft.gathered)}: each sharded on its own, the activations between them are replicated."
        )
    notes += [f"{name}: replicated ({reason})." for name, reason in draft.left_out.items()]
    return draft.plan(tuple(notes))


def _entire_plan_failure(plan: Plan, small: nn.Module, check: ParityCheck) -> str | None:
    """The first difference of the entire plan, also on sequences longer than windows and chunks; None if equal."""
    failure = check.failure(plan)
    if failure is not None:
        return failure
    try:
        longer = ParityCheck(small, _RANKS, LONGER)
        if _shapes(longer.inputs) == _shapes(check.inputs):
            return None  # images have the size that the config names
    except AutoParallelError:
        raise
    except Exception as error:  # code of the model
        return f"on {LONGER} tokens, {type(error).__name__}: {error}"
    return longer.failure(plan)


def _shapes(inputs: dict[str, Any]) -> list[Any]:
    return [getattr(value, "shape", value) for value in inputs.values()]


def _with_group(draft: _Draft, group: Group, observed: Observed, check: ParityCheck, by_heads: bool) -> _Draft:
    if any(pattern in draft.styles for pattern in (*group.columns, group.row)):
        return draft
    reason = ""
    for variant in observed.variants(group):
        if variant.inside and not by_heads and (variant.counts or _has_heads(observed, group)):
            reason = "its heads do not divide"
            continue
        candidate = draft.with_variant(variant)
        failure = check.failure(_only(variant).plan())
        # Groups below one module may change the same head counts, so check them together.
        if failure is None and len(draft.styles) and set(variant.counts) & set(draft.counts):
            failure = check.failure(candidate.plan())
        if failure is None:
            return candidate
        reason = reason or failure
    draft.left_out |= dict.fromkeys((*group.columns, *filter(None, [group.row])), reason)
    return draft


def _only(variant: Variant) -> _Draft:
    return _Draft().with_variant(variant)


def _has_heads(observed: Observed, group: Group) -> bool:
    """True if the parent module of the columns has an attribute that may count heads."""
    for name, module in observed.model.named_modules():
        if pattern_of(name) == group.columns[0].rpartition(".")[0]:
            return any("head" in k and isinstance(v, int) and v in (HEADS, 1, 2) for k, v in vars(module).items())
    return False


def _with_ends(draft: _Draft, model: nn.Module, check: ParityCheck) -> _Draft:
    """Add input embedding and output projection, sharded over the vocabulary: both, else one of them, if verified."""
    ends: dict[str, str] = {}
    embedding, head = compat.input_embedding_module(model), compat.lm_head_module(model)
    for name, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            ends[name] = "embedding_rowwise"
        elif module is head and isinstance(module, nn.Linear):
            ends[name] = "colwise_gather_output"
    for chosen in (ends, *({name: style} for name, style in ends.items())):
        candidate = _Draft(draft.styles | chosen, draft.counts, draft.head_arguments, draft.gathered, draft.left_out)
        if chosen and check.failure(candidate.plan()) is None:
            return candidate
    return draft
