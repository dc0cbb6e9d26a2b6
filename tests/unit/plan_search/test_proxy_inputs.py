"""Batches for tiny proxy models of all modalities, found from signatures, configs and by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from hf_automodel_parallel.errors import PlanError
from hf_automodel_parallel.plan_search.candidates import Group, Observed
from hf_automodel_parallel.plan_search.carried_modules import copy_model
from hf_automodel_parallel.plan_search.parity_check import first_that_runs
from hf_automodel_parallel.plan_search.proxy_inputs import CHOICES, possible_inputs
from hf_automodel_parallel.plan_search.proxy_model import BATCH, LENGTH, build_proxy_model

#: Model type, class, fields of the config -> an argument of its forward and the argument's shape.
CASES: dict[tuple[str, str], tuple[dict[str, Any], str, tuple[int, ...]]] = {
    ("vit", "ViTForImageClassification"): ({}, "pixel_values", (BATCH, 3, 96, 96)),
    ("clip", "CLIPModel"): ({}, "pixel_values", (BATCH, 3, 192, 192)),
    ("whisper", "WhisperForConditionalGeneration"): ({}, "input_features", (BATCH, 80, 128)),
    ("wav2vec2", "Wav2Vec2ForCTC"): ({}, "input_values", (BATCH, 9600)),
    ("bert", "BertForMultipleChoice"): ({}, "input_ids", (BATCH, CHOICES, LENGTH)),
    ("bart", "BartForSequenceClassification"): ({}, "input_ids", (BATCH, LENGTH)),
    ("deberta-v2", "DebertaV2ForSequenceClassification"): ({}, "input_ids", (BATCH, LENGTH)),
    ("layoutlmv3", "LayoutLMv3ForSequenceClassification"): ({}, "bbox", (BATCH, LENGTH, 4)),
    ("time_series_transformer", "TimeSeriesTransformerModel"): (
        {"prediction_length": 4, "lags_sequence": [1, 2]},
        "past_values",
        (BATCH, 6),
    ),
}


@pytest.mark.parametrize("case", CASES, ids=[name for _, name in CASES])
def test_a_batch_that_the_model_runs(case):
    model_type, name = case
    fields, argument, shape = CASES[case]
    with torch.device("meta"):
        model = getattr(transformers, name)(CONFIG_MAPPING[model_type](**fields))
    batch, (result, *_), _ = first_that_runs(build_proxy_model(model), LENGTH)
    assert batch[argument].shape == shape and result.outputs
    assert any(gradient is not None for gradient in result.gradients.values())


def test_keys_and_values_of_something_else_belong_to_their_queries():
    small = build_proxy_model(transformers.BartModel(CONFIG_MAPPING["bart"](d_model=32, encoder_layers=1)))
    batch, *_ = first_that_runs(small, LENGTH)
    attention = "decoder.layers.*.encoder_attn"
    wanted = Group(tuple(f"{attention}.{name}_proj" for name in "qkv"), f"{attention}.out_proj")
    assert wanted in Observed(copy_model(small), batch).groups


class Unknown(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(4, 4)

    def forward(self, molecules: torch.Tensor) -> torch.Tensor:
        return self.layer(molecules)


def test_unknown_arguments_are_named():
    with pytest.raises(PlanError, match="Unknown needs molecules"):
        next(possible_inputs(Unknown(PretrainedConfig())))
