"""Which modules are heads: what runs behind the layers."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.fsdp.float32_losses import heads

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
SMALL_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}


def build(cls: str, kind: str, **values):
    with torch.device("meta"):
        return getattr(transformers, cls)._from_config(AutoConfig.for_model(kind, **values))


class Around(nn.Module):
    """A module of the user's own around a backbone, with two heads in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build("LlamaModel", "llama", **SMALL)
        self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(2))


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: build("LlamaForCausalLM", "llama", **SMALL), ["lm_head"]),
        (lambda: build("LlamaModel", "llama", **SMALL), ["norm"]),
        (lambda: build("BertForMaskedLM", "bert", **SMALL), ["cls"]),
        (lambda: build("BertForQuestionAnswering", "bert", **SMALL), ["qa_outputs"]),
        (lambda: build("BertModel", "bert", **SMALL), ["pooler"]),
        (
            lambda: build("DistilBertForSequenceClassification", "distilbert", dim=32, n_layers=2, n_heads=2),
            ["pre_classifier", "classifier"],
        ),
        (lambda: build("T5ForConditionalGeneration", "t5", **SMALL_T5), ["lm_head"]),
        (lambda: build("ViTForImageClassification", "vit", **SMALL), ["classifier"]),
        (Around, ["heads.0", "heads.1"]),
    ],
    ids=["causal", "base", "masked", "qa", "encoder", "two_steps", "seq2seq", "image", "users"],
)
def test_heads_of_a_model(make, names):
    model = make()
    by_name = {module: name for name, module in model.named_modules()}
    assert [by_name[head] for head in heads(model, find_structure(model))] == names
