"""Which models and losses context parallelism takes, the mark in their masks, and the layout of positions."""

import pytest
import torch
from harness.training import build

from hf_automodel_parallel import UnsupportedError
from hf_automodel_parallel.context_parallel import attention
from hf_automodel_parallel.context_parallel.attention import mark
from hf_automodel_parallel.context_parallel.layout import Layout
from hf_automodel_parallel.context_parallel.models import check_model
from hf_automodel_parallel.core.model_structure import find_structure

UNSUITABLE = {
    "sliding window": (lambda: build("mistral", sliding_window=4), "sliding window of 4"),
    "layer types": (lambda: build("gemma3"), "sliding_attention"),
    "eager": (lambda: build("llama", attn_implementation="eager"), "attn_implementation='sdpa'"),
    "router loss": (lambda: build("mixtral_aux"), "output_router_logits"),
    "mamba": (lambda: from_config("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2), "attention impl"),
    "no sdpa": (
        lambda: from_config("bloom", vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
        "class does not have. Use cp",
    ),
    "hybrid": (lambda: from_config("lfm2", **TINY, layer_types=["full_attention", "conv"]), "type conv"),
    "dynamic rope": (
        lambda: build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type='dynamic'",
    ),
    "encoder": (lambda: from_config("t5", num_layers=1, d_model=16, d_kv=4, d_ff=8, vocab_size=64), "T5"),
    "prompt": (lambda: prompt_tuned(build("llama")), "virtual tokens"),
}
TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def from_config(kind, **values):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def prompt_tuned(model):
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("name", UNSUITABLE)
def test_models_that_mix_positions_otherwise_are_refused(name):
    make, message = UNSUITABLE[name]
    model = make()
    with pytest.raises(UnsupportedError, match=message):
        check_model(model, find_structure(model), size=2)


def test_what_the_loss_of_a_model_has_to_know():
    model = build("llama")
    assert check_model(model, find_structure(model), 2).no_loss == ""
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert "takes no shift_labels and no num_items_in_batch" in check_model(model, find_structure(model), 2).no_loss
    model.forward = lambda input_ids, attention_mask=None, position_ids=None: None
    assert "does not compute the loss" in check_model(model, find_structure(model), 2).no_loss


def test_the_mark_cannot_be_mistaken_for_a_mask():
    """An attention that is not ours fails on it instead of computing something else."""
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="mask"):
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mark(4, 2, query.device))
    assert mark(1024, 8, query.device).untyped_storage().nbytes() == 1


def test_an_attention_that_the_mark_does_not_reach(monkeypatch):
    """As in Doge, whose attention makes a mask of its own: the message names that, not the caller alone."""
    module = torch.nn.Identity()
    monkeypatch.setattr(attention, "active", lambda: object())
    module.config = build("llama").config
    attention.install([module], attention.Place(Layout(0, 2), None))
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(
        UnsupportedError, match="Identity.* makes a mask of its own.*cp_size=1.*model that prepare returned"
    ):
        attention.attention(module, query, query, query, torch.zeros(1, 1, 4, 4))


def test_layout_covers_each_position_once():
    positions = [Layout(rank, 4).positions(4, torch.device("cpu")) for rank in range(4)]
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(16))
    tokens = torch.arange(16).expand(2, -1)
    assert all(torch.equal(Layout(rank, 4).shard(tokens, 1)[0], positions[rank]) for rank in range(4))
