"""Around checkpoints: exports in their directory, scripts that change theirs, loops within an epoch, the hub."""

import os
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from harness.cuda_standins import cuda_standins
from harness.pool import run_distributed
from harness.training import _Rows, batches_for

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.checkpoints import finish
from hf_automodel_parallel.checkpoint import commit as directory
from hf_automodel_parallel.checkpoint import manifest
from hf_automodel_parallel.checkpoint.background import wait_for_saves
from ranks.checkpoint.jobs import FULL, LORA, SHARDED, Run, build, failing, losses, trainer

FSDP2 = {"dp_shard_size": 2}


def surroundings(root: str) -> dict[str, Any]:
    """Label -> what this rank saw."""
    seen: dict[str, Any] = {}
    rank = dist.get_rank()
    run = Run({"tp_size": 2}, "llama", None, SHARDED, async_save=True)
    # Exports and saves in one directory, in both orders.
    mixed = Path(root, "a dir")
    run.model.save_pretrained(mixed)
    for _ in range(2):
        run.accelerator.save_state(str(mixed))
        wait_for_saves()
        seen["exported"] = (mixed / "model.safetensors").is_file()
        dist.barrier()
        run.steps(0, 1)
        run.model.save_pretrained(mixed)
    seen["loaded"] = failing(lambda: run.accelerator.load_state(str(mixed)))
    # The script changes its directory while a save is under way.
    here = os.getcwd()
    os.chdir(root)
    run.accelerator.save_state("relative")
    os.chdir(here)
    seen["changed"] = failing(wait_for_saves)
    seen["relative"] = directory.status(Path(root, "relative")).kind
    # What comes after a save fails on one rank.
    save = directory.stage(Path(root, "after"))

    def afterwards() -> None:
        if rank == 0:
            raise FileNotFoundError("gone")

    seen["after"] = failing(lambda: finish(save, manifest.Manifest(), [], False, afterwards))
    seen["complete"] = directory.status(save.folder).kind
    return seen


def test_exports_other_directories_and_failures_of_one_rank(tmp_path):
    for seen in run_distributed(2, surroundings, str(tmp_path)):
        assert seen["exported"] and seen["loaded"] == "no error"
        assert seen["changed"] == "no error" and seen["relative"] == "complete"
        assert "FileNotFoundError: gone" in seen["after"] and seen["complete"] == "complete"


def spoilt_generation(sizes: dict[str, int]) -> tuple[str, float, tuple[int, ...]]:
    """A generation that fails on one rank between two forwards, and one after it."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = accelerator.prepare(build("llama", None)).eval()
    rank, calls = dist.get_rank(), []

    def spoil(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise ValueError("spoilt")
        return scores

    begun = time.monotonic()
    message = failing(
        lambda: model.generate(torch.arange(4)[None], max_new_tokens=6, logits_processor=[spoil], do_sample=False)
    )
    seconds = time.monotonic() - begun
    return message, seconds, tuple(model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape)


@pytest.mark.parametrize("sizes", [FSDP2, {"tp_size": 2}], ids=["fsdp2", "tp2"])
def test_a_generation_that_fails_on_one_rank_ends_on_all(sizes):
    results = run_distributed(2, spoilt_generation, sizes, timeout=60)
    for (message, seconds, shape), wanted in zip(
        results, ("PrepareError: generate() failed on another rank", "ValueError: spoilt"), strict=True
    ):
        assert wanted in message and seconds < 30 and shape == (1, 7)


def within_an_epoch(folder: str) -> tuple[list[float], list[float]]:
    """A plain loop with dropout that saves within an epoch, and one with other seeds that resumes there."""

    def go(seed: int, resume: bool) -> list[float]:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**FSDP2))
        set_seed(seed + dist.get_rank())
        model = build("llama", LORA | {"lora_dropout": 0.3})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        rows = torch.randint(0, 60, (24, 8), generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        found: list[float] = []
        if resume:
            accelerator.load_state(folder)
        for index, batch in enumerate(accelerator.skip_first_batches(data, 3) if resume else data):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if index == 2 and not resume:
                accelerator.save_state(folder)
                found.clear()
        return found

    return go(1, False), go(2, True)


def test_a_plain_loop_with_dropout_continues_within_an_epoch_to_the_last_bit(tmp_path):
    for want, got in run_distributed(2, within_an_epoch, str(tmp_path / "state")):
        assert len(want) == 3 and got == want


# ---- the Trainer ---------------------------------------------------------------------------------------------------


class _Hub:
    """Keeps what would be uploaded: directory, path in the repository, names."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, str | None, list[str]]] = []

    def create_repo(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(repo_id="me/model")

    def upload_folder(
        self, *, folder_path: str, path_in_repo: str | None = None, run_as_future: bool = False, **_: Any
    ) -> Any:
        self.uploads.append((Path(folder_path).name, path_in_repo, os.listdir(folder_path)))
        done: Any = Future()
        done.set_result(None)
        done.is_done = done.done
        return done if run_as_future else SimpleNamespace(commit_url="here")


def with_hub(root: str) -> dict[str, Any]:
    import transformers.trainer

    seen: dict[str, Any] = {}
    for strategy, kind, options in (
        ("checkpoint", SHARDED, {}),
        ("every_save", FULL, {}),
        ("every_save", SHARDED, {}),
        ("all_checkpoints", FULL, {"async_save": True}),
    ):
        hub = _Hub()
        with (
            mock.patch.object(transformers.trainer, "hf_api", lambda hub=hub: hub),
            mock.patch.object(transformers.Trainer, "create_model_card", lambda *_, **__: None),
        ):
            options = {"push_to_hub": True, "hub_strategy": strategy, **options}
            made = trainer(FSDP2, kind, f"{root}/{strategy}-{kind}", None, 2, 2, **options)
            seen[f"{strategy} {kind}"] = failing(made.train), hub.uploads
            if (strategy, kind) == ("checkpoint", SHARDED):
                made.push_to_hub()
    # Alone, rank 0 would wait for ever.
    os.environ["HF_AUTOMODEL_PARALLEL_SAVE_TIMEOUT"] = "3"
    made.args.push_to_hub = False
    made = trainer(FSDP2, FULL, f"{root}/alone", None, 1, 2, save_strategy="no")
    made.train()
    seen["alone"] = failing(lambda: made.save_model(f"{root}/alone")) if dist.get_rank() == 0 else time.sleep(5)
    return seen


def test_the_hub_gets_complete_checkpoints_and_models(tmp_path):
    seen, other = run_distributed(2, with_hub, str(tmp_path), timeout=180)
    message, uploads = seen["checkpoint SHARDED_STATE_DICT"]
    assert message == "no error"
    (folder, place, names) = uploads[1]
    assert (folder, place) == ("checkpoint-2", "last-checkpoint")
    assert manifest.MANIFEST in names and manifest.MARK not in names and "optimizer_0" in names
    assert len(uploads) == 3 and "model.safetensors" in uploads[2][2]
    message, uploads = seen["every_save FULL_STATE_DICT"]
    assert message == "no error" and "model.safetensors" in uploads[0][2]
    for result in (seen, other):
        assert "SHARDED_STATE_DICT does not write" in result["every_save SHARDED_STATE_DICT"][0]
        assert "async_save=True writes it later" in result["all_checkpoints FULL_STATE_DICT"][0]
    assert "save_model() on a sharded model is called by all ranks" in seen["alone"]


def without_skipping(root: str) -> dict[str, list[int]]:
    """Sums of the tokens of each step: of a run, and of those that resume it."""
    seen: dict[str, list[int]] = {}
    for label, options in (
        ("whole", {"save_total_limit": None}),
        ("skips", {"save_strategy": "no"}),
        ("ignores", {"save_strategy": "no", "ignore_data_skip": True}),
    ):
        made = trainer(FSDP2, FULL, root, None, 6, 2, **options)
        step, sums = made.training_step, []

        def noting(model: Any, inputs: Any, *args: Any, step: Any = step, sums: list[int] = sums) -> Any:
            sums.append(int(inputs["input_ids"].sum()))
            return step(model, inputs, *args)

        made.training_step = noting
        made.train(resume_from_checkpoint=None if label == "whole" else f"{root}/checkpoint-2")
        seen[label] = sums
    return seen


def test_ignore_data_skip_reads_the_epoch_from_its_beginning(tmp_path):
    for seen in run_distributed(2, without_skipping, str(tmp_path)):
        assert seen["skips"] == seen["whole"][2:] and seen["ignores"] == seen["whole"][:4]


def megatron_resumes(root: str) -> list[list[float]]:
    from transformers import Trainer, TrainingArguments

    found = []
    for resume in (None, f"{root}/checkpoint-2"):
        with cuda_standins():
            args = TrainingArguments(
                output_dir=root,
                use_cpu=True,
                per_device_train_batch_size=2,
                max_steps=4,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                save_strategy="steps",
                save_steps=2,
                parallelism_config=AutoParallelismConfig(**FSDP2, backend="megatron_fsdp"),
            )
            model = build("llama", None, seed=5 if resume else 0)
            data = _Rows([batch for step in range(4) for batch in batches_for(model, 1, rows=4, seed=50 + step)])
            made = Trainer(model, args, train_dataset=data)
            made.train(resume_from_checkpoint=resume)
            found.append(losses(made))
    return found


def test_the_trainer_resumes_with_megatron_fsdp(tmp_path):
    for want, got in run_distributed(2, megatron_resumes, str(tmp_path)):
        assert len(want) == 4 and got == want
