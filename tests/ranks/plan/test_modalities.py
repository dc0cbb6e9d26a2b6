"""Images, sound, series, multiple choice and heads of their own: a plan is found, shards inside, and holds."""

import pytest
from harness.meshes import run_on_mesh

from .modalities import run_cases

CASES = {
    "tp2": [
        "whisper:WhisperForConditionalGeneration lora",
        "wav2vec2:Wav2Vec2ForCTC",
        "time_series_transformer:TimeSeriesTransformerModel",
        "bert:BertForMultipleChoice",
        "deberta-v2:DebertaV2ForSequenceClassification",
        "layoutlmv3:LayoutLMv3ForSequenceClassification",
        "gpt2:GPT2Model around",
    ],
    "fsdp2": ["clip:CLIPModel"],
    "tp2_fsdp2": ["clip:CLIPModel"],
}


@pytest.mark.core_cases("fsdp2")
@pytest.mark.parametrize("mesh", CASES)
def test_gradients_equal_one_process(mesh):
    found = run_on_mesh(mesh, run_cases, CASES[mesh])[0]
    wrong = {case: problem for case, problem in found.items() if problem}
    assert set(found) == set(CASES[mesh]) and not wrong, wrong
