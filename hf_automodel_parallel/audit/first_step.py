"""When the audit runs, what it checks, and its messages. Between audited steps only a counter remains."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.model_view import layer_pattern
from ..core.output import tell
from ..core.ranks import gather_objects
from ..core.rendezvous import difference_over_store
from ..errors import AutoParallelError
from .reachability import ReachabilityHooks
from .replica_check import compare_replicas

logger = logging.getLogger(__name__)

#: At first replicas are equal to the bit, and their fingerprints up to the order of summation. Later, equal gradients
#: may round differently on different ranks.
FIRST_TOLERANCE, LATER_TOLERANCE = 1e-6, 1e-4

_DIFFERENT_BATCHES = "the ranks of a tp group were given different batches"
_SAME_ROWS = (
    "Likely cause: rows chosen by process_index, or a data loader with a DistributedSampler. Remedy: pass a plain data "
    "loader through accelerator.prepare, which gives all ranks of a tp group the same rows, or choose rows by the rank "
    "among the data-parallel ones."
)


class GradientAuditError(AutoParallelError, RuntimeError):
    """Training would be wrong without an error; the message names parameters, likely cause and remedy."""


class Audit:
    """Checks a model right before an optimizer step: the first one, or every n-th.

    Args:
        model: the prepared model.
        trainable: names of the parameters that were trainable when the model was prepared.
        compiled: layers whose forward is compiled.
        tp_group: this rank's tp group, None without tensor parallelism.
        every: audit again after so many optimizer steps; None for the first step only, 0 for never.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: set[str],
        compiled: list[nn.Module],
        tp_group: dist.ProcessGroup | None,
        every: int | None,
    ) -> None:
        self._model = weakref.ref(model)
        self.trainable = trainable
        self.compiled = compiled
        self.tp_group = tp_group
        self.tp_size = 1 if tp_group is None else tp_group.size()
        self.every = every
        self.done = 0
        self.steps = 0
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hooks: ReachabilityHooks | None = None
        if every != 0:
            self._arm()

    def again(self, trainable: set[str]) -> None:
        """Audit the next step as a first one, because parameters were added; ``trainable`` are all trainable names."""
        self.trainable, self.done = trainable, 0
        if self._hooks is not None:  # they are not on the new modules
            self._hooks.remove()
            self._hooks = None
        if self.every != 0:
            self._arm()

    def _arm(self) -> None:
        model = self._model()
        if model is not None and self._hooks is None:
            self._hooks = ReachabilityHooks(model, self.compiled, self._compare_shapes)

    def _compare_shapes(self, shapes: list[list[int]]) -> None:
        """Raise if the ranks of the tp group were given inputs of different ``shapes``. All of its ranks call it.

        Before the forward, whose first all-reduce would abort the process or mix up memory. Their values are compared
        before the step, with the gradients.
        """
        other = None if self.tp_group is None else difference_over_store(shapes, self.tp_group)
        if other is not None:
            raise GradientAuditError(
                f"{_DIFFERENT_BATCHES} and cannot run one forward together: the first rank has tensors of shapes "
                f"{other.reference}, rank {other.ranks[0]} of the group {other.other}. {_SAME_ROWS}"
            )

    def before_forward(self) -> None:
        """Refuse hooks on Partial gradients, until a step has been audited: such a hook may take the step itself.

        Raises:
            GradientAuditError: on each rank that has them.
        """
        model = self._model()
        if self.done or self.every == 0 or self.tp_size == 1 or model is None:
            return
        early = [
            name for name, p in model.named_parameters() if isinstance(p, DTensor) and compat.has_accumulation_hooks(p)
        ]
        if early:
            raise GradientAuditError(_early(early))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step of ``optimizer``, with complete gradients. Collective in the steps that are audited.

        Raises:
            GradientAuditError: on all ranks.
        """
        if (self.every is None and self.done) or self.every == 0:
            return
        if self._hooks is not None and not self._check(self._hooks, optimizer):
            return  # this step cannot be audited (no gradients yet, or an overflow): try the next one
        self.steps += 1
        if self._hooks is not None:
            self.done += 1
            # Forward hooks cost time in every step, so they stay only until a step is audited.
            self._hooks.remove()
            self._hooks = None
        if self.every is not None and self.steps % self.every == 0:
            self._arm()  # for the step that begins now

    def _check(self, hooks: ReachabilityHooks, optimizer: torch.optim.Optimizer) -> bool:
        """True if the step could be audited."""
        model = self._model()
        if model is None or not any(p.grad is not None for p in model.parameters()):
            return False
        problems = [*self._flags(model, optimizer), *self._lost(model, hooks), *_written(model, hooks)]
        tolerance = LATER_TOLERANCE if self.steps else FIRST_TOLERANCE
        replicas = compare_replicas(model, tolerance, hooks.inputs, self.tp_size, bool(problems))
        if replicas.gradients is None:
            return False  # an overflow; a scaler will skip this step, or the next one shows the same
        if replicas.inputs:
            problems.append(f"{_DIFFERENT_BATCHES} and train on a mixture of them. {_SAME_ROWS}")
        if replicas.gradients:
            problems.append(_forgotten_sum(replicas.gradients))
        if replicas.values:
            problems.append(
                f"{_named(replicas.values, 'replicated parameters have')} different values on the ranks that should "
                f"hold replicas of them. Likely cause: something changed them on some ranks only after "
                f"accelerator.prepare (a callback on rank 0, a checkpoint loaded on some ranks). Remedy: change "
                f"parameters equally on all ranks, or before prepare."
            )
        if problems or replicas.troubled:
            _raise_on_all(problems)
        if not self.done:
            trained = [p for p in model.parameters() if p.requires_grad]
            reached = sum(p.grad is not None for p in trained)
            tell(
                logger,
                f"audit of the first step: ok, {reached} of {len(trained)} trained tensors have gradients, replicas "
                "are equal on all ranks",
            )
        return True

    def _flags(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        def parameters_of(one: torch.optim.Optimizer) -> set[int]:
            return {id(p) for group in one.param_groups for p in group["params"]}

        stepping = parameters_of(optimizer)  # parameters of other optimizers may be frozen now
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
            elif isinstance(parameter, DTensor) and self.tp_size > 1 and compat.has_accumulation_hooks(parameter):
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
                f"{_named(hooked, 'parameters have')} hooks on their gradients (register_hook), which are never "
                f"called: FSDP2 writes the gradients of shards without autograd. {_CHANGE_LATER}"
            )
        if early:
            problems.append(_early(early))
        return problems

    def _lost(self, model: nn.Module, hooks: ReachabilityHooks) -> list[str]:
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
        lost = hooks.lost(model, missing) if missing else []
        if not lost:
            return []
        return [
            f"{_named(lost, 'trainable parameters have')} no gradient, although their modules ran and took part in the "
            f"loss. Likely cause: a sub-module was compiled while gradients were off (reentrant checkpointing and "
            f"torch.compile of a part of the model), or its output or weights are detached. Remedy: let "
            f"AutoParallelismConfig do both (activation_checkpointing=..., compile=True), use "
            f"gradient_checkpointing_kwargs={{'use_reentrant': False}}, or freeze what is not to be trained."
        ]


def _written(model: nn.Module, hooks: ReachabilityHooks) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    written = sorted(f"{names[module]}.{name}" for module, name in hooks.written if module in names)
    if not written:
        return []
    return [
        f"{_named(written, 'parameters were')} changed in place by a forward (max_norm of an nn.Embedding, a "
        "weight that a forward normalises or clips). FSDP2 computes with an unsharded copy, so the "
        "change is lost. Remedy: compute with a changed copy (F.normalize(self.weight)), or change the parameters "
        "between optimizer.step and the next forward, under torch.no_grad()."
    ]


_CHANGE_LATER = (
    "Remedy: change parameter.grad between accelerator.backward and optimizer.step, with an operation on all of it: "
    "grad.mul_(distribute_tensor(mask, grad.device_mesh, grad.placements)). A slice of it is a copy."
)


def _early(names: list[str]) -> str:
    return (
        f"{_named(names, 'parameters have')} hooks on their gradients (register_post_accumulate_grad_hook), "
        f"which see this rank's contribution, before gradients are complete over the tp axis. {_CHANGE_LATER}"
    )


def _has_part(parameter: nn.Parameter) -> bool:
    """False if this rank's shard of ``parameter`` is empty, and so has no gradient (megatron-fsdp)."""
    return not isinstance(parameter, DTensor) or parameter.to_local().numel() > 0


def _named(names: list[str], what: str) -> str:
    """``what`` with number and names: "3 parameters (a, b, c) were"."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    noun, verb = what.rsplit(" ", 1)
    return f"{len(names)} {noun} ({shown}) {verb}"


def _forgotten_sum(names: list[str]) -> str:
    pattern = layer_pattern(names[0])
    owner = pattern.removeprefix("base_model.model.").rpartition(".")[0]
    return (
        f"{_named(names, 'replicated parameters have')} different gradients on the ranks that hold replicas of "
        f"them; the replicas would diverge. Likely cause: they are combined with sharded activations and the plan does "
        f"not say so. Remedy: pass tp_plan={{**model.tp_plan, {owner!r}: 'replicated_with_grad_allreduce'}}, or leave "
        f"the projections around them out of the plan, or use tp_size=1. Other causes: random numbers drawn on some "
        f"ranks only, or different batches on the ranks of one tp group."
    )


def _adapter_parameters(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the parameters of adapters that a forward uses, and of those that it does not (PEFT freezes these).

    Unused are adapters that are not active, disabled, or merged into the base weights.
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
