"""TRL's trainers that generate: groups of completions that span data-parallel ranks, on tp meshes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import build

from end_to_end.test_trl import arguments, gathers_of, texts, tokenizer
from hf_automodel_parallel import AutoParallelismConfig

GROUP = 4
NOT_COUNTED = ("_time", "_runtime", "_per_second", "total_flos")


def rewards_by_position(copies: int) -> Any:
    """A reward of each row by its place in the batch over all data-parallel ranks; groups have unequal rewards."""

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        first = dist.get_rank() // copies * len(prompts)
        return [float((first + row) ** 2 % 7) for row in range(len(prompts))]

    return reward


def reward_of_rows(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """For scripts, which name a function, on one rank and on tp2 x fsdp2."""
    return rewards_by_position(min(dist.get_world_size(), 2))(prompts, completions)


def different_in_each_row(copies: int) -> Any:
    """A stand-in for sampling that draws the same for a row on every mesh, and something else for each row."""

    def draw(probabilities: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = torch.arange(len(probabilities)) + dist.get_rank() // copies * len(probabilities)
        place = ((rows + 1) * 0.618034) % 1 * probabilities.sum(-1)
        return torch.searchsorted(probabilities.cumsum(-1), place[:, None])

    return draw


def trainer_of(name: str, sizes: dict[str, int] | None, rows: int, folder: str, options: dict[str, Any]) -> Any:
    import trl

    config = AutoParallelismConfig(**sizes) if sizes else None
    copies = (sizes or {}).get("tp_size", 1)
    torch.manual_seed(0)
    args = arguments(
        getattr(trl, f"{name}Config"),
        folder,
        config,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        num_generations=GROUP,
        max_completion_length=4,
        beta=0.1,
        model_init_kwargs={"dtype": "float32"},
        optim="sgd",
        shuffle_dataset=False,
        **options,
    )
    return getattr(trl, f"{name}Trainer")(
        folder,
        args=args,
        reward_funcs=rewards_by_position(copies),
        train_dataset=texts(("prompt",), 24),
        eval_dataset=texts(("prompt",), 3),
        processing_class=tokenizer(),
    )


def generate(name: str, sizes: dict[str, int] | None, rows: int, folder: str, options: dict[str, Any]) -> Any:
    trainer = trainer_of(name, sizes, rows, folder, options)
    copies = (sizes or {}).get("tp_size", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", different_in_each_row(copies))
        trainer.train()
    return (
        trainer.state.log_history,
        {name: list(values) for name, values in trainer._logs["rewards"].items()},
        list(trainer._logs["prompt"]),
    )


def alone(*args: Any) -> Any:
    assert dist.get_world_size() == 1
    return generate(*args)


CASES = {
    "GRPO": {"gradient_accumulation_steps": 2, "scale_rewards": "batch"},
    "RLOO": {"eval_strategy": "steps", "eval_steps": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_groups_of_completions_span_data_parallel_ranks(name, tmp_path):
    """Rewards, their deviations, losses, norms, numbers of tokens, prompts of each generation: those of one process.

    A group of four is two rows of one data-parallel rank and two of another, and each rank has a copy of its own rows.
    """
    world, sizes, ranks = MESHES["tp2_fsdp2"]
    build("llama").save_pretrained(tmp_path)
    options = CASES[name]
    want = run_distributed(1, alone, name, None, 4, str(tmp_path), options, timeout=240)[0]
    got = run_distributed(world, generate, name, sizes, 4 // ranks, str(tmp_path), options, timeout=240)[0]
    assert got[1:] == want[1:]
    assert len(got[0]) == len(want[0]) >= 4
    for entry, wanted in zip(got[0], want[0], strict=True):
        counted = {key: value for key, value in wanted.items() if not key.endswith(NOT_COUNTED)}
        assert {key: entry.get(key) for key in counted} == pytest.approx(counted, rel=1e-4, abs=1e-6)
    assert all(entry["grad_norm"] > 1e-2 for entry in got[0] if "grad_norm" in entry), got[0]


def test_neither_head_nor_logits_are_gathered(tmp_path):
    """In the losses and backwards of GRPO; the generation in front of them reads the logits of single tokens."""
    build("llama").save_pretrained(tmp_path)
    given = ("GRPO", {"tp_size": 2}, 4, str(tmp_path), {})
    sizes = run_distributed(2, gathers_of, trainer_of, *given, timeout=240)[0]
    assert len(sizes) == 6 and max(sizes) <= 16, sizes
