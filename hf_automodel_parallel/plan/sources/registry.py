"""The registry of plans written for one model class, looked up by class name through the class's bases."""

from __future__ import annotations

import inspect

from torch import nn

from ...core.sharding_spec import PlanEntry
from .families import FAMILIES, HUNYUAN_VIDEO, WAN, PlanFunction, nemotron_h

#: Class name, bare or as ``module.qualname`` -> function of the (unwrapped) model that returns pattern -> style.
OPTIMIZED_PLANS: dict[str, PlanFunction] = {
    **FAMILIES,
    "NemotronHForCausalLM": nemotron_h,
    "WanTransformer3DModel": lambda model, sequence_parallel=False: WAN,
    "HunyuanVideo15Transformer3DModel": lambda model, sequence_parallel=False: HUNYUAN_VIDEO,
}

#: The reference API's name for the same mapping: every function in it can be called as ``(model, sequence_parallel)``.
PARALLELIZE_FUNCTIONS = OPTIMIZED_PLANS


def register_optimized_plan(class_name: str, function: PlanFunction) -> None:
    """Register ``function`` as the plan of the model class called ``class_name`` (and of its subclasses)."""
    OPTIMIZED_PLANS[class_name] = function


def optimized_plan(model: nn.Module) -> dict[str, PlanEntry]:
    """The registered plan for the class of ``model`` or its nearest base class, empty if there is none.

    Raises:
        Exception: the error of the plan's function if the plan does not fit the model.
    """
    for cls in type(model).__mro__:
        for key in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__):
            if key in OPTIMIZED_PLANS:
                plan = _call(OPTIMIZED_PLANS[key], model)
                return {pattern: PlanEntry(pattern, style, f"registry: {key}") for pattern, style in plan.items()}
    return {}


def _call(function: PlanFunction, model: nn.Module):
    """Call ``function(model)``, or ``function(model, sequence_parallel)`` if it has the reference API's signature."""
    try:
        inspect.signature(function).bind(model)
    except TypeError:
        return function(model, False)
    except ValueError:  # a builtin without a signature
        pass
    return function(model)
