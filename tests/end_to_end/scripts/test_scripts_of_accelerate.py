"""The scripts that Accelerate installs for testing itself, through the launcher: they pass, or say why they cannot.

Each script checks itself. Of those that load GLUE, its metric and BERT from the hub, these are made here.
"""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import accelerate
import accelerate.accelerator
import datasets
import pytest
import torch
from harness.compare import assert_same_tensors
from harness.meshes import each_mesh
from harness.pool import expect_error, run_distributed
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from end_to_end.scripts.test_scripts import run_script, sentence
from end_to_end.test_trl import tokenizer
from hf_automodel_parallel import launch
from hf_automodel_parallel.errors import ConfigError

PACKAGE = "accelerate.test_utils.scripts"
#: Mesh -> ranks, flag of the launcher.
FLAGS: dict[str, tuple[int, str | None]] = {
    "alone": (1, None),
    "tp2": (2, "tp=2"),
    "fsdp2": (2, "dp_shard=2"),
    "tp2_fsdp2": (4, "tp=2,dp_shard=2"),
}
#: The model of ``test_metrics``; here of a folder.
NAME = "hf-internal-testing/mrpc-bert-base-cased"
VALIDATION = 75  # no batch size of the scripts divides it


class Accuracy:
    """What the scripts use of ``evaluate.load("glue", "mrpc")``; refuses to count a sample twice."""

    def __init__(self) -> None:
        self.hits: list[bool] = []

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self.hits += (predictions == references).tolist()

    def compute(self) -> dict[str, float]:
        assert len(self.hits) == VALIDATION, f"{len(self.hits)} samples"
        accuracy = sum(self.hits) / len(self.hits)
        self.hits = []
        return {"accuracy": accuracy, "f1": accuracy}


def pairs(path: str, name: str, split: str | None = None) -> Any:
    """In place of ``load_dataset("nyu-mll/glue", "mrpc")``."""
    assert (path, name) == ("nyu-mll/glue", "mrpc")
    generator = random.Random(0)

    def row(index: int) -> dict[str, Any]:
        texts = [" ".join("w" + word for word in sentence(generator, 3, 9).split()) for _ in range(2)]
        return {"idx": index, "label": generator.randrange(2), "sentence1": texts[0], "sentence2": texts[1]}

    counts = {"train": 128, "validation": VALIDATION}
    parts = {part: datasets.Dataset.from_list([row(i) for i in range(rows)]) for part, rows in counts.items()}
    return datasets.DatasetDict(parts) if split is None else parts[split]


def replace_hub(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(datasets, "load_dataset", pairs)
    patch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda *_: Accuracy()))


def run(mesh: str, script: str, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        run_script(FLAGS[mesh][1], f"{PACKAGE}.{script}", arguments)


def on_ranks(mesh: str, script: str, *arguments: str) -> None:
    run_distributed(FLAGS[mesh][0], run, mesh, script, list(arguments), timeout=120)


@pytest.fixture
def model(tmp_path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=104, max_position_embeddings=128, initializer_range=0.2, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / NAME)
    tokenizer().save_pretrained(tmp_path / NAME)
    return str(tmp_path / NAME)


@each_mesh
def test_operations(mesh):
    on_ranks(mesh, "test_ops")


@pytest.mark.parametrize(("mesh", "like"), [("tp2", "alone"), ("tp2_fsdp2", "fsdp2")])
def test_checkpointing(mesh, like, model, tmp_path):
    """Resumes with the same accuracy and rates; tensor parallelism changes none of them."""
    states = []
    for each in (mesh, like):
        (folder := tmp_path / each).mkdir()
        options = ("--model_name_or_path", model, "--output_dir", str(folder), "--partial_train_epoch", "1")
        on_ranks(each, "external_deps.test_checkpointing", *options)
        on_ranks(
            each, "external_deps.test_checkpointing", *options, "--resume_from_checkpoint", str(folder / "epoch_0")
        )
        states.append(json.loads((folder / "state_0.json").read_text()))
    assert states[0] == states[1] and states[0]["step"] == (8 if like == "alone" else 4)


def test_performance(model, tmp_path):
    """Its check of the rate counts all processes as data-parallel ones, so that only FSDP2 alone passes it."""
    options = ["--model_name_or_path", model, "--output_dir", str(tmp_path), "--num_epochs", "2"]
    on_ranks("fsdp2", "external_deps.test_performance", *options)
    start, end = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert start.keys() == end.keys()
    with pytest.raises(AssertionError):
        assert_same_tensors(start, end)
    script = "external_deps.test_performance"
    for mesh in ("tp2", "tp2_fsdp2"):
        expect_error(FLAGS[mesh][0], run, mesh, script, options, match="Wrong lr found at second step", within=60)


def in_this_process(mesh: str, patch: pytest.MonkeyPatch) -> None:
    """What the launcher does before it runs a script."""
    patch.setattr(accelerate.accelerator, "ParallelismConfig", accelerate.accelerator.ParallelismConfig)
    launch.install(FLAGS[mesh][1])


def metrics_of_classifier(mesh: str, folder: str) -> None:
    """The part of ``test_metrics`` that the script runs on GPUs only."""
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(patch)
        patch.chdir(folder)  # with a folder that has the name of its model
        in_this_process(mesh, patch)
        from accelerate.test_utils.scripts.external_deps import test_metrics as script

        for split_batches in (True, False):
            script.test_mrpc(False, split_batches)
            accelerate.Accelerator().state._reset_state()
            if "tp" in mesh:
                with pytest.raises(ConfigError, match="dispatch_batches=True does not know tensor"):
                    script.test_mrpc(True, split_batches)
            else:
                script.test_mrpc(True, split_batches)
            accelerate.Accelerator().state._reset_state()
        script.test_gather_for_metrics_with_non_tensor_objects_iterable_dataset()


@each_mesh
def test_metrics(mesh, model, tmp_path):
    run_distributed(FLAGS[mesh][0], metrics_of_classifier, mesh, str(tmp_path), timeout=120)


def test_metrics_of_a_model_of_scalars():
    on_ranks("fsdp2", "external_deps.test_metrics")


def data_loop() -> None:
    """What ``test_distributed_data_loop`` checks of data loaders; its models have no optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        in_this_process("fsdp2", patch)
        from accelerate.test_utils.scripts import test_distributed_data_loop as script

        for name in (
            "test_can_join_uneven_inputs",
            "test_join_can_override_even_batches",
            "test_join_can_override_for_mixed_type_dataloaders",
            "test_join_raises_warning_for_iterable_when_overriding_even_batches",
            "test_stateful_dataloader",  # these two need torchdata
            "test_stateful_dataloader_save_state",
        ):
            patch.setattr(script, name, lambda *_: None)
        script.main()


def test_data_loop():
    run_distributed(2, data_loop, timeout=120)


#: Script -> mesh -> what it ends with.
REFUSED = {
    "test_sync": {"tp2": "no tensor-parallel plan for the class RegressionModel"},
    "test_script": {
        "tp2": "no tensor-parallel plan for the class RegressionModel",
        # After its training loops: FSDP2's parameters are DTensors.
        "fsdp2": "Comparing a DTensor to a non-DTensor is ambiguous",
    },
    "test_distributed_data_loop": {"fsdp2": "this model was prepared without an optimizer, for evaluation"},
    "test_merge_weights": {"tp2": "fsdp_version=1", "fsdp2": "fsdp_version=1"},
    "test_ddp_comm_hook": {"fsdp2": "this model was prepared without an optimizer, for evaluation"},
    "external_deps.test_metrics": {"tp2": "no tensor-parallel plan for the class RegressionModel"},
}


@pytest.mark.parametrize(("script", "mesh"), [(script, mesh) for script in REFUSED for mesh in REFUSED[script]])
def test_scripts_that_fsdp2_cannot_run(script, mesh):
    """Accelerate's own FSDP2 refuses them, too: models without an optimizer, parameters without dimensions."""
    expect_error(2, run, mesh, script, [], match=REFUSED[script][mesh], within=60)
