"""``generate`` on a prepared model, also before its first forward, gives the tokens of one process; training goes
on.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.meshes import MESHES
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable

from hf_automodel_parallel import AutoParallelismConfig

PROMPT = torch.arange(3, 9)[None]


def tokens(model) -> list[int]:
    with torch.no_grad():
        return model.eval().generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()


def generate_and_train(adapter, sizes) -> tuple[list[int], list[int]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama", adapter)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.5))
    before = tokens(model)
    model.train()
    accelerator.backward(model(**batches_for(model, 2)[data_rank(accelerator)]).loss)
    optimizer.step()
    return before, tokens(model)


@pytest.mark.core_cases("full-fsdp2", "lora-tp2_fsdp2")
@pytest.mark.both_ends
@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_generate(adapter, mesh):
    world, sizes, _ = MESHES[mesh]
    got = run_distributed(world, generate_and_train, adapter, sizes)
    model = build("llama", adapter)
    want = [tokens(model)]
    model.train()
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    for batch in batches_for(model, 2):
        (model(**batch).loss / 2).backward()
    optimizer.step()
    want.append(tokens(model))
    assert want[0] != want[1]
    assert [list(pair) for pair in got] == [want] * world


# ---- whatever way, on ranks that write different texts -------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 2, "do_sample": True},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
}


def text_of(model, rank: int, seed: int, **options: Any) -> list[list[int]]:
    """What data-parallel rank `rank` writes: prompts and texts get longer with the rank."""
    prompts = torch.randint(3, 128, (2, 5 + 3 * rank), generator=torch.Generator().manual_seed(50 + rank))
    torch.manual_seed(seed)
    options = {"do_sample": False, "max_new_tokens": 4 + 3 * rank, "pad_token_id": 0} | options
    return model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options).tolist()


def write_in_all_ways(adapter, sizes) -> dict[str, list[list[int]]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = accelerator.prepare(build("llama", adapter)).eval()
    # Each process has a seed of its own, as after set_seed(..., device_specific=True).
    seed, rank = dist.get_rank(), data_rank(accelerator)
    return {way: text_of(model, rank, seed, **options) for way, options in WAYS.items()}


@pytest.mark.both_ends
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_ranks_write_different_texts_of_different_lengths(adapter):
    """Without an optimizer. Who has finished goes on gathering for the others; a tp group draws with its first rank's
    seed.
    """
    world, sizes, _ = MESHES["tp2_fsdp2"]
    results = run_distributed(world, write_in_all_ways, adapter, sizes)
    model = build("llama", adapter).eval()
    for process, result in enumerate(results):
        rank = process // 2
        for way, options in WAYS.items():
            assert result[way] == text_of(model, rank, 2 * rank, **options), (process, way)
    assert len(results[0]["greedy"][0]) < len(results[2]["greedy"][0])


def different_prompts(sizes) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = accelerator.prepare(build("llama")).eval()
    model.generate(input_ids=PROMPT + dist.get_rank(), max_new_tokens=2, pad_token_id=0)


@pytest.mark.core
def test_prompts_dealt_by_process_index_are_refused():
    world, sizes, _ = MESHES["tp2_fsdp2"]
    expect_error(world, different_prompts, sizes, match="different input_ids on the ranks of one tp group")


# ---- Seq2SeqTrainer ------------------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    """Sources and targets; the last batch is not full."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens[:9], "labels": tokens[9:]}


def encoder_decoder() -> Any:
    from harness.models import randomize
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
        randomize(model)
    return model


class Repeated(Sentences):
    """For a decoder alone: labels are the tokens themselves."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = super().__getitem__(index)["input_ids"]
        return {"input_ids": tokens, "labels": tokens}


def predict_with_generate(sizes, ranks: int, kind: str, beams: int, directory: str) -> tuple[Any, Any, float]:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    args = Seq2SeqTrainingArguments(
        directory,
        use_cpu=True,
        per_device_eval_batch_size=4 // ranks,
        predict_with_generate=True,
        generation_num_beams=beams,
        report_to=[],
        disable_tqdm=True,
        parallelism_config=None if sizes is None else AutoParallelismConfig(**sizes),
    )
    model, rows = (encoder_decoder(), Sentences()) if kind == "t5" else (build("llama"), Repeated())
    if kind == "llama":
        model.config.pad_token_id = model.generation_config.pad_token_id = 0
    trainer = Seq2SeqTrainer(model, args)
    result = trainer.predict(rows, max_length=14)
    return torch.as_tensor(result.predictions), torch.as_tensor(result.label_ids), result.metrics["test_loss"]


@pytest.mark.parametrize(
    "kind, beams, world, sizes, ranks",
    [("t5", 1, 2, {"dp_shard_size": 2}, 2), ("t5", 2, 2, {"dp_shard_size": 2}, 2), ("llama", 1, 4, None, 2)],
    ids=["t5", "t5_beams", "llama_tp2_fsdp2"],
)
def test_predict_with_generate(kind, beams, world, sizes, ranks, tmp_path):
    """`Seq2SeqTrainer` without an optimizer, each sample once; T5 has an encoder whose embedding is tied to the
    decoder's.
    """
    want = predict_with_generate(None, 1, kind, beams, str(tmp_path))
    model, rows = (encoder_decoder(), Sentences()) if kind == "t5" else (build("llama"), Repeated())
    with torch.no_grad():
        # Not want[2]: in one process this Trainer gives the half-full last batch the weight of a full one.
        loss = model.eval()(**torch.utils.data.default_collate([rows[i] for i in range(len(rows))])).loss.item()
    sizes = sizes or MESHES["tp2_fsdp2"][1]
    for got in run_distributed(world, predict_with_generate, sizes, ranks, kind, beams, str(tmp_path)):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert got[2] == pytest.approx(loss, rel=1e-6)
