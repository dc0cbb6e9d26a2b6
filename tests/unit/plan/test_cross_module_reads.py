"""Which parameters another module reads is found in the source of its forward."""

import pytest
import torch
from ranks.tensor_parallel.cross_module_jobs import other, reading
from sweep.tiny import build
from transformers import LlamaForCausalLM

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.core.sharding_spec import PARTIAL_GRADIENT, ParameterSpec, ShardingSpec
from hf_automodel_parallel.errors import UnsupportedError
from hf_automodel_parallel.plan.analysis.cross_module_reads import (
    check_cross_module_reads,
    cross_module_reads,
    refuse_cross_module_reads,
)

TABLE = "model.embed_tokens.weight"


def test_reads_are_found_in_forward_and_in_what_it_calls():
    model = reading(False, False)
    assert cross_module_reads(model, find_structure(model).layers) == {"": [TABLE, "model.norm.weight"]}
    peft = reading(False, True)
    table = "base_model.model.model.embed_tokens.base_layer.weight"
    assert cross_module_reads(peft, find_structure(peft).layers)["base_model.model"] == [
        table,
        "base_model.model.model.norm.weight",
    ]


class Asking(LlamaForCausalLM):
    """It reads both ends through methods that return their modules."""

    def forward(self, *args, **kwargs):
        head = self.get_output_embeddings()
        return self.get_input_embeddings().weight.sum() + head.weight.sum()


def test_what_a_getter_returns_is_read():
    model = Asking(build("llama").config)
    assert cross_module_reads(model, find_structure(model).layers) == {"": ["lm_head.weight", TABLE]}


def test_other_ways_to_a_parameter_are_read():
    """By ``getattr``, by an index, and an attribute of the parameter that has its values."""
    model = other("ReadingMore")
    heads = [f"heads.{i}.{key}" for i in range(2) for key in ("bias", "weight")]
    reads = cross_module_reads(model, find_structure(model).layers)[""]
    assert reads == [name for name in heads if name != "heads.1.bias"] + ["lm_head.weight", TABLE]


class Handing(LlamaForCausalLM):
    """It hands a module to a function that reads its weight, and looks at another one."""

    def forward(self, *args, **kwargs):
        return self._largest(self.lm_head) + isinstance(self.model.embed_tokens, torch.nn.Embedding)

    @staticmethod
    def _largest(layer):
        return layer.weight.max()


def test_what_is_handed_to_a_function_is_read():
    model = Handing(build("llama").config)
    assert cross_module_reads(model, find_structure(model).layers) == {"": ["lm_head.weight"]}


def test_asking_for_a_dtype_is_no_read():
    for model_type in ("llama", "falcon_mamba", "llama4_text"):  # the last two ask for the dtype and device of a weight
        model = build(model_type)
        assert cross_module_reads(model, find_structure(model).layers) == {}


def test_gemma4_reads_its_table_in_the_model_around_the_language_model():
    model = build("gemma4")
    with torch.device("meta"):
        model = type(model)(model.config)
    assert cross_module_reads(model, find_structure(model).layers)["model"] == [
        "model.language_model.embed_tokens.weight"
    ]


def test_prophetnet_calls_a_method_of_an_embedding_that_is_not_its_forward():
    """That method calls ``super().forward``; the parity of such a model is checked in sweep/test_sweep.py."""
    model = build("prophetnet")
    reads = cross_module_reads(model, find_structure(model).layers)
    assert reads["prophetnet.decoder"] == [f"prophetnet.decoder.{n}_embeddings.weight" for n in ("ngram", "position")]


def test_what_cannot_be_right_is_refused():
    reads = {"model": [TABLE]}
    check_cross_module_reads(ShardingSpec(parameters={TABLE: ParameterSpec(0)}), reads)
    with pytest.raises(UnsupportedError, match=f"forward of model reads the parameter {TABLE}.*tp_size=1"):
        check_cross_module_reads(ShardingSpec(parameters={TABLE: PARTIAL_GRADIENT}), reads)
    refuse_cross_module_reads(ShardingSpec(), reads)
    with pytest.raises(UnsupportedError, match=f"{TABLE}.*megatron_fsdp"):
        refuse_cross_module_reads(ShardingSpec(parameters={TABLE: ParameterSpec(0)}), reads)
