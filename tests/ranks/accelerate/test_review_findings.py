"""What reviewers found wrong once: each would have trained or failed silently, or on some ranks only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.pool import expect_error, run_distributed
from harness.training import _Rows, batches_for, build, trainable

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError


def prepared_llama(**sizes: int) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama")
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    return accelerator, model


def names_of(sizes: dict[str, int]) -> tuple[str, str]:
    _, model = prepared_llama(**sizes)
    return model._get_name(), type(model.model.layers[0]).__name__


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_shard_size": 2}], ids=["tp2", "fsdp2"])
def test_classes_keep_their_names(sizes):
    """The Trainer looks the class name up to decide whether label smoothing shifts the labels."""
    assert run_distributed(2, names_of, sizes) == [("LlamaForCausalLM", "LlamaDecoderLayer")] * 2


def smoothed_loss(output_dir: str, distributed: bool) -> float:
    from transformers import Trainer, TrainingArguments

    model = build("llama")
    args = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        label_smoothing_factor=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=AutoParallelismConfig(tp_size=2) if distributed else None,
    )
    trainer = Trainer(model, args, train_dataset=_Rows(batches_for(model, 1)))
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def test_label_smoothing_shifts_labels(tmp_path):
    got = run_distributed(2, smoothed_loss, str(tmp_path), True)[0]
    assert got == pytest.approx(smoothed_loss(str(tmp_path), False), rel=1e-6)


def evaluate_with_a_plain_accelerator() -> None:
    from accelerate.state import AcceleratorState

    _, model = prepared_llama(tp_size=2)
    AcceleratorState._reset_state()  # what a second TrainingArguments does
    Accelerator(cpu=True)
    with torch.no_grad():
        model.eval()(**batches_for(model, 1)[0])


def test_second_trainer_without_the_config_is_refused():
    """It would deal different batches to the ranks of one tp group, which would add them up."""
    expect_error(2, evaluate_with_a_plain_accelerator, match="same AutoParallelismConfig")


def tied_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama_tied" if dist.get_rank() == 0 else "llama")
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def buffer_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build("llama")
    if dist.get_rank() == 1:
        model.register_buffer("extra", torch.zeros(3))
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("job", [tied_on_one_rank, buffer_on_one_rank])
def test_models_that_differ_in_ties_or_buffers(job):
    expect_error(2, job, match="not the same on all ranks")


def two_models_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    models = [build("llama") for _ in range(1 + dist.get_rank())]
    accelerator.prepare(*models, torch.optim.SGD(models[0].parameters(), lr=0.1))


def test_a_mistake_in_the_arguments_of_one_rank_ends_all():
    expect_error(2, two_models_on_one_rank, match="2 models in one prepare call")


def save_by_the_documented_recipe(directory: str) -> None:
    accelerator, model = prepared_llama(tp_size=2)
    state_dict = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        directory,
        state_dict=state_dict,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )


def test_save_pretrained_with_the_gathered_state_dict(tmp_path):
    """As Accelerate's documentation does; without a state dict: test_export.py."""
    from transformers import LlamaForCausalLM

    run_distributed(2, save_by_the_documented_recipe, str(tmp_path))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in build("llama").state_dict().items())


def test_experts_that_nothing_shards_are_refused():
    """A copy made by modules_to_save has no entries for its weights; summing whole experts would count them tp
    times.
    """
    from hf_automodel_parallel.plan.resolve import resolve
    from hf_automodel_parallel.plan.select import select_plan

    with torch.device("meta"):
        model = build("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]})
    with pytest.raises(UnsupportedError, match="moe_tp_experts.*shards none of its weights"):
        resolve(model, select_plan(model), 2)


def test_an_overflow_does_not_use_up_the_audit():
    assert run_distributed(2, audit_of_an_overflow) == [[False, True]] * 2


def audit_of_an_overflow() -> list[bool]:
    from hf_automodel_parallel.accelerate_plugin.prepared import prepared

    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
    audited = []
    for factor in (float("inf"), 1.0):
        accelerator.backward(model(**batches_for(model, 1)[0]).loss)
        if factor != 1.0:
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.param_groups[0]["params"] = []  # the hook looks at the model; the values must survive
        optimizer.step()
        if factor != 1.0:
            optimizer.param_groups[0]["params"] = parameters
        optimizer.zero_grad()
        audit = prepared(model).audit
        audited.append(audit is not None and audit.done > 0)
    return audited


def with_a_policy_of_its_own() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=lambda module, **_: False)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2), fsdp_plugin=plugin)
    model = build("llama")
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_wrap_policy_that_nobody_would_call_is_refused():
    expect_error(2, with_a_policy_of_its_own, match="auto_wrap_policy")
