"""Attributes that count heads get this rank's number, and nothing else does."""

import pytest
from harness.models import build_model, randomize
from transformers import AutoConfig, AutoModelForCausalLM

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.plan.analysis.varying_check import complete
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan.validate import local_head_counts
from hf_automodel_parallel.plan_search.parity_check import ParityCheck

SQUARE = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}


@pytest.mark.parametrize("source", ["registry", "default", "explicit"])
def test_as_many_heads_as_each_is_wide(source):
    """The width of a head is no count, even where it is the same number."""
    model = build_model("llama", **SQUARE)
    chosen = select_plan(model, "llama") if source == "explicit" else select_plan(model, None, (source,))
    spec = resolve(model, chosen, 2)
    complete(model, spec, find_structure(model).layers, 2, chosen.strict)
    assert spec.head_counts == {} and spec.parameters["model.layers.0.self_attn.q_proj.weight"].dim == 0


def test_values_with_as_many_heads_as_each_is_wide():
    """Without rotary embeddings no shape would tell that a head was halved."""
    values = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    config = AutoConfig.for_model("cohere2", **values, **SQUARE)
    config.layer_types = ["full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    styles = {pattern: entry.style for pattern, entry in select_plan(model).entries.items()}
    assert ParityCheck(model, 2).failure(select_plan(model, styles), completed=True) is None


def test_counts_and_widths_of_all_heads_are_divided():
    model = build_model("llama", **SQUARE)
    attention = model.model.layers[0].self_attn
    attention.num_heads, attention.num_key_value_heads, attention.all_head_size, attention.head_size = 8, 8, 64, 8
    spec = resolve(model, select_plan(model, "llama"), 2)
    name = "model.layers.0.self_attn"
    assert local_head_counts(model, spec, 2)[name] == {"num_heads": 4, "num_key_value_heads": 4, "all_head_size": 32}
