"""Selects the plan of a model: the user's own; else the first usable of Hugging Face, registry, default, derived."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .. import compat
from ..core.importing import import_object
from ..core.model_structure import models_inside
from ..core.model_view import ModelView, pattern_regex, plan_name
from ..core.sharding_spec import Plan, PlanEntry
from ..errors import PlanError, UnsupportedError
from .layer_kinds import as_matrix
from .sources.families import LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME, llama_nemotron_super_plan
from .sources.huggingface import huggingface_plan
from .sources.llama_like import default_plan, llama_like_plan
from .sources.registry import optimized_plan
from .styles import LINEAR_STYLES, check_style

logger = logging.getLogger(__name__)

#: Plans that ``tp_plan`` can name; values are dicts, or functions of the model that return one.
NAMED_PLANS: dict[str, Mapping[str, Any] | Callable[[nn.Module], Mapping[str, Any]]] = {
    "llama": {pattern: entry.style for pattern, entry in llama_like_plan("named").items()},
    LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME: llama_nemotron_super_plan,
}


def register_plan(name: str, plan: Mapping[str, Any] | Callable[[nn.Module], Mapping[str, Any]]) -> None:
    """Make ``plan`` available as ``tp_plan=name`` (also from the command line).

    Args:
        name: a plain name without dots or colons.
        plan: pattern -> style, or a function of the unwrapped model that returns it.

    Raises:
        PlanError: the name is taken or looks like an import path.
    """
    if name in NAMED_PLANS:
        raise PlanError(f"a plan named {name!r} is already registered; choose another name.")
    if not name.isidentifier():
        raise PlanError(f"the plan name {name!r} must be a plain identifier, so that it cannot be an import path.")
    NAMED_PLANS[name] = plan


def select_plan(
    model: nn.Module | ModelView,
    tp_plan: str | Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None,
    plan_order: tuple[str, ...] = ("hf", "registry", "default"),
    tp_size: int | None = None,
    derive: Callable[[nn.Module, int | None], Plan] | None = None,
    prove: Callable[[nn.Module, Plan], Plan] = lambda inner, plan: plan,
) -> Plan:
    """Select the tensor-parallel plan for ``model``.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta.
        tp_plan: the user's own plan: a dict, a callable, a registered name or an import path. If given, no source is
            tried.
        plan_order: sources to try otherwise: "hf", "registry", "default", "derived". A config lists all of them by
            default; the default here leaves out "derived", which takes seconds.
        tp_size: number of ranks on the tp axis, for ``derive``; None: any.
        derive: the function behind "derived": (unwrapped model, tp_size) -> plan. It is an argument because the search
            itself needs plans (:func:`hf_automodel_parallel.plan_search.search.derived_plan`).
        prove: tries a plan by values and returns the part of it that computes what one process does, or raises:
            :func:`hf_automodel_parallel.plan_search.proof.proven_plan`. By default no plan is tried.

    Returns:
        The plan; every entry names its source.

    Raises:
        PlanError: the explicit plan cannot be read, or no source has a usable plan (the message lists the remedies).
    """
    inner = ModelView.of(model).inner
    if tp_plan is not None:
        return prove(inner, _without_head_read_elsewhere(inner, _explicit_plan(inner, tp_plan)))
    parts = models_inside(inner)
    if parts and not _has_plan_of_its_own(inner, plan_order):
        of_parts, reasons = _plan_of_parts(parts, plan_order, tp_size, derive, prove)
        if of_parts is None:
            raise PlanError(_no_plan_message(inner, reasons))
        return of_parts
    reasons = []
    for source in plan_order:
        if source == "derived":
            if derive is None:
                reasons.append("derived: no search was given (the argument derive of select_plan)")
                continue
            try:
                plan = derive(inner, tp_size)
                notes = tuple(f"{reason}; the next source was asked." for reason in reasons)
                plan = replace(plan, notes=notes + plan.notes)
                return prove(inner, _without_head_read_elsewhere(inner, plan))
            except PlanError as error:
                reasons.append(f"{source}: {error}")
                continue
        entries, reason = _from_source(source, inner)
        reason = reason or _linear_style_on_another_module(inner, entries)
        # A plan that cannot be executed, or that computes something else, is skipped here; an explicit one raises.
        if reason is None:
            try:
                for entry in entries.values():
                    check_style(entry.pattern, entry.style)
                notes = tuple(f"{reason}; the next source was asked." for reason in reasons)
                return prove(inner, _without_head_read_elsewhere(inner, Plan(source, entries, notes=notes)))
            except PlanError as error:
                reason = str(error)
        reasons.append(f"{source}: {reason}")
    raise PlanError(_no_plan_message(inner, reasons))


def _linear_style_on_another_module(inner: nn.Module, entries: Mapping[str, PlanEntry]) -> str | None:
    """Why a plan for linear layers does not fit: a projection was replaced by a module of the user's own."""
    modules = dict(inner.named_modules())
    tuner = compat.peft_tuner_layer_type()
    for entry in entries.values():
        style = LINEAR_STYLES.get(entry.style) if isinstance(entry.style, str) else None
        if style is None or style.swap is not None:  # a head of another kind stays replicated
            continue
        matches = pattern_regex(entry.pattern).fullmatch
        for name in filter(matches, modules):
            module: Any = modules[name]
            while tuner is not None and isinstance(module, tuner):
                module = module.base_layer  # type: ignore[attr-defined]
            try:
                linear = is_parametrized(module, "weight") or as_matrix(module, name) is not None
            except UnsupportedError:  # quantised: the error of the plan that is used
                linear = True
            if not linear:
                return f"{name} is a {type(module).__name__} and no linear layer"
    return None


def _has_plan_of_its_own(inner: nn.Module, plan_order: tuple[str, ...]) -> bool:
    """True if a plan names ``inner`` itself: a ``_tp_plan`` of the class or the instance, or one of the registry."""
    declared = compat.tensor_parallel_plan_of_class(type(inner)) or compat.instance_tensor_parallel_plan(inner)
    return bool(declared) or ("registry" in plan_order and not _from_source("registry", inner)[1])


def _plan_of_parts(
    parts: Mapping[str, nn.Module],
    plan_order: tuple[str, ...],
    tp_size: int | None,
    derive: Callable[[nn.Module, int | None], Plan] | None,
    prove: Callable[[nn.Module, Plan], Plan],
) -> tuple[Plan | None, list[str]]:
    """The plans of the models inside of a module, as one; None with the reasons if none of them has a plan.

    Args:
        parts: name -> model.
        plan_order: see :func:`select_plan`.
        tp_size: the same.
        derive: the same.
        prove: the same; each model is tried on its own.
    """
    plans: dict[str, Plan] = {}
    reasons: list[str] = []
    for name, part in parts.items():
        try:
            plans[name] = select_plan(part, None, plan_order, tp_size, derive, prove)
        except PlanError as error:
            reasons.append(f"{name} stays replicated: {error}")
    if not plans:
        return None, reasons
    entries, counts, arguments = {}, {}, {}
    for name, plan in plans.items():
        for pattern, entry in plan.entries.items():
            entries[f"{name}.{pattern}"] = replace(entry, pattern=f"{name}.{pattern}")
        counts.update({f"{name}.{pattern}": value for pattern, value in plan.counts.items()})
        arguments.update({f"{name}.{pattern}": value for pattern, value in plan.head_arguments.items()})
    notes = [f"{name}: {note}" for name, plan in plans.items() for note in plan.notes]
    # "derived" says that all of it was verified.
    origin = min((plan.origin for plan in plans.values()), key=lambda origin: origin == "derived")
    return Plan(origin, entries, notes=(*notes, *reasons), counts=counts, head_arguments=arguments), reasons


def _from_source(source: str, inner: nn.Module) -> tuple[dict[str, PlanEntry], str | None]:
    if source == "hf":
        entries = huggingface_plan(inner)
        if not entries:
            return {}, "the model has no _tp_plan and its config no base_model_tp_plan"
        if not _names_a_layer(inner, entries):
            return {}, f"its _tp_plan names no layer that the model has, only {', '.join(entries)}"
        return entries, None
    if source == "registry":
        try:
            entries = optimized_plan(inner)
        except Exception as error:  # code that users registered; the next source may have a plan for the model
            return {}, f"the plan registered for {type(inner).__name__} failed with {type(error).__name__}: {error}"
        return entries, None if entries else f"no optimised plan is registered for {type(inner).__name__}"
    if type(inner).__module__.startswith("transformers_modules."):
        return {}, "not used for custom code, whose layers it cannot know"
    return default_plan(inner)


_HEADS = ("lm_head", "language_model.lm_head")


def _without_head_read_elsewhere(inner: nn.Module, plan: Plan) -> Plan:
    """``plan``; for Nemotron-Flash without the output projection, because the model's forward divides by the norm of
    its weight, outside of the projection's own forward.
    """
    config = getattr(inner, "config", None)
    repository = str(getattr(config, "name_or_path", "")).rpartition("/")[
        2
    ]  # the folders above say nothing of the model
    names = [type(inner).__name__, getattr(config, "model_type", None), repository]
    names += getattr(config, "architectures", None) or []
    if not any("nemotronflash" in re.sub("[-_ ]", "", str(name)).lower() for name in names):
        return plan
    dropped = [name for name in _HEADS if name in plan.entries]
    entries = {pattern: entry for pattern, entry in plan.entries.items() if pattern not in dropped}
    notes = tuple(f"{name}: left out of the plan, because Nemotron-Flash reads its weight itself." for name in dropped)
    return replace(plan, entries=entries, notes=plan.notes + notes)


def _names_a_layer(inner: nn.Module, entries: Mapping[str, PlanEntry]) -> bool:
    """True if a pattern with a wildcard matches; a plan for embedding and output projection alone is not enough."""
    patterns = [pattern_regex(pattern) for pattern in entries if "*" in pattern]
    named = (name for names in (inner.named_modules(), inner.named_parameters()) for name, _ in names)
    return any(regex.fullmatch(plan_name(name, "")) for name in named for regex in patterns)


def _no_plan_message(inner: nn.Module, reasons: list[str]) -> str:
    custom = type(inner).__module__.startswith("transformers_modules.")
    kind = "the custom-code class" if custom else "the class"
    return (
        f"no tensor-parallel plan for {kind} {type(inner).__name__}. Do one of: (1) pass tp_plan={{pattern: style}} "
        f"(or its import path) to AutoParallelismConfig; (2) give the model class a _tp_plan, or its config a "
        f"base_model_tp_plan; (3) use tp_size=1, FSDP2 alone needs no plan. Note: {'; '.join(reasons)}."
    )


def _explicit_plan(inner: nn.Module, tp_plan: Any) -> Plan:
    source = "explicit"
    plan: Any = tp_plan
    if isinstance(plan, str):
        source = f"explicit {plan!r}"
        plan = NAMED_PLANS[plan] if plan in NAMED_PLANS else _import(plan)
    if not isinstance(plan, Mapping) and callable(plan):
        plan = _call(plan, inner, source)
    if not isinstance(plan, Mapping):
        raise PlanError(f"tp_plan ({source}) must be or return a dict of pattern -> style, but is {plan!r}.")
    entries: dict[str, PlanEntry] = {}
    for key, style in plan.items():
        if not isinstance(key, str) or not key:
            raise PlanError(f"tp_plan ({source}) has the key {key!r}; keys are dotted module or parameter paths.")
        pattern = key.removeprefix("base_model.model.") if key.startswith("base_model.model.") else key
        check_style(pattern, style)
        entries[pattern] = PlanEntry(pattern, style, source)
    if not entries:
        raise PlanError(f"tp_plan ({source}) is empty: nothing would be sharded. Use tp_size=1 for FSDP2 alone.")
    return Plan("explicit", entries, strict=True)


def _import(path: str) -> Any:
    """Import ``package.module:attribute`` or ``package.module.attribute``."""
    forms = (
        f"tp_plan={path!r} is neither a named plan ({', '.join(sorted(NAMED_PLANS))}) nor an import path. Give a dict, "
        f"a callable, a name, or an import path such as 'my_package.plans:llama'."
    )
    try:
        return import_object(path)
    except Exception as error:  # the user's module runs here, and may raise anything
        raise PlanError(f"{forms} Importing it failed: {error}") from error


def _call(function: Callable[..., Any], inner: nn.Module, source: str) -> Any:
    """Call a plan function with the model if it takes one argument, else with none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required_keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if required_keywords == ["model"]:
        return _call(functools.partial(function, model=inner), inner, source)
    required = [p for p in positional if p.default is p.empty]
    if required_keywords or len(required) > 1:
        raise PlanError(
            f"tp_plan ({source}) is a callable with the required parameters "
            f"{[p.name for p in required] + required_keywords}; it is called with the model or with nothing."
        )
    wants_model = bool(required) or (bool(positional) and positional[0].name == "model")
    return function(inner) if wants_model else function()
