"""Mixtures of experts under tensor parallelism: what a rank holds, and what a layer communicates."""

import functools
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from harness.collectives import CollectiveCounter
from harness.compare import assert_gradients_equal, full_grads
from harness.models import lora, make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from sweep.tiny import VOCABULARY, build

from hf_automodel_parallel import AutoParallelismConfig

#: Type -> (tp all-reduces of one layer in forward, in backward). Attention and experts cost two each, as a dense
#: layer's attention and MLP do. The experts have two boundaries on the way in (hidden states, routing weights), so
#: their backward costs one more; Mixtral and Qwen3 alike.
COLLECTIVES = {"mixtral": (2, 3), "qwen3_moe": (2, 3)}

TARGETS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def prepared(model):
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return accelerator, accelerator.prepare(model, torch.optim.SGD(trainable, lr=0.1))[0]


def forget():
    AcceleratorState._reset_state()
    GradientState._reset_state()


def batch():
    return make_batches(1, 2, 16, VOCABULARY, seed=3)[0]


def measure(model_type):
    """Bytes of the experts (of the model, on this rank) and the all-reduces of one layer more."""
    counts, shares = {}, None
    for layers in (2, 3):
        model = build(model_type, num_hidden_layers=layers)
        total = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n)
        _, model = prepared(model)
        local = [p.to_local() for n, p in model.named_parameters() if ".experts." in n]
        shares = total, sum(p.numel() * p.element_size() for p in local)
        with CollectiveCounter() as forward:
            loss = model(**batch(), use_cache=False).loss
        with CollectiveCounter() as backward:
            loss.backward()
        counts[layers] = Counter(forward.counts.total), Counter(backward.counts.total)
        forget()
    return shares, [dict(counts[3][i] - counts[2][i]) for i in (0, 1)]


def adapted_gradients(model_type):
    """Gradients with LoRA on the tensors of the experts."""
    accelerator, model = prepared(lora(build(model_type), **TARGETS))
    loss = model(**batch()).loss
    accelerator.backward(loss)
    return loss.item(), full_grads(model)


@functools.cache
def measured(model_type):
    return run_distributed(2, measure, model_type)


@pytest.mark.parametrize("model_type", COLLECTIVES)
def test_a_rank_holds_its_share_of_the_bytes_of_the_experts(model_type):
    for (total, local), _ in measured(model_type):
        assert total > 0 and local * 2 == total


@pytest.mark.core_cases("mixtral-expected0")
@pytest.mark.parametrize("model_type, expected", COLLECTIVES.items())
def test_collectives_of_a_layer(model_type, expected):
    for _, (forward, backward) in measured(model_type):
        assert (forward, backward) == ({"all_reduce": expected[0]}, {"all_reduce": expected[1]})


@pytest.mark.core_cases("mixtral")
@pytest.mark.parametrize("model_type", ["mixtral", "inkling_text", "deepseek_v3"])
def test_lora_on_the_tensors_of_experts(model_type):
    loss, gradients = run_distributed(2, adapted_gradients, model_type)[0]
    want_loss, want = loss_and_grads(lora(build(model_type), **TARGETS), [batch()])
    assert abs(loss - want_loss) <= 1e-6 * want_loss
    assert any("experts" in name for name, g in want.items() if g is not None)
    assert_gradients_equal(gradients, want)
