"""``stream_weights`` in one process: files of adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.training import build
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from hf_automodel_parallel import stream_weights
from hf_automodel_parallel.errors import ConfigError, UnsupportedError


def test_adapters_of_every_kind_are_those_of_their_files(tmp_path):
    prompt = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    second = build("llama", {})
    second.add_adapter("other", LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False))
    second.set_adapter("other")
    for number, (model, options) in enumerate([(prompt, {}), (second, {"selected_adapters": ["other"]})]):
        directory = tmp_path / str(number)
        model.save_pretrained(directory, **options)
        assert_streamed(model, directory / ("other" if options else ""))


def assert_streamed(model: torch.nn.Module, directory: Path) -> None:
    found, want = dict(stream_weights(model, adapters_only=True)), load_file(directory / "adapter_model.safetensors")
    assert found.keys() == want.keys() and found
    assert all(torch.equal(found[name], value) for name, value in want.items())


@pytest.mark.both_ends
def test_adapters_without_a_peft_model(tmp_path):
    model = build("llama")
    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"], r=4))
    except ValueError as error:  # transformers 5.24 wants a PEFT that is not out yet
        assert "PEFT" in str(error)
        return
    model.save_pretrained(tmp_path)
    assert_streamed(model, tmp_path)
    with pytest.raises(UnsupportedError, match="its base is not told apart"):
        stream_weights(model)


def test_contradictions_are_refused_when_it_is_called():
    plain, adapted = build("llama"), build("llama", {})
    cases = [
        (adapted, {"adapters_only": True, "merged": True}, ConfigError, "choose one"),
        (plain, {"dtype": torch.int8}, ConfigError, "dtype=torch.int8"),
        (plain, {"adapters_only": True}, ConfigError, "has no adapter"),
        (plain, {"merged": True}, ConfigError, "needs a PeftModel"),
        (torch.nn.Linear(2, 2), {}, UnsupportedError, "this is a Linear"),
    ]
    for model, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            stream_weights(model, **options)
    with pytest.raises(ConfigError, match="adapters are merged into its weights"):
        adapted.merge_adapter()
        stream_weights(adapted)
    plain.hf_quantizer = object()
    with pytest.raises(UnsupportedError, match="quantised weights"):
        stream_weights(plain)
