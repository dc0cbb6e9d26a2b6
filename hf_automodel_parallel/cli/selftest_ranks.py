"""What the processes of ``hf-automodel-parallel selftest`` compute, and the comparison with one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..config import AutoParallelismConfig

#: Steps that the case "resume" trains, and the step after which its first run saves and is killed.
STEPS, SAVED_AFTER = 4, 2

_ROWS, _LENGTH, _VOCABULARY = 2, 32, 256
#: Relative error of the loss; of a gradient to its own norm, or to a hundredth of the norm of all.
_LOSS, _GRADIENT = 1e-5, 1e-4
#: How much further from float32 than one process in bf16 a parallel run in bf16 may be.
_BF16 = 2.0


def build(adapter: bool) -> nn.Module:
    """A small Llama with the same values in every process, with LoRA on its linear layers if ``adapter``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            use_cache=False,
        )
    )
    if not adapter:
        return model
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # not at zero, where the gradients of lora_A are zero
            nn.init.normal_(parameter, std=0.02)
    return model


def batch(step: int, rows: int) -> torch.Tensor:
    """Token ids of the global batch of ``step``: (rows, length)."""
    return torch.randint(_VOCABULARY, (rows, _LENGTH), generator=torch.Generator().manual_seed(100 + step))


def reference(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Loss and gradients of one process with the global batch; for "resume" the losses of all steps."""
    rows = _ROWS * case["batches"]
    if case["name"] == "resume":
        model = build(False).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return {"losses": [_step(model, optimizer, batch(step, rows).to(device)) for step in range(STEPS)]}
    result: dict[str, Any] = {}
    for precision in ("float32", *(("bf16",) if case["bf16"] else ())):
        model = build(case["lora"]).to(device)
        ids = batch(0, rows).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        result[precision] = {"loss": loss.item(), "gradients": gradients}
    return result


def _step(
    model: nn.Module, optimizer: Any, ids: torch.Tensor, backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return _mean(loss)


def _mean(loss: torch.Tensor) -> float:
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def parallel(case: dict[str, Any], cpu: bool, expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``case`` on this rank through Accelerate and compare with ``expected``, what :func:`reference` returned.

    Returns:
        ``ok``, ``loss``, ``reference_loss``, ``worst`` (relative error of the worst gradient or loss) and ``where``.
    """
    from accelerate import Accelerator

    config = AutoParallelismConfig(**case["sizes"], **case["options"])
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if case["bf16"] else "no", parallelism_config=config)
    model = build(case["lora"])
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    rank = accelerator.process_index // config.non_data_parallel_size

    def ids(step: int) -> torch.Tensor:
        rows = batch(step, _ROWS * case["batches"])
        return rows.chunk(config.data_parallel_size)[rank].to(accelerator.device)

    if case["name"] == "resume":
        return _train(accelerator, model, optimizer, ids, case["first"], expected["losses"], folder)
    loss = model(input_ids=ids(0), labels=ids(0)).loss
    accelerator.backward(loss)
    gradients = {name: _full(p.grad).cpu() for name, p in model.named_parameters() if p.grad is not None}
    return _compare(_mean(loss), gradients, expected)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    ids: Callable[[int], torch.Tensor],
    first: bool,
    losses: list[float],
    folder: Path,
) -> dict[str, Any]:
    """The first run saves in the middle and is killed; the second one goes on from there, on another mesh."""
    done = 0 if first else SAVED_AFTER
    if not first:
        accelerator.load_state(str(folder / "checkpoint"))
    result: dict[str, Any] = {"ok": True, "worst": 0.0, "where": ""}
    for step in range(done, STEPS):
        if first and step == SAVED_AFTER:
            accelerator.save_state(str(folder / "checkpoint"))
            accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
        loss = _step(model, optimizer, ids(step), accelerator.backward)
        error = abs(loss - losses[step]) / losses[step]
        result |= {"loss": loss, "reference_loss": losses[step]}
        if error >= result["worst"]:
            result |= {"worst": error, "where": f"loss of step {step + 1}"}
    # Adam's division makes more of the last bits of a gradient than one step does.
    return result | {"ok": result["worst"] < 10 * _LOSS}


def _compare(loss: float, gradients: dict[str, torch.Tensor], expected: dict[str, Any]) -> dict[str, Any]:
    exact = expected["float32"]
    right = exact["gradients"]
    missing = sorted(set(right) ^ set(gradients))
    everything = sum(g.double().norm() ** 2 for g in right.values()) ** 0.5

    def errors(of: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            name: float((of[name].double() - g.double()).norm() / torch.maximum(g.double().norm(), everything / 100))
            for name, g in right.items()
            if name in of
        }

    found = errors(gradients)
    where = max(found, key=lambda name: found[name])
    result = {"loss": loss, "reference_loss": exact["loss"], "worst": found[where], "where": where}
    off = abs(loss - exact["loss"]) / exact["loss"]
    if "bf16" not in expected:
        ok = off < _LOSS and found[where] < _GRADIENT
    else:
        plain = errors(expected["bf16"]["gradients"])
        plain_off = abs(expected["bf16"]["loss"] - exact["loss"]) / exact["loss"]
        ok = found[where] < _BF16 * max(plain.values()) and off < _BF16 * plain_off + 2**-8
    if missing:
        return result | {"ok": False, "where": f"{missing[0]}: a gradient on one side only"}
    return result | {"ok": ok}
