"""Configs that cannot be honoured end in one clear error on *every* rank within seconds: never a hang, never a wrong
result.
"""

from typing import Any

import pytest
from accelerate import Accelerator
from harness.models import build_model
from harness.pool import expect_error, run_distributed

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import TP2, call_prepare, sgd, with_plugin

# ---- the config ---------------------------------------------------------------------------------------------------


@pytest.mark.core_cases("too_many", "two_axes")
@pytest.mark.parametrize(
    "world, sizes, message",
    [
        (2, {"tp": 3}, r"tp_size=3.* multiply to 3, but there are 2 processes\. Start 3 processes"),
        (2, {"tp": 4}, r"tp_size=4.*but there are 2 processes\. Start 4 processes"),
        (4, {"tp": 2, "dp_shard": 4}, r"dp_shard_size=4, tp_size=2.* multiply to 8, but there are 4 processes"),
        (
            4,
            {"tp": 2, "dp_shard": 1, "dp_replicate": 1},
            r"multiply to 2, but there are 4 processes\. Start 2 processes",
        ),
        (4, {"tp": 3}, r"a multiple of 3 processes, or change a size so that the product is 4"),
    ],
    ids=["too_many", "twice_too_many", "two_axes", "too_few", "remainder"],
)
def test_sizes_that_do_not_multiply_to_the_world(world, sizes, message):
    expect_error(world, call_prepare, sizes, match=message)


@pytest.mark.core_cases("tp=two-tp_size='two'")
@pytest.mark.parametrize(
    "text, message",
    [
        ("tq=2", r"unknown field 'tq'.*did you mean 'tp'"),
        ("tp=two", r"tp_size='two'"),
        ("sequence_parallel,tp=1", r"sequence_parallel=True with tp_size=1"),
        ("tp=2,plan_order=hugging_face", r"plan_order=\('hugging_face',\)"),
    ],
)
def test_config_that_cannot_be_read(text, message):
    expect_error(2, call_prepare, text, match=message)


def test_config_file_that_does_not_parse(tmp_path):
    path = tmp_path / "parallel.yaml"
    path.write_text("tp: [2\n")
    expect_error(2, call_prepare, str(path), match=r"parallel\.yaml' is not valid YAML or JSON")


def accelerator_with(kind: str) -> None:
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, TorchTensorParallelPlugin

    options: dict[str, Any] = {
        "plugin": lambda: {"torch_tp_plugin": TorchTensorParallelPlugin(tp_size=2)},
        "hook": lambda: {"kwargs_handlers": [DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)]},
    }[kind]()
    Accelerator(parallelism_config=AutoParallelismConfig(**TP2), **options)


@pytest.mark.core_cases("plugin-torch_tp_plugin beside AutoParallelismConfig")
@pytest.mark.parametrize(
    "kind, message",
    [("plugin", "torch_tp_plugin beside AutoParallelismConfig"), ("hook", "comm_hook='bf16'.*reduce_dtype")],
)
def test_what_accelerate_would_drop(kind, message):
    expect_error(2, accelerator_with, kind, match=message)


def config_after_accelerator(first_config: dict | None) -> None:
    Accelerator(parallelism_config=None if first_config is None else AutoParallelismConfig(**first_config))
    Accelerator(parallelism_config=AutoParallelismConfig(**TP2))


@pytest.mark.core
def test_config_that_comes_after_an_accelerator():
    """Accelerate shares one state between all Accelerators and would ignore the config without a word."""
    expect_error(
        2, config_after_accelerator, None, match=r"created after an Accelerator already exists.*the first Accelerator"
    )


def test_second_accelerator_of_a_parallel_run_is_no_mistake():
    """For example that of a second Trainer with the same arguments."""
    run_distributed(2, config_after_accelerator, TP2)


# ---- what Accelerate was given beside the config ------------------------------------------------------------------


@pytest.mark.core_cases("plugin_and_model")
@pytest.mark.parametrize(
    "options, own, config, message",
    [
        ({"activation_checkpointing": True}, True, {}, r"activation_checkpointing='full' and the model's own gradient"),
        ({"activation_checkpointing": True}, False, {"activation_checkpointing": "none"}, r"contradict each other"),
        (
            {"activation_checkpointing": True},
            False,
            {"activation_checkpointing": "selective"},
            r"contradict each other",
        ),
        ({}, True, {"activation_checkpointing": "submodule"}, r"'submodule' and the model's own gradient"),
    ],
    ids=["plugin_and_model", "plugin_and_none", "plugin_and_selective", "config_and_model"],
)
def test_two_wishes_for_checkpointing(options, own, config, message):
    """Layers would be recomputed twice, or one of the wishes ignored."""
    expect_error(2, with_plugin, TP2, {"fsdp_version": 2, **options}, own, match=message, **config)


@pytest.mark.parametrize("precision, message", [("fp16", r"fp16"), ("fp8", r"fp8")])
def test_precision_that_the_cpu_does_not_have(precision, message):
    """Whoever refuses it, we or Accelerate, does it on all ranks and names it."""
    expect_error(2, call_prepare, TP2, match=message, mixed_precision=precision)


@pytest.mark.core
def test_compile_backend_that_does_not_exist():
    expect_error(2, call_prepare, {**TP2, "compile": "inducktor"}, match=r"compile='inducktor'.*inductor")


def with_device_placement() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    model = build_model("llama")
    accelerator.prepare(model, sgd(model), device_placement=[True, False])


@pytest.mark.core
def test_device_placement():
    expect_error(2, with_device_placement, match=r"device_placement cannot be customised.*Leave it out")
