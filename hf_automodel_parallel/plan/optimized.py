"""The registry of plans written for one model class, looked up by class name through the class's bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .hybrid import nemotron_h
from .spec import PlanEntry
from .video import HUNYUAN_VIDEO, WAN

PlanFunction = Callable[[nn.Module], Mapping[str, Any]]

#: class name -> function of the (unwrapped) model that returns pattern -> style.
OPTIMIZED_PLANS: dict[str, PlanFunction] = {
    "NemotronHForCausalLM": nemotron_h,
    "WanTransformer3DModel": lambda model: WAN,
    "HunyuanVideo15Transformer3DModel": lambda model: HUNYUAN_VIDEO,
}


def register_optimized_plan(class_name: str, function: PlanFunction) -> None:
    """Register ``function`` as the plan of the model class called ``class_name`` (and of its subclasses)."""
    OPTIMIZED_PLANS[class_name] = function


def optimized_plan(model: nn.Module) -> dict[str, PlanEntry]:
    """The registered plan for the class of ``model`` or its nearest base class, empty if there is none."""
    for cls in type(model).__mro__:
        function = OPTIMIZED_PLANS.get(cls.__name__)
        if function is not None:
            source = f"registry: {cls.__name__}"
            return {pattern: PlanEntry(pattern, style, source) for pattern, style in function(model).items()}
    return {}
