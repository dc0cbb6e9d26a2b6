"""``generate`` on a prepared model, also before its first forward, gives the tokens of one process; training goes on."""

import pytest
import torch
from accelerate import Accelerator
from harness.pool import run_distributed
from parity.jobs import batches_for, build, data_rank, trainable
from parity.test_gradients import LORA, MESHES

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
