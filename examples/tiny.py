"""What `--tiny` of the recipes takes: a tiny model, a tokenizer and a few rows. No network, no GPU."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

WORDS = "the a small red blue cat dog bird runs sees finds over under house tree river and".split()


def settings(**more: Any) -> dict[str, Any]:
    """Defaults of the training arguments with `--tiny`: two steps on the CPU. Nothing without the flag."""
    if "--tiny" not in sys.argv:
        return {}
    few = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
    return {**few, "use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", **more}


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "image_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def rows(*columns: str, number: int = 32) -> Dataset:
    """The same sentences on every rank; a column `label` has 0 or 1.

    With a column `images` (one of one colour) the texts are messages, to which TRL adds the images.
    """
    draw = random.Random(0)

    def value(column: str) -> Any:
        if column == "images":
            from PIL import Image  # pictures alone need Pillow

            return [Image.new("RGB", (16, 16), tuple(draw.randbytes(3)))]
        if column == "label":
            return draw.randint(0, 1)
        text = " ".join(draw.choices(WORDS, k=draw.randint(4, 12)))
        role = "user" if column == "prompt" else "assistant"
        return [{"role": role, "content": text}] if "images" in columns else text

    return Dataset.from_list([{column: value(column) for column in columns} for _ in range(number)])


def config(model_type: str = "llama", **more: Any) -> Any:
    """The config of a tiny model; a Trainer's `model` is made of it by `AutoModelFor...from_config`."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if model_type == "t5":
        sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    elif model_type == "llama":
        sizes |= {"num_key_value_heads": 2}
    heads = {} if model_type == "t5" else {"num_attention_heads": 4}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **sizes, **heads, **tokens, **more)


def vision_language_config() -> Any:
    """The config of a tiny LLaVA, for what :func:`processor` makes."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    return AutoConfig.for_model("llava", text_config=config(), vision_config=vision, image_token_index=4)


def processor() -> Any:
    """Images of 16 x 16 pixels become 16 tokens each."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    )
    sizes = {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return LlavaProcessor(images, tokenizer(), chat_template=template, **sizes)


def saved(model: Any) -> str:
    """A folder with ``model`` for what reads weights from files: each process its own, not only the first one."""
    folder = tempfile.mkdtemp(prefix="tiny-")
    Path(folder, "config.json").write_text(model.config.to_json_string())
    save_file(model.state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return folder
