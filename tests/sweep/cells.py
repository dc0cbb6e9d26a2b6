"""One type of model on its ranks: loss and every gradient against one process, full, with LoRA, and sequence-parallel.

The functions here run on the ranks of a pool. Rank 0 also computes what one process computes and judges, so that no
gradient has to be sent anywhere.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from harness.compare import full_grads
from harness.meshes import MESHES as ALL_MESHES
from harness.models import lora, make_batches
from harness.oracle import loss_and_grads
from parity.cells import judge

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.prepared import prepared
from hf_automodel_parallel.errors import AutoParallelError
from sweep.tiny import build, vocabulary

SEQUENCE, ROWS = 16, 2

#: A gradient that is off by at most this many bounds in float32 is computed again in float64. If it is within the bound
#: there, rounding was the cause (a long sum in another order). Some kernels compute in float32 whatever they are given;
#: there rounding was the cause if one process is off by half as much when its weights change in their last bit. Else
#: the cell is wrong.
ROUNDING = 10.0

#: Name -> (world size, sizes, micro-batches).
MESHES = {name: ALL_MESHES[name] for name in ("tp2", "tp2_fsdp2", "fsdp2")}

#: Name -> (with LoRA, further fields of the config).
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "full": (False, {}),
    "lora": (True, {}),
    "sp": (False, {"sequence_parallel": True}),
}


def cells(mesh: str) -> list[str]:
    """The kinds that a mesh can run, in the order of the report; FSDP2 alone, which needs no plan, only in full."""
    return list(KINDS) if "tp_size" in MESHES[mesh][1] else ["full"]


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        model_type: the type, with its variant's fields behind a colon.
        mesh: name in :data:`MESHES`.
        kind: name in :data:`KINDS`.
        status: "parity"; "wrong"; "refused" (an error of this package in ``prepare``); "failed" (any other error);
            "one process" (it does not run there, so there is nothing to compare with).
        in_bounds: the worst gradient's error in units of its bound.
        detail: the worst gradient's name, or what was wrong, or the error.
        class_name: the model's class.
        plan: where the plan comes from that the model was given; empty without tensor parallelism.
        seconds: how long it took.
    """

    model_type: str
    mesh: str
    kind: str
    status: str
    in_bounds: float = 0.0
    detail: str = ""
    class_name: str = ""
    plan: str = ""
    seconds: float = 0.0


def batches_for(model: torch.nn.Module, parts: int) -> list[dict[str, torch.Tensor]]:
    """``parts`` micro-batches of :data:`ROWS` rows."""
    return make_batches(parts, ROWS, SEQUENCE, vocabulary(model), seed=3)


def case_fields(case: str) -> tuple[str, dict[str, Any]]:
    """The type, and the fields of its configuration, of a case as ``type:field=value,...``."""
    model_type, _, fields = case.partition(":")
    return model_type, {key: _value(value) for key, _, value in (f.partition("=") for f in fields.split(",") if f)}


def build_kind(case: str, kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a cell, see :func:`case_fields`."""
    model_type, overrides = case_fields(case)
    model = build(model_type, **overrides)
    if KINDS[kind][0]:
        model = _with_lora(model)
    return model.to(dtype)


def _with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters on all linear layers; without those that PEFT itself refuses or cannot wrap.

    It breaks subclasses of ``nn.Linear`` that return tuples (routers), and refuses some layers of Mamba mixers.
    """
    linear = {name: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets: Any = "all-linear"
    if any(kind is not torch.nn.Linear for kind in linear.values()):
        head = model.get_output_embeddings()
        targets = [n for n in linear if (m := model.get_submodule(n)) is not head and _gives_one_tensor(m)]
    try:
        return lora(model, target_modules=targets)
    except ValueError as error:
        if "Mamba" not in str(error):
            raise
        return lora(model, target_modules=targets, exclude_modules=["out_proj", "conv1d"])


@torch.no_grad()
def _gives_one_tensor(layer: torch.nn.Module) -> bool:
    """True if a (subclass of a) linear layer returns what ``nn.Linear`` does, as PEFT takes for granted."""
    try:
        output = type(layer).forward(layer, layer.weight.new_zeros(1, layer.in_features))
    except Exception:
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, layer.out_features)


def _value(text: str) -> Any:
    return {"True": True, "False": False}.get(text, int(text) if text.lstrip("-").isdigit() else text)


def run_kinds(case: str, mesh: str, kinds: list[str]) -> list[dict[str, Any]]:
    """Run cells of one case one after the other on this rank; returns the outcomes, the same on all ranks."""
    return [asdict(_isolated(case, mesh, kind)) for kind in kinds]


def _isolated(case: str, mesh: str, kind: str) -> Outcome:
    start = time.monotonic()
    outcome = _agreed(case, mesh, kind, torch.float32)
    if outcome.status == "wrong" and outcome.in_bounds <= ROUNDING:
        precise = _agreed(case, mesh, kind, torch.float64)
        if precise.status == "parity":
            detail = f"{precise.in_bounds} bounds in float64; in float32 {outcome.detail}"
            outcome = replace(outcome, status="parity", detail=detail)
        else:
            alone = _last_bits(case, mesh, kind)
            if outcome.in_bounds <= 2 * alone:
                detail = f"{alone:.2f} bounds in one process whose weights change in the last bit; {outcome.detail}"
                outcome = replace(outcome, status="parity", detail=detail)
    return replace(outcome, seconds=round(time.monotonic() - start, 2))


def _last_bits(case: str, mesh: str, kind: str) -> float:
    """How far gradients of one process move, in bounds, when each weight moves by at most one unit in its last
    place.
    """
    answer = [0.0]
    if dist.get_rank() == 0:
        batches = batches_for(build_kind(case, kind), MESHES[mesh][2])
        want = loss_and_grads(build_kind(case, kind), batches)
        for seed in range(3):
            model, generator = build_kind(case, kind), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + torch.finfo(p.dtype).eps * (torch.randint(0, 3, p.shape, generator=generator) - 1))
            answer = [max(answer[0], judge(*loss_and_grads(model, batches), *want).in_bounds)]
    dist.broadcast_object_list(answer)
    return answer[0]


def _agreed(case: str, mesh: str, kind: str, dtype: torch.dtype) -> Outcome:
    """The outcome on rank 0, or that of a rank on which something failed."""
    try:
        outcome = _run(case, mesh, kind, dtype)
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        known = isinstance(error, AutoParallelError)
        outcome = Outcome(case, mesh, kind, "refused" if known else "failed", detail=message)
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        gc.collect()
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    first = outcomes[0]
    if any(o.status != first.status and "failed" in (o.status, first.status) for o in outcomes[1:]):
        first = next(o for o in outcomes if o.status == "failed")
    return first


def _run(case: str, mesh: str, kind: str, dtype: torch.dtype) -> Outcome:
    _, sizes, parts = MESHES[mesh]
    try:
        model = build_kind(case, kind, dtype)
    except Exception as error:
        return Outcome(
            case, mesh, kind, "one process", detail=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    about: dict[str, Any] = {"model_type": case, "mesh": mesh, "kind": kind, "class_name": type(inner).__name__}
    want: tuple[float, dict[str, torch.Tensor | None]] | None = None
    problem = [""]
    if dist.get_rank() == 0:
        try:
            want = loss_and_grads(build_kind(case, kind, dtype), batches_for(model, parts))
        except Exception as error:
            problem = [f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]]
    dist.broadcast_object_list(problem)
    if problem[0]:
        return Outcome(**about, status="one process", detail=problem[0])
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **KINDS[kind][1]))
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable, lr=1e-3))
    place = dist.get_rank() // accelerator.parallelism_config.non_data_parallel_size
    try:
        loss = model(**batches_for(inner, parts)[place]).loss
        accelerator.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        gradients = full_grads(model)  # on all ranks: it gathers
    except AutoParallelError as error:  # too late for a refusal
        raise RuntimeError(f"after prepare: {type(error).__name__}: {error}") from error
    if want is None:
        return Outcome(**about, status="parity")
    plan = prepared(model).context.plan
    about["plan"] = "" if plan is None else plan.origin
    verdict = judge(total.item() / dist.get_world_size(), gradients, *want)
    detail = "; ".join(verdict.problems)[:600] or verdict.worst
    return Outcome(
        **about, status="wrong" if verdict.problems else "parity", in_bounds=round(verdict.in_bounds, 3), detail=detail
    )
