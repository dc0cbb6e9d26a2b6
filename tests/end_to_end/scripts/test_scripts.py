"""Unmodified scripts through the launcher on tp2 x fsdp2: numbers, files and generated text of one process.

Two stand-ins for the public example scripts, and scripts that TRL installs. The launcher's ``main`` runs
in the ranks of a pool, which spares the start of a process for each rank and script.
"""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import accelerate.accelerator
import pytest
import torch
from harness.compare import assert_same_tensors
from harness.pool import run_distributed
from harness.training import build
from safetensors.torch import load_file

from end_to_end.test_trl import tokenizer
from end_to_end.test_trl_groups import GROUP, different_in_each_row, reward_of_rows
from hf_automodel_parallel import launch

HERE = Path(__file__).parent
MESH = "tp=2,dp_shard=2"
RANKS = 4


def run_script(parallel: str | None, script: str, arguments: list[str]) -> None:
    """Run a script file or a module through the launcher; ``parallel=None``: as python does."""
    module = not script.endswith(".py")
    with pytest.MonkeyPatch.context() as patch:
        # What the launcher changes in its process.
        patch.setattr(accelerate.accelerator, "ParallelismConfig", accelerate.accelerator.ParallelismConfig)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", [script, *arguments])
        # The scripts that generate draw the same for a row on every mesh.
        patch.setattr(torch, "multinomial", different_in_each_row(2 if parallel == MESH else 1))
        if parallel is not None:
            launch.main(["--auto_parallel", parallel, *(["-m"] if module else []), script, *arguments])
        elif module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")


def sentence(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(str(generator.randrange(100)) for _ in range(generator.randint(shortest, longest)))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_script_without_a_trainer(tmp_path):
    """Accumulation, clipping, schedule, metrics gathered in two ways, a checkpoint by steps, resuming, saving."""
    generator = random.Random(0)
    files = []
    for name, rows in (("train", 16), ("validation", 11)):  # 11: no number of ranks or rows in a batch divides it
        text = [sentence(generator, 3, 8) for _ in range(rows)]
        files += [f"--{name}_file", write(tmp_path / name, [{"text": t, "label": ord(t[0]) % 2} for t in text])]

    def run(ranks: int, name: str, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
        rows = "4" if ranks == 1 else "2"
        script, output = str(HERE / "classify_without_trainer.py"), tmp_path / name
        arguments = [*files, "--output_dir", str(output), "--batch_size", rows, *more]
        run_distributed(ranks, run_script, None if ranks == 1 else MESH, script, arguments, timeout=240)
        return json.loads((output / "all_results.json").read_text()), load_file(output / "model.safetensors")

    want, weights = run(1, "alone")
    got, parallel = run(RANKS, "parallel", "--checkpointing_steps", "3")
    resumed, again = run(RANKS, "resumed", "--resume_from_checkpoint", str(tmp_path / "parallel" / "step_3"))
    assert want["epoch 1"]["samples"] == len(want["epoch 1"]["predictions"]) == 11
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-4)
    assert resumed["losses"] == pytest.approx(want["losses"][6:], rel=1e-4)
    for key in ("epoch 1", "completed", "rate"):
        assert got[key] == resumed[key] == want[key], key
    assert got["epoch 0"] == want["epoch 0"]
    assert_same_tensors(parallel, weights)
    assert_same_tensors(again, weights)


def test_sequence_to_sequence_script_with_the_trainer(tmp_path):
    """``predict_with_generate``, beams, the best of several checkpoints and early stopping."""
    generator = random.Random(1)
    files = []
    for name, rows in (("train", 24), ("validation", 9)):
        pairs = [{"source": sentence(generator, 3, 8), "target": sentence(generator, 4, 4)} for _ in range(rows)]
        files += [f"--{name}_file", write(tmp_path / name, pairs)]
    options = (
        "--use_cpu --eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2 --logging_steps 1 "
        "--num_train_epochs 2 --save_total_limit 1 --load_best_model_at_end --metric_for_best_model loss --seed 3 "
        "--predict_with_generate --generation_max_length 8 --per_device_eval_batch_size 3 --report_to none "
        "--learning_rate 3e-2 --adam_epsilon 1e-3 --train_sampling_strategy sequential --disable_tqdm True"
    )

    def run(ranks: int, name: str) -> Path:
        output = tmp_path / name
        arguments = [*files, "--output_dir", str(output), *options.split()]
        arguments += ["--per_device_train_batch_size", "4" if ranks == 1 else "2"]
        script = str(HERE / "translate_with_trainer.py")
        run_distributed(ranks, run_script, None if ranks == 1 else MESH, script, arguments, timeout=240)
        return output

    alone, parallel = run(1, "alone"), run(RANKS, "parallel")
    assert_same_history(parallel, alone)
    text = (alone / "generated_predictions.txt").read_text()
    assert len(text.splitlines()) == 9 and (parallel / "generated_predictions.txt").read_text() == text
    assert_same_tensors(load_file(parallel / "model.safetensors"), load_file(alone / "model.safetensors"))
    metrics = [json.loads((path / "predict_results.json").read_text()) for path in (parallel, alone)]
    assert metrics[0]["predict_samples"] == 9
    for key in ("predict_loss", "predict_hits"):
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-4), key


def assert_same_history(parallel: Path, alone: Path) -> None:
    """Losses, norms, rates and evaluations of each step, and the best step."""
    got, want = (json.loads((path / "trainer_state.json").read_text()) for path in (parallel, alone))
    for key in ("best_global_step", "global_step"):
        assert got[key] == want[key], key
    assert len(got["log_history"]) == len(want["log_history"]) > 3
    for entry, wanted in zip(got["log_history"], want["log_history"], strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_hits", "eval_samples"):
            assert_close(key, entry, wanted)


def assert_close(key: str, entry: dict[str, Any], wanted: dict[str, Any], absolute: float | None = None) -> None:
    assert (key in entry) == (key in wanted), (key, entry, wanted)
    if key in wanted:
        assert entry[key] == pytest.approx(wanted[key], rel=1e-4, abs=absolute), (key, entry, wanted)


GENERATION = (
    f"--num_generations {GROUP} --max_completion_length 4 --beta 0.1 --shuffle_dataset False --reward_funcs "
    f"{reward_of_rows.__module__}.{reward_of_rows.__name__}"
)

#: Script of TRL -> columns of its data, further options, and what it logs besides the loss.
TRL_SCRIPTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    # packing, evaluation
    "sft": (
        ("prompt", "completion"),
        "--max_length 32 --eval_strategy steps --eval_steps 3",
        ("num_tokens", "eval_loss", "eval_mean_token_accuracy"),
    ),
    "dpo": (("prompt", "chosen", "rejected"), "--max_length 32", ("entropy", "logps/chosen")),
    # a loss without the estimate of the KL, which is one of each data-parallel rank
    "kto": (("prompt", "completion", "label"), "--loss_type apo_zero_unpaired", ("logps/chosen", "logps/rejected")),
    "reward": (
        ("chosen", "rejected"),
        "--max_length 32 --lora_task_type SEQ_CLS",
        ("mean_reward", "margin", "accuracy"),
    ),
    "grpo": (("prompt",), GENERATION, ("reward", "kl", "entropy", "frac_reward_zero_std", "num_tokens")),
    "rloo": (("prompt",), GENERATION, ("reward", "kl", "entropy", "frac_reward_zero_std", "num_tokens")),
}


@pytest.mark.parametrize("script", TRL_SCRIPTS)
def test_trl_script(script, tmp_path):
    """A model, a tokenizer and data from folders, LoRA, saved files; what the script logs, and the adapter."""
    columns, options, logged = TRL_SCRIPTS[script]
    generator = random.Random(2)
    for split, rows in (("train", 24), ("test", 8)):
        data: list[dict[str, Any]] = [
            {name: " ".join(f"w{generator.randrange(100)}" for _ in range(6)) for name in columns} for _ in range(rows)
        ]
        if "label" in columns:
            data = [row | {"label": index % 2 == 0} for index, row in enumerate(data)]
        write(tmp_path / "data" / f"{split}.jsonl", data)
    model = build("llama")
    if script == "reward":
        model = scored(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options += (
        f" --model_name_or_path {tmp_path / 'model'} --dataset_name {tmp_path / 'data'} --use_cpu --bf16 False --dtype "
        "float32 --max_steps 3 --logging_steps 1 --learning_rate 1e-2 --optim sgd "
        "--train_sampling_strategy sequential --report_to none --disable_tqdm True --use_peft --lora_r "
        "4 --lora_target_modules all-linear --lora_dropout 0 --seed 3 --per_device_eval_batch_size 2"
    )

    def run(ranks: int, name: str) -> Path:
        output = tmp_path / name
        arguments = [*options.split(), "--output_dir", str(output)]
        arguments += ["--per_device_train_batch_size", "4" if ranks == 1 else "2"]
        parallel = None if ranks == 1 else MESH
        run_distributed(ranks, run_script, parallel, f"trl.scripts.{script}", arguments, timeout=240)
        return output

    alone, parallel = run(1, "alone"), run(RANKS, "parallel")
    states = [json.loads((p / "checkpoint-3" / "trainer_state.json").read_text()) for p in (parallel, alone)]
    assert logged[0] in states[1]["log_history"][0]
    for entry, wanted in zip(*(state["log_history"] for state in states), strict=True):
        for key in ("loss", "grad_norm", "learning_rate", *logged):
            # Advantages add up to zero, and so do their losses but for rounding.
            assert_close(key, entry, wanted, 1e-6 if options.startswith(GENERATION) else None)
    adapters = [load_file(path / "adapter_model.safetensors") for path in (parallel, alone)]
    assert_same_tensors(*adapters)


def scored(model: Any) -> Any:
    """A reward model of the same size."""
    from transformers import AutoModelForSequenceClassification

    values = model.config.to_dict() | {"num_labels": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(type(model.config)(**values))
