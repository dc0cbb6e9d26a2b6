"""TRL's trainers on tp2 x fsdp2, on a model and a tokenizer made here: losses of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.collectives import CollectiveCounter
from harness.compare import assert_same_tensors, full_parameters
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import _Rows, batches_for, build
from transformers import Trainer

from hf_automodel_parallel import AutoParallelismConfig

WORDS = [f"w{index}" for index in range(100)]
ADAPTER = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "init_lora_weights": False}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentence(generator: torch.Generator, longest: int) -> str:
    length = int(torch.randint(2, longest, (), generator=generator))
    return " ".join(WORDS[int(i)] for i in torch.randint(100, (length,), generator=generator))


def texts(columns: tuple[str, ...], rows: int = 64) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list([{name: sentence(generator, 10) for name in columns} for _ in range(rows)])


def in_order(trainer_class: type) -> type:
    """Only the order of the data is fixed; everything else is TRL's."""
    from torch.utils.data import SequentialSampler

    def sampler(self: Any, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    return type(f"InOrder{trainer_class.__name__}", (trainer_class,), {"_get_train_sampler": sampler})


def arguments(base: type, output_dir: str, config: AutoParallelismConfig | None, **options: Any) -> Any:
    from hf_automodel_parallel import AutoParallelArgumentsMixin

    parallel = dataclass(type("Parallel" + base.__name__, (AutoParallelArgumentsMixin, base), {"__annotations__": {}}))
    return parallel(
        output_dir=output_dir,
        use_cpu=True,
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        seed=0,
        parallelism_config=config,
        **options,
    )


def history(trainer: Any, *metrics: str) -> list[tuple[float, ...]]:
    trainer.train()
    names = ("loss", "grad_norm", *metrics)
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def sft_trainer(sizes: dict[str, int] | None, rows: int, output_dir: str) -> Any:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = AutoParallelismConfig(**sizes) if sizes else None
    options = {"per_device_train_batch_size": rows, "max_length": 48, "packing": True, "completion_only_loss": True}
    args = arguments(SFTConfig, output_dir, config, **options)
    assert args.gradient_checkpointing, "TRL's default"
    torch.manual_seed(0)
    return in_order(SFTTrainer)(
        build("llama"),
        args,
        train_dataset=texts(("prompt", "completion")),
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER),
    )


def sft(*args: Any) -> list[tuple[float, ...]]:
    return history(sft_trainer(*args), "entropy", "mean_token_accuracy")


def dpo_trainer(
    sizes: dict[str, int] | None, rows: int, output_dir: str, lora: bool = True, reference: bool = False
) -> Any:
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    config = AutoParallelismConfig(**sizes) if sizes else None
    # Not AdamW: its first step is the sign of the gradient, and log ratios (0 at the start) show every flipped
    # rounding.
    options = {"per_device_train_batch_size": rows, "max_length": 48, "optim": "sgd"}
    args = arguments(DPOConfig, output_dir, config, **options)
    torch.manual_seed(0)
    return in_order(DPOTrainer)(
        model=build("llama"),
        args=args,
        train_dataset=texts(("prompt", "chosen", "rejected")),
        processing_class=tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER) if lora else None,
        ref_model=build("llama", seed=5) if reference else None,
    )


def dpo(
    sizes: dict[str, int] | None, rows: int, output_dir: str, lora: bool = True, reference: bool = False
) -> list[tuple[float, ...]]:
    trainer = dpo_trainer(sizes, rows, output_dir, lora, reference)
    metrics = ("entropy", "mean_token_accuracy", "logps/chosen", "logits/chosen", "rewards/chosen")
    result = history(trainer, *metrics)
    if reference:
        assert all(parameter.grad is None for parameter in trainer.ref_model.parameters()), "the reference is frozen"
        evaluation = trainer.evaluate(trainer.train_dataset)
        result.append((evaluation["eval_loss"], evaluation["eval_rewards/margins"]))
    return result


def alone(rank_zero_only: Any, *args: Any) -> Any:
    """The same trainer in one process: the only rank of its world."""
    assert dist.get_world_size() == 1
    return rank_zero_only(None, *args)


def assert_same(got: list[tuple[float, ...]], want: list[tuple[float, ...]]) -> None:
    assert len(got) == len(want) >= 3
    for (loss, *others), (want_loss, *wanted) in zip(got, want, strict=True):
        assert loss == pytest.approx(want_loss, rel=1e-6), (got, want)
        assert others == pytest.approx(wanted, rel=1e-5, abs=1e-6), (got, want)


def largest_gathers(trainer: Any) -> list[int]:
    """Elements of the largest all-gather in the loss of each step, the trainer's metrics included, and its backward."""
    sizes = []

    def counted(call: Any) -> Any:
        def call_and_count(*args: Any, **kwargs: Any) -> Any:
            with CollectiveCounter() as counter:
                result = call(*args, **kwargs)
            assert counter.counts.total["all_reduce"] > 0, "the layers are sharded"
            sizes.append(counter.counts.largest["all_gather"])
            return result

        return call_and_count

    trainer.compute_loss = counted(trainer.compute_loss)
    trainer.accelerator.backward = counted(trainer.accelerator.backward)
    trainer.train()
    return sizes


def gathers_of(builder: Any, *args: Any) -> list[int]:
    return largest_gathers(builder(*args))


@pytest.mark.parametrize("builder", [sft_trainer, dpo_trainer])
def test_neither_head_nor_logits_are_gathered(builder, tmp_path):
    sizes = run_distributed(2, gathers_of, builder, {"tp_size": 2}, 4, str(tmp_path), timeout=240)[0]
    assert len(sizes) == 6 and max(sizes) <= 16, "metrics alone; one row of the head has 64 elements"


def test_sft_lora_packed_completion_only_with_checkpointing(tmp_path):
    sizes = {"tp_size": 2, "dp_shard_size": 2}
    got = run_distributed(4, sft, sizes, 2, str(tmp_path), timeout=240)[0]
    assert_same(got, run_distributed(1, alone, sft, 4, str(tmp_path), timeout=240)[0])


def test_dpo_lora_with_the_disabled_adapter_as_reference(tmp_path):
    got = run_distributed(4, dpo, {"tp_size": 2, "dp_shard_size": 2}, 2, str(tmp_path), timeout=240)[0]
    assert_same(got, run_distributed(1, alone, dpo, 4, str(tmp_path), timeout=240)[0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_with_a_frozen_reference_model_beside_the_trained_one(lora, tmp_path):
    """Losses and norms of three steps, and an evaluation with what both models say."""
    sizes = {"tp_size": 2, "dp_shard_size": 2}
    got = run_distributed(4, dpo, sizes, 2, str(tmp_path), lora, True, timeout=240)[0]
    assert_same(got, run_distributed(1, alone, dpo, 4, str(tmp_path), lora, True, timeout=240)[0])


def synchronised_reference(sizes: dict[str, int] | None, rows: int, output_dir: str) -> dict[str, torch.Tensor]:
    """The reference model that TRL shards and moves towards the trained one (GRPO and RLOO, ``sync_ref_model``)."""
    from transformers import TrainingArguments
    from trl.models import prepare_fsdp
    from trl.trainer.callbacks import SyncRefModelCallback

    config = AutoParallelismConfig(**sizes) if sizes else None
    options = {"per_device_train_batch_size": rows, "optim": "sgd", "average_tokens_across_devices": True}
    args = arguments(TrainingArguments, output_dir, config, **options)
    args.ref_model_sync_steps, args.ref_model_mixup_alpha = 2, 0.5
    data = _Rows([batch for step in range(3) for batch in batches_for(build("llama"), 1, seed=step)])
    trainer = in_order(Trainer)(build("llama"), args, train_dataset=data)
    reference = build("llama", seed=5)
    if sizes:
        reference = prepare_fsdp(reference, trainer.accelerator)
    trainer.add_callback(SyncRefModelCallback(reference, trainer.accelerator))
    trainer.train()
    return full_parameters(reference)


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_a_reference_model_follows_the_trained_one(mesh, tmp_path):
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(world, synchronised_reference, sizes, 4 // dp_size, str(tmp_path))[0]
    want = run_distributed(1, alone, synchronised_reference, 4, str(tmp_path))[0]
    start = build("llama", seed=5).state_dict()
    assert not torch.equal(want["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert_same_tensors(got, want)
