"""What a run says of itself on rank 0: model, mesh, plan and memory at ``prepare``, speed after the second step.

A description that fails is a line, not the end of the run.
"""

from __future__ import annotations

import atexit
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from ..core.mesh import AXES
from ..core.model_view import ModelView, class_of
from ..core.output import size_text, tell
from ..fsdp.shard import fsdp_units
from ..optim.handoff import raw_optimizer
from ..strategies.default import DefaultParallelizationStrategy
from ..version import __version__
from .hooks import hooks_of
from .prepared import PreparedModel, attached_to, prepared
from .throughput import BatchCounter, local_bytes, peak_memory, state_bytes, synchronize

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_PLANS = {
    "hf": "of the model's class",
    "registry": "of the registry",
    "default": "for Llama-like names",
    "derived": "derived from a run of the model",
    "explicit": "yours (tp_plan)",
}


def _never_fails(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            tell(logger, f"no description of this run, because it failed: {type(error).__name__}: {error}")

    return call


@_never_fails
def report(accelerator: Accelerator, prepared_now: tuple[Any, ...]) -> None:
    """Describe the models of ``prepared_now``, the arguments of ``Accelerator.prepare``, each once.

    A model for training gets the whole description, one for evaluation a line.
    """
    optimizers = [raw_optimizer(x) for x in prepared_now if isinstance(x, torch.optim.Optimizer)]
    records = [prepared(x) for x in prepared_now if isinstance(x, nn.Module)]
    records += [attached_to(optimizer) for optimizer in optimizers]
    for record in records:
        if record is None or record.reported == (wanted := "training" if record.trainable else "evaluation"):
            continue
        record.reported = wanted
        if not record.trainable:
            tell(logger, f"{_name(record)} for evaluation: {_mesh(record)}; {_plan(record)}")
            continue
        loaders = [x for x in prepared_now if isinstance(x, torch.utils.data.DataLoader)]
        for line in _lines(accelerator, record, loaders):
            tell(logger, line)
        for optimizer in [o for o in optimizers if attached_to(o) is record][:1]:
            FirstSteps(accelerator, record, optimizer)


def _lines(accelerator: Accelerator, record: PreparedModel, loaders: list[Any]) -> Iterator[str]:
    model = record.context.model
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    total, of_these = (sum(p.numel() for p in group) for group in (parameters, trained))
    share = "all trained" if total == of_these else f"{_count(of_these)} trained{_method(model)}"
    dtype = str(next(iter(parameters)).dtype).removeprefix("torch.") if parameters else ""
    if accelerator.mixed_precision != "no":
        dtype += f", {accelerator.mixed_precision} mixed precision"
    ranks = accelerator.num_processes
    yield (
        f"{__version__}: {_name(record)}, {_count(total)} parameters in {dtype}, {share}; "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {accelerator.device.type}"
    )
    yield _mesh(record) + _batch(accelerator, record, loaders)
    yield _plan(record) + _adapters(record)
    yield _memory(record, parameters, trained)


def _name(record: PreparedModel) -> str:
    return class_of(ModelView.of(record.context.model).inner).__name__


def _method(model: nn.Module) -> str:
    config = getattr(model, "peft_config", None)
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in config.values()} if config else set()
    return f" ({', '.join(sorted(kinds))})" if kinds else ""


def _mesh(record: PreparedModel) -> str:
    config: Any = record.config
    sizes = [(axis, getattr(config, f"{axis}_size")) for axis in AXES]
    return "mesh " + (" x ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "of one rank")


def _batch(accelerator: Accelerator, record: PreparedModel, loaders: list[Any]) -> str:
    config: Any = record.config
    ranks, processes = config.data_parallel_size, accelerator.num_processes
    batch = hooks_of(accelerator).training_batch()
    if batch is None:
        sizes = {getattr(loader, "batch_size", None) for loader in loaders}
        # Accelerate gives the loaders that it has prepared a batch sampler instead of a size.
        sizes |= {getattr(loader, "batch_size", None) for loader in accelerator._dataloaders} - {None}
        given = sizes.pop() if len(sizes) == 1 else None
        if given is None:
            return ""  # none, or several: which one trains is not known
        batch = (given // ranks if accelerator.split_batches else given, accelerator.gradient_accumulation_steps)
    rows, steps = batch
    if not rows:
        return ""
    accumulated = f" x {steps} accumulated" if steps > 1 else ""
    ddp = f" (DDP would have {rows * processes * steps})" if processes != ranks else ""
    noun = "rank" if ranks == 1 else "ranks"
    return f"; global batch {rows * ranks * steps} = {rows} rows x {ranks} data-parallel {noun}{accumulated}{ddp}"


def _plan(record: PreparedModel) -> str:
    plan, spec, name = record.context.plan, record.context.spec, type(record.strategy).__name__
    strategy = "" if type(record.strategy) is DefaultParallelizationStrategy else f"; strategy {name}"
    if record.context.tp_mesh is None:
        return f"no tensor parallelism{strategy}"
    if plan is None or spec is None:
        return f"tensor parallelism by strategy {name}"
    styles: Counter[str] = Counter()
    for _, style, matches, _, _ in spec.rows:
        styles[style] += matches
    names = ", ".join(f"{number} {style}" for style, number in styles.most_common(4))
    more = ", ..." if len(styles) > 4 else ""
    notes = f"; {len(spec.notes)} {'note' if len(spec.notes) == 1 else 'notes'}, see verbose=2" if spec.notes else ""
    return f"plan {plan.origin} ({_PLANS.get(plan.origin, 'of another source')}): {names}{more}{notes}{strategy}"


def _adapters(record: PreparedModel) -> str:
    """Where the tp and the data-parallel ranks keep trained adapters of PEFT; empty without any."""
    model = record.context.model
    if not hasattr(model, "peft_config"):
        return ""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = []
    if record.context.tp_mesh is not None and record.context.spec is not None:
        specs = record.context.spec.parameters
        sharded = sum(name in specs and specs[name].dim is not None for name in trained)
        parts.append(f"{sharded} of {len(trained)} tensors sharded over tp")
    if record.context.dp_mesh.size() > 1:
        sharded = sum(_data_parallel_shards(p, record) > 1 for p in trained.values())
        parts.append(f"{sharded} of {len(trained)} over dp_shard")
    return f"; adapters: {', '.join(parts)}" if parts else ""


def _memory(record: PreparedModel, parameters: list[nn.Parameter], trained: list[nn.Parameter]) -> str:
    weights, gradients = (sum(map(local_bytes, group)) for group in (parameters, trained))
    gathered = max((_gathered(unit, record) for unit in fsdp_units(record.context.model)), default=0)
    largest = f", largest all-gathered unit {size_text(gathered)}" if gathered else ""
    return f"memory per rank: weights {size_text(weights)}, gradients {size_text(gradients)}{largest}"


def _gathered(unit: Any, record: PreparedModel) -> int:
    """Bytes of the parameters of ``unit`` that FSDP2 all-gathers together; 0 where no rank has a part of them."""
    inside: list[Any] = list(fsdp_units(unit)[1:])
    below = {id(p) for inner in inside for p in inner.parameters()}
    total = 0
    for parameter in unit.parameters():
        if id(parameter) in below:
            continue
        shards = _data_parallel_shards(parameter, record)
        dtype = record.context.fsdp.mp_policy.param_dtype or parameter.dtype
        total += local_bytes(parameter) // parameter.element_size() * dtype.itemsize * shards if shards > 1 else 0
    return total


def _data_parallel_shards(parameter: torch.Tensor, record: PreparedModel) -> int:
    """The number of shards that ``parameter`` has over the data-parallel axes; 1 where each rank has all of it."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, shards = parameter.device_mesh, 1
    for axis, placement in enumerate(parameter.placements):
        if (mesh.mesh_dim_names or ("",) * mesh.ndim)[axis] != record.context.axes.tp:
            shards *= 1 if isinstance(placement, Replicate) else mesh.size(axis)
    return shards


def _count(number: int) -> str:
    for size, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


class FirstSteps:
    """Times the second optimizer step (the first one allocates, compiles and is audited), tells its speed, and ends.

    If there is no second step, the first one is told when Python ends.
    """

    def __init__(self, accelerator: Accelerator, record: PreparedModel, optimizer: torch.optim.Optimizer) -> None:
        self.device = accelerator.device
        config: Any = record.config
        self.ranks = accelerator.num_processes
        #: Each tp group computes the same tokens, and with cp a group has one batch between them.
        self.token_ranks, self.row_ranks = self.ranks // config.tp_size, config.data_parallel_size
        self.counter: BatchCounter | None = BatchCounter(record.context.model)
        self.began: float | None = None
        self.only_step = ""
        optimizer.register_step_post_hook(self._after_step)
        atexit.register(self._at_the_end)

    @_never_fails
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.counter is None:
            return  # the hook stays: torch iterates over the hooks while it is called
        synchronize(self.device)
        now, counter = time.perf_counter(), self.counter
        if self.began is None:
            self.began = now
            took = f"{now - counter.began:.3g} s since its first forward" if counter.began is not None else "done"
            self.only_step = f"step 1, the only one: {took}; {self._memory(optimizer)}"
            counter.reset()
            return
        self.counter, self.only_step = None, ""
        counter.remove()
        atexit.unregister(self._at_the_end)
        seconds = now - self.began
        done, unit = counter.tokens * self.token_ranks, "tokens"
        if not done:
            done, unit = counter.rows * self.row_ranks, "rows"
        rate = done / seconds
        tell(
            logger,
            f"step 2: {seconds:.3g} s, {rate:,.0f} {unit}/s ({rate / self.ranks:,.0f} per device); "
            f"{self._memory(optimizer)}",
        )

    def _memory(self, optimizer: torch.optim.Optimizer) -> str:
        state, peak = size_text(state_bytes(optimizer)), size_text(peak_memory(self.device))
        return f"optimizer state {state}, peak memory {peak} on rank 0"

    def _at_the_end(self) -> None:
        """Must not refer to model or optimizer, which it would keep alive."""
        if self.only_step:
            tell(logger, self.only_step)
