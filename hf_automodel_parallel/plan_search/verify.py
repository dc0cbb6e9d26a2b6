"""``verify_plan``: compare a plan with one process before training. Runs in one process without a GPU, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.model_view import ModelView
from ..core.sharding_spec import PLAN_SOURCES, Plan
from ..errors import PlanError
from ..plan.resolve import resolve
from ..plan.select import select_plan
from .carried_modules import proxy_with_replaced_modules
from .parity_check import OF_TOTAL, RELATIVE, ParityCheck
from .search import derived_plan


@dataclass(frozen=True)
class Verified:
    """Result of :func:`verify_plan` for a plan that computes the same as one process.

    Attributes:
        plan: the plan, with the source of each entry.
        ranks: number of simulated ranks.
        parameters: number of parameters whose gradients were compared.
        outputs: number of output tensors that were compared.
    """

    plan: Plan
    ranks: int
    parameters: int
    outputs: int


def verify_plan(
    model: nn.Module | Any,
    tp: int = 2,
    plan: str | Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None,
    plan_order: tuple[str, ...] = PLAN_SOURCES,
) -> Verified:
    """Compare a tensor-parallel plan with one process on a tiny proxy model: outputs and all gradients.

    As in ``prepare``, the plan is completed first: for example, the norm of a head's features gets a partial gradient.

    The proxy model has the class of the model and the switches of its config, with two small layers (more if layers
    differ). Its ranks are threads that run this package's TP hooks on shards of the weights, in float32 on the CPU. A
    dimension of the real model that tp does not divide is found by ``prepare``, not here.

    Args:
        model: a model on any device including meta, plain or PEFT-wrapped (the proxy model has no adapters); or a
            config of transformers, from which ``AutoModelForCausalLM`` makes one.
        tp: number of ranks, 2 or 4 (the proxy model has 4 heads).
        plan: a plan in any form of ``AutoParallelismConfig.tp_plan``; None: the plan that ``prepare`` would select.
        plan_order: sources to try if ``plan`` is None.

    Returns:
        The plan, and how much was compared.

    Raises:
        PlanError: there is no plan or no proxy model, or the results differ; the message names the first difference.

    Examples:
        >>> verify_plan(AutoConfig.from_pretrained("gpt2"), tp=2).plan.origin
        'derived'
    """
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 2:
        raise PlanError(f"tp={tp!r}: a plan is compared on 2 or more ranks; give tp=2.")
    if isinstance(model, nn.Module):
        inner = ModelView.of(model).inner
    else:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            inner = AutoModelForCausalLM.from_config(model)
    small = proxy_with_replaced_modules(inner)
    chosen = select_plan(small, plan, plan_order, tp, derived_plan)
    resolve(small, chosen, tp)  # a pattern that matches nothing and the like: an error in its own words
    check = ParityCheck(small, tp)
    failure = check.failure(chosen, completed=chosen.origin != "derived")
    if failure is not None:
        raise PlanError(
            f"the {chosen.origin} plan of {type(inner).__name__} does not compute what one process does on {tp} ranks: "
            f"{failure} (more than {RELATIVE:g} of its norm and {OF_TOTAL:g} of all). Correct the tp_plan, or use "
            "tp_size=1 (FSDP2)."
        )
    compared = sum(gradient is not None for gradient in check.want.gradients.values())
    return Verified(chosen, tp, compared, len(check.want.outputs))
