"""The axes of the parity matrix, its cells, what one cell does, and how it is judged (DESIGN: promise 1)."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import full_grads, gradient_error
from harness.dropout import Masks, observe_dropout, observed_masks, replay_dropout
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import batches_for, build, data_rank, trainable

from hf_automodel_parallel import AutoParallelismConfig

LOSS_BOUND = 1e-6

AXES: dict[str, tuple[Any, ...]] = {
    "model": ("llama", "qwen3_moe"),
    "adapter": ("full", "lora", "dora"),
    "dropout": (0.0, 0.1),
    "mesh": ("tp2", "fsdp2", "tp2_fsdp2", "hsdp"),
    "checkpointing": ("none", "full", "submodule", "selective"),
    "compiled": (False, True),
}


@dataclass(frozen=True)
class Cell:
    """One combination. ``model`` and ``mesh`` may also be names that are not on the axes."""

    model: str
    adapter: str
    dropout: float
    mesh: str
    checkpointing: str
    compiled: bool

    def __str__(self) -> str:
        adapter = f"{self.adapter}+dropout" if self.dropout else self.adapter
        return "-".join([self.model, adapter, self.mesh, self.checkpointing, "compiled" if self.compiled else "eager"])


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


def is_meaningful(cell: Cell) -> bool:
    """Dropout here is that of the adapter, so a cell without one has none."""
    return not (cell.adapter == "full" and cell.dropout)


def all_cells() -> list[Cell]:
    """Every meaningful combination of the axes."""
    return list(filter(is_meaningful, itertools.starmap(Cell, itertools.product(*AXES.values()))))


def pairs_of(cell: Cell) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of values of two axes that a cell has."""
    values = [(field.name, getattr(cell, field.name)) for field in fields(cell)]
    return set(itertools.combinations(values, 2))


def uncovered(cells: list[Cell]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of values that some meaningful cell has and none of ``cells``."""
    return set().union(*map(pairs_of, all_cells())) - set().union(*map(pairs_of, cells))


def adapter_options(cell: Cell) -> dict[str, Any] | None:
    """LoRA options of a cell, None for full fine-tuning.

    PEFT has neither dropout nor DoRA for the fused expert weights of a mixture of experts (an error of its own says
    so): there such an adapter is on the attention alone; without them, on every linear layer and on the experts.
    """
    if cell.adapter == "full":
        return None
    dora = cell.adapter == "dora"
    attention_only = "moe" in cell.model and (dora or cell.dropout)
    targets: Any = ["q_proj", "k_proj", "v_proj", "o_proj"] if attention_only else "all-linear"
    return {"target_modules": targets, "use_dora": dora, "lora_dropout": cell.dropout}


def gradients_of_cell(cell: Cell, backend: str) -> tuple[float, dict | None, list[str], Masks, int]:
    """One step of one rank: mean loss, gradients (of rank 0), names of what is trainable, masks, masks recomputed."""
    _, sizes, dp_size = MESHES[cell.mesh]
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(
            **sizes,
            activation_checkpointing=cell.checkpointing,
            compile=backend if cell.compiled else False,
        )
    )
    model = build(cell.model, adapter_options(cell))
    observe_dropout(model)
    torch.manual_seed(100 + dist.get_rank())
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    model.train()
    loss = model(**batches_for(model, dp_size)[data_rank(accelerator)], use_cache=False).loss
    accelerator.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = full_grads(model)  # on all ranks: it gathers
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masks, again = observed_masks()
    return total.item() / dist.get_world_size(), gradients if dist.get_rank() == 0 else None, names, masks, again


@functools.cache
def _reference_without_dropout(model: str, adapter: str, mesh_parts: int) -> tuple[float, dict]:
    reference = build(model, adapter_options(Cell(model, adapter, 0.0, "", "", False)))
    return loss_and_grads(reference, batches_for(reference, mesh_parts))


@functools.cache
def _trainable_names(model: str, adapter: str, dropout: float) -> list[str]:
    built = build(model, adapter_options(Cell(model, adapter, dropout, "", "", False)))
    return [name for name, p in built.named_parameters() if p.requires_grad]


def reference_of(cell: Cell, masks: list[Masks]) -> tuple[float, dict]:
    """Loss and gradients of one process, with the ranks' masks."""
    _, sizes, dp_size = MESHES[cell.mesh]
    if not cell.dropout:
        return _reference_without_dropout(cell.model, cell.adapter, dp_size)
    reference = build(cell.model, adapter_options(cell)).train()
    replay_dropout(reference, masks, sizes.get("tp_size", 1))
    return loss_and_grads(reference, batches_for(reference, dp_size))


def run_cell(cell: Cell, backend: str, timeout: float = 240.0) -> Verdict:
    """Run one cell on its ranks and in one process; raises only what the harness raises."""
    answers = run_distributed(MESHES[cell.mesh][0], gradients_of_cell, cell, backend, timeout=timeout)
    loss, gradients, names, _, recomputed = answers[0]
    want_loss, want = reference_of(cell, [answer[3] for answer in answers])
    verdict = judge(loss, gradients, want_loss, want)
    problems = list(verdict.problems)
    expected = _trainable_names(cell.model, cell.adapter, cell.dropout)
    if names != expected:
        problems.append(f"trainable: {sorted(set(names) ^ set(expected))[:4]}")
    if cell.dropout and bool(recomputed) != recomputes_adapters(cell):
        problems.append(f"{recomputed} masks were drawn again under checkpointing={cell.checkpointing}")
    return Verdict(verdict.loss, verdict.in_bounds, verdict.relative, verdict.worst, tuple(problems), recomputed)


def assert_holds(cell: Cell) -> None:
    verdict = run_cell(cell, "aot_eager")
    assert not verdict.problems, verdict


def recomputes_adapters(cell: Cell) -> bool:
    """True if the recomputation of the checkpoint contains the adapters (checked, so that the masks' equality says
    something).
    """
    return cell.checkpointing != "none"


def judge(loss: float, gradients: dict, want_loss: float, want: dict) -> Verdict:
    """Compare with the bounds of promise 1: every parameter, presence of gradients, shapes, dtypes."""
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


#: Every pair of values of two axes (see `uncovered`), and what pairs alone would leave out.
CI_CELLS = [
    Cell("qwen3_moe", "full", 0.0, "fsdp2", "submodule", False),
    Cell("llama", "dora", 0.1, "tp2", "submodule", True),
    Cell("qwen3_moe", "lora", 0.1, "tp2", "none", True),
    Cell("llama", "lora", 0.0, "hsdp", "selective", False),
    Cell("qwen3_moe", "dora", 0.1, "hsdp", "full", False),
    Cell("llama", "full", 0.0, "tp2", "full", True),
    Cell("llama", "dora", 0.0, "fsdp2", "none", False),
    Cell("qwen3_moe", "lora", 0.1, "fsdp2", "selective", True),
    Cell("qwen3_moe", "full", 0.0, "tp2_fsdp2", "selective", False),
    Cell("qwen3_moe", "dora", 0.0, "tp2", "selective", False),
    Cell("llama", "full", 0.0, "hsdp", "none", True),
    Cell("qwen3_moe", "lora", 0.0, "tp2_fsdp2", "full", False),
    Cell("qwen3_moe", "lora", 0.0, "hsdp", "submodule", False),
    Cell("llama", "dora", 0.0, "tp2_fsdp2", "none", False),
    Cell("qwen3_moe", "dora", 0.1, "tp2", "submodule", False),
    Cell("qwen3_moe", "dora", 0.1, "fsdp2", "full", False),
    # tensor parallel x HSDP
    Cell("llama", "lora", 0.1, "tp2_hsdp", "full", False),
    # the triple that has gone wrong most often in this stack: two-dimensional mesh, checkpoint, compiler
    Cell("llama", "lora", 0.1, "tp2_fsdp2", "full", True),
    Cell("llama", "lora", 0.1, "tp2_fsdp2", "selective", True),
    Cell("qwen3_moe", "lora", 0.0, "tp2", "selective", True),
    Cell("qwen3_moe", "lora", 0.0, "tp2", "full", True),
    # other families, for their own ways through a layer
    Cell("mixtral", "lora", 0.0, "tp2", "selective", False),
    Cell("llama_tied", "full", 0.0, "tp2_fsdp2", "submodule", False),
    Cell("gemma3", "lora", 0.0, "fsdp2", "selective", False),
    Cell("phi3", "full", 0.0, "tp2", "full", False),
    # layers that read the keys of earlier layers
    Cell("gemma3n", "full", 0.0, "fsdp2", "full", False),
    Cell("gemma3n", "lora", 0.0, "tp2", "submodule", False),
    Cell("qwen3", "full", 0.0, "tp2", "selective", True),
]
