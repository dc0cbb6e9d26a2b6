"""The view of a model: through PEFT's wrappers, ties under every name, PEFT's layers."""

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_automodel_parallel.core.model_view import ModelView


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes))


def test_plain_model():
    model = llama()
    view = ModelView.of(model)
    assert view.inner is model and view.prefix == "" and not view.peft_layers
    assert ModelView.of(view) is view
    table = model.get_input_embeddings().weight
    assert view.names_of[table] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert list(view.names_of) == list(model.parameters())


def test_adapters():
    inner = llama()
    model = get_peft_model(inner, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    view = ModelView.of(model)
    assert view.inner is inner and view.prefix == "base_model.model."
    assert view.plan_name("base_model.model.model.norm.weight") == "model.norm.weight"
    assert [name.rpartition(".")[2] for name in view.peft_layers] == ["q_proj", "lm_head"]


def test_prompt_learning():
    inner = llama()
    model = get_peft_model(inner, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    view = ModelView.of(model)
    assert view.inner is inner and view.prefix == "base_model."


def test_levels_of_torch_wrappers_are_not_in_names():
    view = ModelView.of(torch.nn.Sequential(torch.nn.Linear(1, 1)))
    assert view.plan_name("0._orig_mod._checkpoint_wrapped_module.weight") == "0.weight"
