"""Models of all modalities on the ranks of a pool: outputs and every gradient against one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from harness.compare import full_grads
from harness.models import randomize
from parity.cells import judge
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.prepared import prepared
from hf_automodel_parallel.plan_search.parity_check import first_that_runs
from hf_automodel_parallel.plan_search.proxy_model import proxy_config

#: Fields without a usable default.
FIELDS: dict[str, dict[str, Any]] = {"time_series_transformer": {"prediction_length": 4, "lags_sequence": [1, 2]}}


class Around(nn.Module):
    """A user's module with a Hugging Face model inside and a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model, nn.Linear(32, 3)

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.backbone(**batch).last_hidden_state)}


def build(case: str) -> nn.Module:
    """``case`` is "type:class", or "type:class around"."""
    name, _, around = case.partition(" ")
    model_type, _, class_name = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(
            proxy_config(CONFIG_MAPPING[model_type](**FIELDS.get(model_type, {})))
        )
        model = Around(model) if around else model
        randomize(model)
        for parameter in model.parameters():
            if parameter.dim() == 0:
                parameter.data.fill_(0.7)
    return model.eval().double()


def batches_of(model: nn.Module, parts: int) -> list[dict[str, Any]]:
    """A batch for each data-parallel rank, all different."""
    inner = model.backbone if isinstance(model, Around) else model
    batch, *_ = first_that_runs(copy.deepcopy(inner).float(), 12)

    def other(value: Any, part: int) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return value.double() * (1 + 0.5 * part)
        return torch.where(value > 20, value - part, value)

    return [{key: other(value, part) for key, value in batch.items()} for part in range(parts)]


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    values = [x for x in model(**batch).values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).mean() + x.pow(2).mean() for x in values
    )


def with_lora(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        # every linear layer below a list of layers
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear and any(c.isdigit() for c in n.split("."))]
        return get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval().double()


def run_cases(sizes: dict[str, int], dp_size: int, cases: list[str]) -> dict[str, str]:
    """What is wrong with each case; "" is parity. A case ends with " lora" for adapters."""
    found = {}
    for case in cases:
        try:
            found[case] = _run(case, sizes, dp_size)
        except Exception as error:  # reported with the others
            found[case] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:900]
        finally:
            AcceleratorState._reset_state()
            GradientState._reset_state()
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, found[case])
        found[case] = next((a for a in answers if a), "")
    return found


def _run(case: str, sizes: dict[str, int], dp_size: int) -> str:
    name, lora = case.removesuffix(" lora"), case.endswith(" lora")

    def made() -> nn.Module:
        return with_lora(build(name)) if lora else build(name)

    batches = batches_of(build(name), dp_size)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = made()
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=0.1))
    place = dist.get_rank() // accelerator.parallelism_config.non_data_parallel_size
    loss = loss_of(model, batches[place])
    accelerator.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = full_grads(model)
    plan = prepared(model).context.plan
    accelerator.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    if dist.get_rank():
        return ""
    reference = made()
    losses = torch.stack([loss_of(reference, batch) for batch in batches]).mean()
    losses.backward()
    want = {key: p.grad for key, p in reference.named_parameters()}
    verdict = judge(total.item() / dist.get_world_size(), gradients, losses.item(), want)
    if verdict.problems:
        return "; ".join(verdict.problems)[:600]
    rows = [] if plan is None else [e for e in plan.entries.values() if e.style == "rowwise"]
    if plan is not None and not rows:
        return f"nothing is sharded inside: {list(plan.entries)}"
    return ""
