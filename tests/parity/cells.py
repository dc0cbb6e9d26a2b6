"""The cells of the parity tables: what one is, how it runs on ranks and in one process, and how it is judged.

A cell compares the loss and every gradient of one step at equal weights with one process: every parameter, no
gradient missing or new. Under sequence parallelism every cell has a length that its tp axis does not divide. An eager
one runs two forwards of different lengths before one backward of both; a compiled one a single forward, because a
second length would compile everything once more.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import full_grads, gradient_error
from harness.dropout import Masks, observe_dropout, observed_masks, replay_dropout
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import SEQUENCE, data_rank, trainable
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.plan.select import select_plan
from parity.subjects import SUBJECTS, Batch

LOSS_BOUND = 1e-6

ODD = 15
"""A length that neither 2 nor 4 divides."""

CHECKPOINTING = ("none", "full", "submodule", "selective", "own")
"""The option ``activation_checkpointing``; "own" is transformers' gradient checkpointing, not reentrant."""


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        model: a name that the subject of ``plan`` knows.
        adapter: "full", or a name in `subjects.ADAPTERS`.
        dropout: of the adapter. The oracle replays the masks that the ranks drew.
        mesh: a name in `MESHES`.
        checkpointing: one of `CHECKPOINTING`.
        compiled: each decoder layer, in place.
        sequence: "off", or sequence parallelism whose full sequences are "kept" for backward or gathered "again".
        plan: where the tensor-parallel plan comes from, a name in `SUBJECTS`.
        images: a vision-language model gets images.
        overrides: of the model's config.
        tier: "core" for ``make test``, else "full".
        both_ends: also run with the oldest supported transformers.
    """

    model: str
    adapter: str = "full"
    dropout: float = 0.0
    mesh: str = "tp2_fsdp2"
    checkpointing: str = "none"
    compiled: bool = False
    sequence: str = "off"
    plan: str = "transformers"
    images: bool = False
    overrides: tuple[tuple[str, Any], ...] = ()
    tier: str = field(default="full", compare=False)
    both_ends: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        adapter = f"{self.adapter}+dropout" if self.dropout else self.adapter
        parts = [self.model, adapter, self.mesh, self.checkpointing, "compiled" if self.compiled else "eager"]
        parts += {"off": [], "kept": ["sp"], "again": ["sp", "again"]}[self.sequence]
        parts += [] if self.plan == "transformers" else [self.plan]
        parts += ["images"] if self.images else []
        return "-".join([*parts, *(f"{key}={value}" for key, value in self.overrides)])

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.sequence == "off":
            return (SEQUENCE,)
        return (ODD,) if self.compiled else (ODD, 10)

    @property
    def config_values(self) -> dict[str, Any]:
        """Overrides of the model's config: four tp ranks need four heads for keys and values."""
        return dict(self.overrides) | ({"num_key_value_heads": 4} if self.mesh == "tp4" else {})

    def options(self, backend: str) -> dict[str, Any]:
        """Fields of the config beside the sizes of the mesh."""
        options: dict[str, Any] = {"compile": backend if self.compiled else False}
        if self.checkpointing != "own":
            options["activation_checkpointing"] = self.checkpointing
        if self.sequence != "off":
            # Without the check of the optimizer: a third of an eager cell's time, and about something else.
            options |= {"sequence_parallel": True, "check_optimizer": False}
        if self.sequence == "again":
            options["sequence_parallel_regather"] = True
        return options | SUBJECTS[self.plan].options

    def build(self) -> torch.nn.Module:
        return SUBJECTS[self.plan].build(self.model, self.adapter, self.dropout, self.config_values)

    def batches(self, model: torch.nn.Module, parts: int) -> list[list[Batch]]:
        """For each length, the micro-batches of the ``parts`` data-parallel ranks."""
        return [SUBJECTS[self.plan].batches(model, self.model, parts, length, self.images) for length in self.lengths]


@dataclass(frozen=True)
class Verdict:
    """How far a cell is from one process.

    Attributes:
        loss: relative error of the loss.
        in_bounds: the worst gradient's error in units of its bound; more than 1 is a failure.
        relative: ``|g - g*| / |g*|`` of that gradient.
        worst: its name.
        problems: what is wrong, empty for a cell that holds.
        recomputed: masks that a recomputation drew again (and alike).
    """

    loss: float
    in_bounds: float
    relative: float
    worst: str
    problems: tuple[str, ...]
    recomputed: int = 0


class Answer(NamedTuple):
    """What one rank found: mean loss, gradients (of rank 0), names of trainable parameters, dropout masks, masks that
    were recomputed, the origin of the plan, the fraction of all elements that this rank holds, and whether graphs were
    compiled, or layers said that they run uncompiled.
    """

    loss: float
    gradients: dict[str, torch.Tensor | None] | None
    trainable: list[str]
    masks: Masks
    recomputed: int
    origin: str
    held: float
    compiled: bool


def gradients_of_cell(cell: Cell, backend: str) -> Answer:
    """One step of one rank."""
    from torch._dynamo.utils import counters

    _, sizes, dp_size = MESHES[cell.mesh]
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **cell.options(backend)))
    model = cell.build()
    origin = (
        select_plan(model, None, accelerator.parallelism_config.plan_order).origin if cell.plan == "registry" else ""
    )
    if cell.checkpointing == "own":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = cell.batches(model, dp_size)
    observe_dropout(model)
    torch.manual_seed(100 + dist.get_rank())
    before, said = counters["stats"]["unique_graphs"], []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_automodel_parallel.compile").addHandler(handler)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    mine = data_rank(accelerator)
    more = SUBJECTS[cell.plan].arguments
    loss = torch.stack([model(**parts[mine], **more).loss / len(batches) for parts in batches]).sum()
    accelerator.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = full_grads(model)  # on all ranks: it gathers
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masks, again = observed_masks()
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    held = local / sum(p.numel() for p in model.parameters())
    gradients = gradients if dist.get_rank() == 0 else None
    logging.getLogger("hf_automodel_parallel.compile").removeHandler(handler)
    compiled = counters["stats"]["unique_graphs"] > before or any("uncompiled" in message for message in said)
    return Answer(total.item() / dist.get_world_size(), gradients, names, masks, again, origin, held, compiled)


@functools.cache
def _reference(key: Cell, parts: int) -> tuple[float, dict]:
    model = key.build()
    return loss_and_grads(model, [part for batch in key.batches(model, parts) for part in batch])


def reference_of(cell: Cell, masks: list[Masks]) -> tuple[float, dict]:
    """Loss and gradients of one process, with the ranks' masks."""
    _, sizes, dp_size = MESHES[cell.mesh]
    if not cell.dropout:
        # one for all cells that compute the same
        values = tuple(cell.config_values.items())
        same = {"plan": cell.plan, "images": cell.images, "overrides": values, "sequence": cell.sequence}
        return _reference(Cell(cell.model, cell.adapter, mesh="", compiled=len(cell.lengths) == 1, **same), dp_size)
    model = cell.build()
    replay_dropout(model, masks, sizes.get("tp_size", 1))
    return loss_and_grads(model, [part for batch in cell.batches(model, dp_size) for part in batch])


def run_cell(cell: Cell, backend: str = "aot_eager", timeout: float = 280.0) -> Verdict:
    """Run one cell on its ranks and in one process; raises only what the harness raises."""
    world, _, dp_size = MESHES[cell.mesh]
    answers = run_distributed(world, gradients_of_cell, cell, backend, timeout=timeout)
    first = answers[0]
    verdict = judge(first.loss, first.gradients, *reference_of(cell, [answer.masks for answer in answers]))
    problems = list(verdict.problems)
    expected = [name for name, p in cell.build().named_parameters() if p.requires_grad]
    if first.trainable != expected:
        problems.append(f"trainable: {sorted(set(first.trainable) ^ set(expected))[:4]}")
    if cell.dropout and bool(first.recomputed) != (cell.checkpointing != "none"):
        # Checked so that the equality of the masks says something: the recomputation contains the adapters.
        problems.append(f"{first.recomputed} masks were drawn again under checkpointing={cell.checkpointing}")
    if cell.plan == "registry" and first.origin != "registry":
        problems.append(f"the plan is from {first.origin!r}, not from the registry")
    if cell.compiled and not first.compiled:
        problems.append("no graph was compiled, and nobody said so")
    limit = SUBJECTS[cell.plan].held(cell.model) / dp_size
    if not first.held <= limit:
        problems.append(f"a rank holds {first.held:.2f} of the parameters, more than {limit:.2f}")
    return Verdict(verdict.loss, verdict.in_bounds, verdict.relative, verdict.worst, tuple(problems), first.recomputed)


def assert_holds(cell: Cell) -> None:
    verdict = run_cell(cell)
    assert not verdict.problems, verdict


def judge(loss: float, gradients: dict, want_loss: float, want: dict) -> Verdict:
    """Compare every parameter: presence of gradients, shapes, dtypes, and values within the bounds."""
    problems = []
    loss_error = abs(loss - want_loss) / abs(want_loss)
    if not loss_error <= LOSS_BOUND:
        problems.append(f"loss {loss:.9g} instead of {want_loss:.9g}")
    total = math.sqrt(math.fsum(g.double().norm().item() ** 2 for g in want.values() if g is not None))
    worst = (0.0, 0.0, "-")
    for name in sorted(gradients.keys() | want.keys()):
        got, reference = gradients.get(name), want.get(name)
        if got is None and reference is None and name in gradients and name in want:
            continue
        if got is None or reference is None:
            problems.append(f"{name}: {'lost' if got is None else 'unexpected'} gradient")
        elif (got.shape, got.dtype) != (reference.shape, reference.dtype):
            problems.append(f"{name}: {tuple(got.shape)} {got.dtype}")
        else:
            norm = reference.double().norm().item()
            difference = (got.double() - reference.double()).norm().item()
            error = gradient_error(got, reference, total)
            worst = max(worst, (error, difference / norm if norm else math.inf, name))
    if worst[0] > 1.0:
        problems.append(f"{worst[2]}: gradient off by {worst[0]:.3g} bounds")
    return Verdict(loss_error, *worst, tuple(problems))


# ---- the two matrices ----------------------------------------------------------------------------------------------

#: Adapters, dropout, checkpointing, compilation.
ADAPTER_AXES: dict[str, tuple[Any, ...]] = {
    "model": ("llama", "qwen3_moe"),
    "adapter": ("full", "lora", "dora"),
    "dropout": (0.0, 0.1),
    "mesh": ("tp2", "fsdp2", "tp2_fsdp2", "hsdp"),
    "checkpointing": ("none", "full", "submodule", "selective"),
    "compiled": (False, True),
}

SEQUENCE_AXES: dict[str, tuple[Any, ...]] = {
    "model": (
        "llama",
        "llama_tied",
        "qwen3",
        "gemma3",
        "phi3",
        "mistral",
        "mixtral",
        "qwen3_moe",
        "olmo2",
        "cohere",
    ),
    "adapter": ("full", "lora"),
    "mesh": ("tp2", "tp4", "tp2_fsdp2"),
    "checkpointing": CHECKPOINTING,
    "compiled": (False, True),
    "sequence": ("kept", "again"),
}

Axes = dict[str, tuple[Any, ...]]
Pairs = set[tuple[tuple[str, Any], tuple[str, Any]]]


def is_meaningful(cell: Cell) -> bool:
    """Dropout is that of the adapter, so a cell without one has none. Most checkpoints gather the full sequences again
    in backward anyway, so the option that says so is refused beside them.
    """
    if cell.sequence == "again" and cell.checkpointing not in ("none", "selective"):
        return False
    return not (cell.adapter == "full" and cell.dropout)


def all_cells(axes: Axes) -> list[Cell]:
    """Every meaningful combination of the axes."""
    products = itertools.product(*axes.values())
    return list(filter(is_meaningful, (Cell(**dict(zip(axes, values, strict=True))) for values in products)))


def pairs_of(cell: Cell, axes: Axes) -> Pairs:
    """The pairs of values of two axes that a cell has."""
    return set(itertools.combinations([(name, getattr(cell, name)) for name in axes], 2))


def uncovered(cells: list[Cell], axes: Axes) -> Pairs:
    """The pairs of values that some meaningful cell has and none of ``cells``."""
    wanted = set().union(*(pairs_of(cell, axes) for cell in all_cells(axes)))
    return wanted - set().union(*(pairs_of(cell, axes) for cell in cells))
