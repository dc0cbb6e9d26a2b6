"""A plan is tried by values before it is used, where the model runs code that was not tried with it before.

Shapes and the names of layers do not show what a forward does to heads and features: ALiBi slopes computed from the
tensor's number of heads, a softmax over heads, a norm without weight over all features. So the plan, of whatever
source, runs on a tiny proxy model with the model's own classes: in evaluation and in training mode, on short
sequences and on ones longer than every number that its code compares with. The code of known releases was tried so when
this package was made (:mod:`.proven_record`), and costs nothing here.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..core.model_structure import find_layers
from ..core.model_view import layer_pattern, pattern_regex
from ..core.sharding_spec import Plan, PlanEntry, ShardingSpec
from ..errors import AutoParallelError, PlanError, first_line
from ..plan.analysis.cross_module_reads import cross_module_reads
from .carried_modules import copy_model, once_per_kind, proxy_with_replaced_modules
from .code_origin import RunningCode, is_own, running_code
from .parity_check import ParityCheck, run_once
from .proven_record import is_recorded
from .proxy_model import LENGTH, LONGER

logger = logging.getLogger(__name__)

_RANKS = 2
#: Layers that are tried, the first ones and each kind; a forward may depend on the index of its layer.
_LAYERS = 64
#: The longest sequence that is tried.
_LONGEST = 1024

# A failure is kept as its message. Plan: the one to use.
_KNOWN: dict[Any, Plan | str] = {}


def proven_plan(model: nn.Module, plan: Plan, completed: bool = True) -> Plan:
    """``plan``, if it computes on a tiny proxy model of ``model`` what one process does; else the part that does.

    Without communication, and equal on every rank for equal models. A process tries a plan once per classes and config.

    Args:
        model: the model, unwrapped, on any device including meta. Only its classes and its config are used.
        plan: the selected plan. It is returned as it is if it is derived or recorded as proven, and all code of the
            model comes from a release of the libraries.
        completed: the caller completes the plan by a run on fake tensors, so that is done here too.

    Returns:
        The plan, with a note of what was tried and what was left out or could not be tried.

    Raises:
        PlanError: the user's own plan, or every part of another one, computes something else; with the difference.
    """
    code = running_code(model)
    known = plan.origin == "derived" or (plan.origin != "explicit" and is_recorded(model, plan, code.modules))
    if known and not code.own:
        return plan
    key = code.key()
    return once_per_kind(
        _KNOWN,
        model,
        lambda: None if key is None else (_described(plan), completed, key),
        lambda: _proven(model, plan, code, completed),
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """As in a fresh process: the caller's autocast and gradient mode do not reach the threads of a trial, and a forward
    that draws random numbers does not change those of the run.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield


def _warn(message: str) -> None:
    """Log ``message`` on one rank; all of them find the same."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s", message)


def _release(model: nn.Module) -> str:
    """The package of the class of ``model``, with its version if it has one."""
    package = type(model).__module__.partition(".")[0]
    return f"{package} {getattr(sys.modules.get(package), '__version__', '')}".rstrip()


def _described(plan: Plan) -> tuple[Any, ...]:
    entries = tuple((pattern, entry.style_name) for pattern, entry in plan.entries.items())
    return plan.origin, entries, repr(plan.counts), repr(plan.head_arguments), plan.notes


def _proven(model: nn.Module, plan: Plan, code: RunningCode, completed: bool) -> Plan:
    try:
        with _undisturbed():
            trial = _Trial(model, code, completed)
            found = {layer_pattern(name) for check in trial.checks for name in check.want.outputs}
            plan = replace(plan, kept=tuple(sorted(name for name in found if name.partition(".")[0] != "output")))
            if is_own(type(model).forward):
                plan = replace(plan, tried_arguments=frozenset(name for c in trial.checks for name in c.inputs))
            failure = trial.failure(plan)
    except Exception as error:  # code of the model, which may raise any error
        # Nothing is known then; the shapes and what varies are checked on the model itself.
        note = f"the plan was not tried by values on a tiny proxy model: {first_line(error)}"
        if code.own or plan.origin != "explicit":
            names = ", ".join(list(code.own.values())[:4])
            what = (
                f"code of its own ({names})" if names else f"code of a release that was not tried ({_release(model)})"
            )
            _warn(
                f"{type(model).__name__} runs {what}, and {note.rstrip('.')}. Compare loss and "
                "gradients of the first steps with one process."
            )
        return replace(plan, notes=(*plan.notes, f"{note.rstrip('.')}."))
    if failure is None:
        return replace(plan, notes=(*plan.notes, f"tried by values: equal to one process on {_RANKS} ranks."))
    if plan.strict:
        raise PlanError(
            f"the tp_plan does not compute what one process does: on a tiny proxy model of {type(model).__name__}, "
            f"{failure}. Leave the entries of that part out of the tp_plan, or use tp_size=1."
        )
    with _undisturbed():
        return _held(trial, plan, failure)


class _Trial:
    """Runs of tiny proxy models, unsharded and sharded.

    Args:
        model: the model.
        code: the code that it runs.
        completed: plans are completed first, as ``prepare`` does after its run on fake tensors.

    Raises:
        Exception: there is no proxy model, or it does not run.
    """

    def __init__(self, model: nn.Module, code: RunningCode, completed: bool) -> None:
        self.completed, self.code = completed, code
        self.first = ParityCheck(proxy_with_replaced_modules(model), _RANKS)
        if not _repeats(self.first):
            raise PlanError("its forward draws random numbers in evaluation mode")
        small = self.first.model
        self.reads = {name for names in cross_module_reads(small, find_layers(small)).values() for name in names}
        self.checks = [self.first]
        for length in (_longer_than_numbers(model, small, code), LONGER):
            try:
                self.checks.append(_in_training(small, length))
                if "training" in code.names():  # a branch of its own in evaluation mode
                    self.checks.append(ParityCheck(small, _RANKS, length))
                break
            except AutoParallelError:
                raise
            except Exception:  # code of the model; some have a table of positions, which is small in the proxy
                continue
        if _names_an_index(code):
            large = proxy_with_replaced_modules(model, _LAYERS)
            if len(list(large.modules())) > len(list(small.modules())):
                self.checks.append(_in_training(large, LENGTH))

    def failure(self, plan: Plan) -> str | None:
        """The first difference, or None.

        Raises:
            Exception: the plan cannot be resolved on the proxy model.
        """
        plan = _fitting(plan, self.first.model)
        before = self.first.resolved(plan)
        try:
            after = self.first.resolved(plan, self.completed and plan.origin != "derived")
        except PlanError as error:
            if not plan.strict:
                raise
            return first_line(error)
        if self.code.own and (lost := _sharded(before) - _sharded(after)):
            # prepare would replicate them; perhaps they can be sharded one layer at a time
            return f"{min(lost)} cannot be sharded ({'; '.join(n for n in after.notes if n not in before.notes)[:300]})"
        native = [name for name, module in after.modules.items() if module.native_style is not None]
        if native:
            raise PlanError(f"{native[0]} has a native torch ParallelStyle, which runs in real processes only.")
        self._leave_out_what_others_read(after)
        for check in self.checks:
            spec = after
            if len(check.want.gradients) != len(self.first.want.gradients):
                spec = _completed_alike(check.model, check.resolved(plan), before, after)
            failure = check.difference(spec)
            if failure is not None:
                mode = "training" if check.model.training else "evaluation"
                return f"{failure} in {mode} mode with {check.length} tokens"
        return None

    def _leave_out_what_others_read(self, spec: ShardingSpec) -> None:
        """Replicate parameters that forwards of other modules read: the simulated ranks have no view in full of it."""
        model = self.first.model
        shared = {id(p) for name, p in model.named_parameters() if name in self.reads}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in shared:
                owner = name.rpartition(".")[0]
                spec.modules.pop(owner, None)
                for other in [n for n in spec.parameters if n.rpartition(".")[0] == owner]:
                    del spec.parameters[other]


def _sharded(spec: ShardingSpec) -> set[str]:
    return {layer_pattern(name) for name, place in spec.parameters.items() if place.dim is not None}


def _in_training(small: nn.Module, length: int) -> ParityCheck:
    check = ParityCheck(small, _RANKS, length, training=True, labels=True)
    # Random numbers beside dropout are not drawn alike by the simulated ranks.
    return check if _repeats(check) else ParityCheck(small, _RANKS, length, labels=True)


def _completed_alike(model: nn.Module, spec: ShardingSpec, before: ShardingSpec, after: ShardingSpec) -> ShardingSpec:
    """``spec``, resolved on ``model``, with what :func:`complete` changed on a model with fewer layers of each kind."""
    for table, old, new in (
        (spec.parameters, before.parameters, after.parameters),
        (spec.modules, before.modules, after.modules),
        (spec.head_counts, before.head_counts, after.head_counts),
    ):
        gone = {layer_pattern(name) for name in old} - {layer_pattern(name) for name in new}
        for name in [name for name in table if layer_pattern(name) in gone]:
            del table[name]  # type: ignore[attr-defined]
    changed = {layer_pattern(n): p for n, p in after.parameters.items() if before.parameters.get(n) != p}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if layer_pattern(name) in changed:
            spec.parameters[name] = changed[layer_pattern(name)]
    hooks = {layer_pattern(n): m for n, m in after.modules.items() if before.modules.get(n) != m}
    for name, _ in model.named_modules():
        if layer_pattern(name) in hooks:
            spec.modules[name] = hooks[layer_pattern(name)]
    return spec


def _names_an_index(code: RunningCode) -> bool:
    """True if code of the user's own names the index of a layer."""
    index = re.compile(r"layer_?(idx|id|index|num|i\b)|(?<![a-z])(idx|index|depth)(?![a-z])")
    return any(index.search(name) for name in code.names() if not hasattr(torch.Tensor, name))  # index_add_ is none


def _fitting(plan: Plan, small: nn.Module) -> Plan:
    """``plan`` without entries of single layers that the proxy model does not have."""
    entries = {
        pattern: entry
        for pattern, entry in plan.entries.items()
        if not re.search(r"(^|\.)\d+(\.|$)", pattern) or _exists(small, pattern)
    }
    return replace(plan, entries=entries)


def _exists(model: nn.Module, pattern: str) -> bool:
    regex = pattern_regex(pattern)
    return any(regex.fullmatch(n) for names in (model.named_modules(), model.named_parameters()) for n, _ in names)


def _repeats(check: ParityCheck) -> bool:
    """True if another unsharded run with another random state gives the same outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return run_once(copy_model(check.model), check.inputs).equal(check.want)


def _longer_than_numbers(model: nn.Module, small: nn.Module, code: RunningCode) -> int:
    """A length beyond the numbers up to :data:`_LONGEST` in the proxy's config and in the code of the user's own."""
    numbers = {LONGER, *code.numbers()}
    config: Any = small.config
    pending = [config.to_dict()]
    while pending:
        for value in list(pending.pop().values()):
            if isinstance(value, dict):
                pending.append(value)
            elif type(value) is int:
                numbers.add(value)
    for name in code.own:
        with contextlib.suppress(AttributeError):  # a function of a Python module
            numbers.update(v for v in vars(model.get_submodule(name)).values() if type(v) is int)
    return 1 + max(n for n in numbers if n < _LONGEST)


# ---- the part of a plan that holds -----------------------------------------------------------------------------------

_GATHERED = {
    "colwise": "colwise_gather_output",
    "rowwise": "rowwise_split_input",
}


def _held(trial: _Trial, plan: Plan, failure: str) -> Plan:
    """The blocks of ``plan`` that compute the same: as they are, else each layer gathered on its own, else without."""
    entries: dict[str, PlanEntry] = {}
    notes: list[str] = []
    for block, group in _blocks(plan).items():
        choices = {"": group}
        if all(entry.style in (*_GATHERED, "replicate", "replicated_with_grad_allreduce") for entry in group.values()):
            choices["sharded one layer at a time, with replicated activations between them"] = {
                pattern: replace(entry, style=_GATHERED[entry.style])
                for pattern, entry in group.items()
                if entry.style in _GATHERED
            }
        why, held = "", "replicated"
        for how, chosen in choices.items():
            reason = _failure(trial, replace(plan, entries=entries | chosen))
            why = why or reason or ""
            if reason is None:
                entries, held = entries | chosen, how
                break
        if held:
            notes.append(f"{block}: {held}, because otherwise it does not compute what one process does ({why}).")
    if not any("*" in pattern for pattern in entries):
        raise PlanError(f"it does not compute what one process does on a tiny proxy model: {failure}")
    result = replace(plan, entries=entries, notes=(*plan.notes, *notes))
    for note in notes:
        _warn(f"the {plan.origin} plan, tried by values on a tiny proxy model: {note}")
    return result


def _failure(trial: _Trial, plan: Plan) -> str | None:
    try:
        return trial.failure(plan)
    except Exception as error:  # code of the model
        return first_line(error)


def _blocks(plan: Plan) -> dict[str, dict[str, PlanEntry]]:
    """The entries by the module of a layer that they belong to; an entry outside of the layers is on its own."""
    blocks: dict[str, dict[str, PlanEntry]] = {}
    for pattern, entry in plan.entries.items():
        parts = pattern.split(".")
        index = next((i for i, part in enumerate(parts) if part == "*" or part.isdigit()), None)
        inside = index is not None and index + 2 < len(parts)
        block = ".".join(parts[: index + 2 if inside else index + 1]) if index is not None else pattern
        blocks.setdefault(block, {})[pattern] = entry
    return blocks
