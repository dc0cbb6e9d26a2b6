"""When the audit looks, what it finds, and what it says. Nothing is left behind between the looks but one counter."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.ranks import gather_objects
from ..errors import AutoParallelError
from ..plan.patterns import layer_pattern
from .reachability import ReachabilityHooks
from .replica_check import compare_replicas

logger = logging.getLogger(__name__)

#: Replicas start out equal to the bit, and their fingerprints up to the order of summation; later, equal gradients may
#: round differently on different ranks.
FIRST_TOLERANCE, LATER_TOLERANCE = 1e-6, 1e-4


class GradientAuditError(AutoParallelError, RuntimeError):
    """Training would go wrong without a sign; the message names the parameters, the likely cause and the remedy."""


class Audit:
    """Looks at a model right before an optimizer step, the first one or every n-th.

    Args:
        model: the prepared model.
        trainable: names of the parameters that were trainable when the user handed the model over.
        compiled: layers whose forward is compiled.
        tp_size: number of ranks of a tp group.
        every: look again after so many optimizer steps; None for the first step alone, 0 for never.
    """

    def __init__(
        self, model: nn.Module, trainable: set[str], compiled: list[nn.Module], tp_size: int, every: int | None
    ) -> None:
        self._model = weakref.ref(model)
        self.trainable = trainable
        self.compiled = compiled
        self.tp_size = tp_size
        self.every = every
        self.done = 0
        self.steps = 0
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._witnesses: ReachabilityHooks | None = None
        if every != 0:
            self._arm()

    def again(self, trainable: set[str]) -> None:
        """Look at the next step as at a first one, because parameters were added; ``trainable`` are all that may train
        now.
        """
        self.trainable, self.done = trainable, 0
        if self._witnesses is not None:  # they do not know the new modules
            self._witnesses.dismiss()
            self._witnesses = None
        if self.every != 0:
            self._arm()

    def _arm(self) -> None:
        model = self._model()
        if model is not None and self._witnesses is None:
            self._witnesses = ReachabilityHooks(model, self.compiled)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step of ``optimizer``, with complete gradients. Collective in the steps that are audited.

        Raises:
            GradientAuditError: on all ranks alike.
        """
        if (self.every is None and self.done) or self.every == 0:
            return
        if self._witnesses is not None and not self._look(self._witnesses, optimizer):
            return  # nothing to see in this step (no gradients yet, or an overflow): look at the next one
        self.steps += 1
        if self._witnesses is not None:
            self.done += 1
            self._witnesses.dismiss()
            self._witnesses = None
        if self.every is not None and self.steps % self.every == 0:
            self._arm()  # for the step that begins now

    def _look(self, witnesses: ReachabilityHooks, optimizer: torch.optim.Optimizer) -> bool:
        model = self._model()
        if model is None or not any(p.grad is not None for p in model.parameters()):
            return False
        problems = [*self._flags(model, optimizer), *self._lost(model, witnesses)]
        tolerance = LATER_TOLERANCE if self.steps else FIRST_TOLERANCE
        copies = compare_replicas(model, tolerance, witnesses.inputs, self.tp_size, bool(problems))
        if copies.gradients is None:
            return False  # an overflow; a scaler will skip this step, or the next one shows the same
        if copies.inputs:
            problems.append(
                "the ranks of a tp group were given different batches and train on a mixture of them. Likely cause: "
                "rows chosen by process_index, or a data loader with a DistributedSampler. Remedy: pass a plain data "
                "loader through accelerator.prepare, which gives all ranks of a tp group the same rows, or choose rows "
                "by the rank among the data-parallel ones."
            )
        if copies.gradients:
            problems.append(_forgotten_sum(copies.gradients))
        if copies.values:
            problems.append(
                f"{_named(copies.values, 'replicated parameters have')} different values on the ranks that should hold "
                f"copies of them. Likely cause: something changed them on some ranks only after accelerator.prepare (a "
                "callback on rank 0, a checkpoint loaded on some ranks). Remedy: change parameters on all ranks "
                "alike, or before prepare."
            )
        if problems or copies.troubled:
            _raise_on_all(problems)
        if not self.done:
            logger.info("audit: gradients, flags and copies of the first step are in order")
        return True

    def _flags(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        def parameters_of(one: torch.optim.Optimizer) -> set[int]:
            return {id(p) for group in one.param_groups for p in group["params"]}

        stepping = parameters_of(optimizer)  # those of others may be frozen meanwhile
        held = {p for one in self.optimizers for p in parameters_of(one)}
        switched_on, switched_off = _adapter_parameters(model)
        unfrozen, frozen, orphaned, hooked, early = [], [], [], [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in self.trainable | switched_on and not self.done:
                unfrozen.append(name)
            elif parameter.requires_grad and held and id(parameter) not in held:
                orphaned.append(name)
            if isinstance(parameter, DTensor) and compat.gradient_hooks(parameter):
                hooked.append(name)
            elif isinstance(parameter, DTensor) and self.tp_size > 1 and compat.has_gradient_hooks(parameter):
                early.append(name)
            was_trained = name in self.trainable - switched_off and id(parameter) in stepping
            if was_trained and not parameter.requires_grad and not self.done:
                frozen.append(name)
        problems = []
        if unfrozen:
            problems.append(
                f"{_named(unfrozen, 'parameters were')} frozen when the model was prepared and are trainable now. "
                f"Likely cause: requires_grad_(True) called after prepare. Remedy: set requires_grad before "
                f"accelerator.prepare and pass these parameters to the optimizer, or freeze them again."
            )
        if frozen:
            problems.append(
                f"{_named(frozen, 'parameters were')} trainable when the model was prepared and are frozen now: they "
                f"would not be trained. Likely cause: requires_grad_(False) called after prepare. Remedy: freeze "
                f"before prepare, or not at all; if they are to be trained later on, audit='off'."
            )
        if orphaned:
            problems.append(
                f"{_named(orphaned, 'trainable parameters are')} in no optimizer, so they would collect gradients and "
                "never change. Remedy: add them to the optimizer, or freeze them with requires_grad_(False) before "
                "prepare."
            )
        if hooked:
            problems.append(
                f"{_named(hooked, 'parameters have')} hooks on their gradients (register_hook), which nobody calls: "
                f"FSDP2 writes the gradients of shards past them. Remedy: change parameter.grad, a shard, between "
                f"accelerator.backward and optimizer.step."
            )
        if early:
            problems.append(
                f"{_named(early, 'parameters have')} hooks on their gradients (register_post_accumulate_grad_hook), "
                f"which see the part of this rank, before gradients are complete over the tp axis. Remedy: change "
                f"parameter.grad, a shard, between accelerator.backward and optimizer.step."
            )
        return problems

    def _lost(self, model: nn.Module, witnesses: ReachabilityHooks) -> list[str]:
        _, inactive = _adapter_parameters(model)
        missing = {
            name
            for name, p in model.named_parameters()
            if p.requires_grad and p.grad is None and name not in inactive and _has_part(p)
        }
        trainable = sum(p.requires_grad for p in model.parameters())
        if 2 * len(missing) > trainable and dist.get_rank() == 0:
            logger.warning(
                "audit: %d of %d trainable parameters have no gradient in this step", len(missing), trainable
            )
        lost = witnesses.lost(model, missing) if missing else []
        if not lost:
            return []
        return [
            f"{_named(lost, 'trainable parameters have')} no gradient, although their modules ran and took part in the "
            f"loss. Likely cause: a sub-module was compiled while gradients were off (reentrant checkpointing and "
            f"torch.compile of a part of the model), or its output or weights are detached. Remedy: let "
            f"AutoParallelismConfig do both (activation_checkpointing=..., compile=True), use "
            f"gradient_checkpointing_kwargs={{'use_reentrant': False}}, or freeze what is not to be trained."
        ]


def _has_part(parameter: nn.Parameter) -> bool:
    """False where this rank holds nothing of ``parameter``, and so nothing of its gradient either (megatron-fsdp)."""
    return not isinstance(parameter, DTensor) or parameter.to_local().numel() > 0


def _named(names: list[str], what: str) -> str:
    """ "3 parameters were (a, b, ...)", which reads on with what they were."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    noun, verb = what.rsplit(" ", 1)
    return f"{len(names)} {noun} ({shown}) {verb}"


def _forgotten_sum(names: list[str]) -> str:
    pattern = layer_pattern(names[0])
    owner = pattern.removeprefix("base_model.model.").rpartition(".")[0]
    return (
        f"{_named(names, 'replicated parameters have')} different gradients on the ranks that hold copies of them; "
        f"training on would let the copies drift apart. Likely cause: they see sharded activations and the plan does "
        f"not say so. Remedy: pass tp_plan={{**model.tp_plan, {owner!r}: 'replicated_with_grad_allreduce'}}, or leave "
        f"the projections around them out of the plan, or use tp_size=1. Other causes: random numbers drawn on some "
        f"ranks only, or different batches on the ranks of one tp group."
    )


def _adapter_parameters(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the parameters of adapters that take part in a forward, and of those that do not (PEFT freezes these).

    Not taking part: adapters that are not active, disabled, or merged into the weights they adapt.
    """
    types = compat.peft_wrapper_types()
    on: set[str] = set()
    off: set[str] = set()
    wrappers: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if types and isinstance(m, types)]
    for path, wrapper in wrappers:
        active = set(wrapper.active_adapters)
        idle = bool(wrapper.disable_adapters) or bool(getattr(wrapper, "merged", False))
        for name, _ in wrapper.named_parameters():
            parts = name.split(".")
            if parts[0] not in ("base_layer", "original_module"):
                (off if idle or not active & set(parts) else on).add(f"{path}.{name}" if path else name)
    return on, off


def _raise_on_all(problems: list[str]) -> None:
    """Raise on every rank: its own problems, or those of the first rank that has any. Collective over all ranks."""
    everyone = gather_objects(problems)
    rank = dist.get_rank() if problems else next(r for r, theirs in enumerate(everyone) if theirs)
    where = "" if rank == dist.get_rank() else f"on rank {rank}: "
    raise GradientAuditError(where + " | ".join(everyone[rank]))
