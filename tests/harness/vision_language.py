"""Tiny vision-language models, batches with images in them, and what the ranks do with both.

A composite config is built from small text and vision parts; images are random tensors in the shape that the model's
own processor would make, so nothing is read from a hub.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from harness.collectives import CollectiveCounter
from harness.compare import full_grads
from harness.models import lora, randomize
from harness.oracle import loss_and_grads
from hf_automodel_parallel import AutoParallelismConfig

from .training import data_rank

VOCABULARY = 128
IMAGE, VIDEO = (
    120,
    121,
)  # tokens that stand for a piece of an image and of a video; text tokens are smaller than TEXT_TOKENS
TEXT_TOKENS = 110
PATCH = 4  # pixels

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4 * PATCH,
    "patch_size": PATCH,
    "num_channels": 3,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Family:
    """How one class of models is built and fed.

    Attributes:
        model_type: of transformers.
        text, vision: values of the two parts of the config.
        config: values of the config itself.
        kind: how images are handed over, a key of :func:`_images`.
        tokens: tokens of the sequence that one image (of the usual size) takes.
        token_types: the model wants to be told which tokens are images.
    """

    model_type: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "pixels"
    tokens: int = 4
    token_types: str | None = None


_LLAMA = _TEXT | {"model_type": "llama"}
FAMILIES: dict[str, Family] = {
    "llava": Family(
        "llava",
        _LLAMA,
        _VISION | {"model_type": "clip_vision_model"},
        {"image_token_index": IMAGE, "image_seq_length": 16},
        tokens=16,
    ),
    "llava_next": Family(
        "llava_next",
        _LLAMA,
        _VISION | {"model_type": "clip_vision_model"},
        {"image_token_index": IMAGE, "image_seq_length": 16, "image_grid_pinpoints": [[16, 16]]},
        kind="tiles",
        tokens=16 + 16 + 4,
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        _TEXT | {"rope_parameters": _MROPE},
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH},
        _QWEN_TOKENS,
        kind="grid",
        token_types="mm_token_type_ids",
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        _TEXT | {"rope_parameters": _MROPE},
        _QWEN_VISION | {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
        _QWEN_TOKENS,
        kind="grid",
        token_types="mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        _TEXT | {"rope_parameters": _MROPE},
        _QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _QWEN_TOKENS,
        kind="grid",
        token_types="mm_token_type_ids",
    ),
    "gemma3": Family(
        "gemma3",
        _TEXT
        | {
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _VISION,
        {"image_token_index": IMAGE, "mm_tokens_per_image": 4, "tie_word_embeddings": False},
        token_types="token_type_ids",
    ),
    "mistral3": Family(
        "mistral3",
        _TEXT | {"model_type": "mistral", "sliding_window": None},
        _VISION | {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": IMAGE, "vision_feature_layer": -1, "tie_word_embeddings": False},
        kind="sizes",
    ),
    "llama4": Family(
        "llama4",
        _TEXT
        | {
            "intermediate_size_mlp": 96,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        },
        _VISION
        | {
            "intermediate_size": 128,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
            "vision_output_dim": 48,
        },
        {"image_token_index": IMAGE},
    ),
    "idefics3": Family(
        "idefics3", _LLAMA, _VISION, {"image_token_id": IMAGE, "tie_word_embeddings": False}, kind="per_row"
    ),
    "smolvlm": Family(
        "smolvlm", _LLAMA, _VISION, {"image_token_id": IMAGE, "tie_word_embeddings": False}, kind="per_row"
    ),
    "internvl": Family(
        "internvl",
        _TEXT | {"model_type": "qwen2"},
        _VISION | {"image_size": [4 * PATCH, 4 * PATCH], "patch_size": [PATCH, PATCH]},
        {"image_token_id": IMAGE, "image_seq_length": 4, "tie_word_embeddings": False},
    ),
    "paligemma": Family(
        "paligemma",
        _TEXT | {"model_type": "gemma"},
        _VISION | {"model_type": "siglip_vision_model", "projection_dim": 64, "vision_use_head": False},
        {"image_token_index": IMAGE, "projection_dim": 64, "hidden_size": 64, "tie_word_embeddings": False},
        tokens=16,
        token_types="token_type_ids",
    ),
}


def build(name: str, **overrides: Any) -> nn.Module:
    """The model of ``name`` in float32 with random values in every parameter; equal arguments give equal models.

    Args:
        overrides: values of the config itself, ``text_config`` and ``vision_config`` merged into those of the family.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    family = deepcopy(FAMILIES[name])  # a config writes into the dicts that it is given (rope_theta)
    text, vision = overrides.pop("text_config", {}), overrides.pop("vision_config", {})
    config = AutoConfig.for_model(
        family.model_type,
        text_config=dict(family.text) | text,
        vision_config=dict(family.vision) | vision,
        **(family.config | overrides),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        randomize(model)
    if (
        name == "llama4"
    ):  # its forward in transformers 5.24 reads a field that its language model's output does not have
        model.language_model.register_forward_hook(lambda _, args, output: setattr(output, "image_outputs", None))
    return model


def batch(
    name: str, images: list[int], seed: int = 3, large: bool = False, videos: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of text with images in them.

    Args:
        images: how many images each row has; zeros everywhere give a batch without any image tensor.
        large: images of twice the usual size, where the model takes images of any size.
        videos: videos of two frames instead of images, where the model takes both.
    """
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    grown = 2 if large and family.kind in ("grid", "sizes") else 1
    ids = torch.randint(
        3, TEXT_TOKENS, (len(images), 8 + max(1, *images) * (family.tokens * grown + 2)), generator=generator
    )
    labels = ids.clone()
    for row, count in enumerate(images):
        for index in range(count):
            start = 2 + index * (family.tokens * grown + 2)  # text between images
            ids[row, start : start + family.tokens * grown] = IMAGE
    labels[ids == IMAGE] = -100
    result = {"input_ids": ids, "labels": labels}
    if sum(images):
        result |= _images(family, images, grown, generator)
    if family.token_types:
        result[family.token_types] = (ids == IMAGE).int()
    if videos and family.kind == "grid" and sum(images):
        result["input_ids"] = ids.masked_fill(ids == IMAGE, VIDEO)
        result[str(family.token_types)] *= 2
        result["pixel_values_videos"] = result.pop("pixel_values")
        result["video_grid_thw"] = result.pop("image_grid_thw")
    return result


def _images(family: Family, images: list[int], grown: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    count, side = sum(images), 4 * PATCH

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if family.kind == "grid":
        grid = torch.tensor([[1, 4, 4 * grown]] * count)
        return {"pixel_values": draw(count * 16 * grown, 3 * 2 * PATCH * PATCH), "image_grid_thw": grid}
    if family.kind == "sizes":
        sizes = torch.tensor([[side, side * grown]] * count)
        return {"pixel_values": draw(count, 3, side, side * grown), "image_sizes": sizes}
    if family.kind == "tiles":
        return {"pixel_values": draw(count, 2, 3, side, side), "image_sizes": torch.tensor([[side, side]] * count)}
    if family.kind == "per_row":  # rows with fewer images than others are filled up with black ones
        pixels = torch.zeros(len(images), max(images), 3, side, side)
        for row, number in enumerate(images):
            pixels[row, :number] = draw(number, 3, side, side)
        return {"pixel_values": pixels}
    return {"pixel_values": draw(count, 3, side, side)}


#: Parts of the names of vision towers.
_TOWER = re.compile(r"vision_tower|visual|vision_model")

#: PEFT's regular expression for the linear layers of the language part.
LANGUAGE_LAYERS = r".*(language_model|text_model)\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def trained_as(name: str, how: str, **overrides: Any) -> nn.Module:
    """The model of ``name`` as somebody would train it.

    Args:
        how: "full"; "frozen" (all but the vision tower is trained); "lora" (adapters on the language part alone) or
            "lora_all" (on every linear layer of both towers).
    """
    model = build(name, **overrides)
    if how == "frozen":
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(_TOWER.search(key) is None)
    if how.startswith("lora"):
        model = lora(model, target_modules=LANGUAGE_LAYERS if how == "lora" else "all-linear")
    return model


def first_gradients(
    name: str,
    sizes: dict[str, Any],
    images: list[list[list[int]]],
    how: str = "full",
    own_checkpointing: bool = False,
    odd_ranks: dict[str, bool] | None = None,
    **overrides: Any,
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Loss and gradients of one step through a plain Accelerate loop.

    Args:
        images: data-parallel rank -> micro-batch -> row -> number of images.
        odd_ranks: what is different in the batches of odd data-parallel ranks, as arguments of :func:`batch`.
    """
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes), gradient_accumulation_steps=len(images[0])
    )
    model = trained_as(name, how, **overrides)
    if own_checkpointing:
        model.gradient_checkpointing_enable()
    model, stepper = accelerator.prepare(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    )
    mine = data_rank(accelerator)
    total, gradients = torch.zeros(()), {}
    for index in range(len(images[mine])):
        with accelerator.accumulate(model):
            loss = model(**micro_batch(name, images, mine, index, odd_ranks), use_cache=False).loss
            accelerator.backward(loss)
            total += loss.detach() / len(images[mine])
            if accelerator.sync_gradients:
                gradients = full_grads(model)
            stepper.step()
            stepper.zero_grad()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size(), gradients


def micro_batch(
    name: str, images: list[list[list[int]]], rank: int, index: int, odd_ranks: dict[str, bool] | None = None
) -> dict[str, torch.Tensor]:
    """The batch of data-parallel rank ``rank``."""
    return batch(name, images[rank][index], seed=10 * rank + index, **((odd_ranks or {}) if rank % 2 else {}))


def one_process(
    name: str,
    images: list[list[list[int]]],
    how: str = "full",
    odd_ranks: dict[str, bool] | None = None,
    **overrides: Any,
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """What :func:`first_gradients` has to return."""
    model = trained_as(name, how, **overrides)
    places = [(rank, index) for rank, parts in enumerate(images) for index in range(len(parts))]
    return loss_and_grads(model, [micro_batch(name, images, rank, index, odd_ranks) for rank, index in places])


def saved_and_counted(name: str, sizes: dict[str, Any], how: str) -> tuple[list[str], bool, list[int]]:
    """Backwards of a batch with images at the first data-parallel rank alone, and of one without images.

    Returns:
        Names of the parameters that FSDP2 does not shard, whether the whole state dict equals the original one (on the
        first rank), and the number of all-reduces of each backward.
    """
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = trained_as(name, how)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model, _ = accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    whole = [key for key, p in model.named_parameters() if not isinstance(p, DTensor)]
    reductions = []
    for images in ([1, 2], [0, 0]):
        rows = images if dist.get_rank() == 0 else [0, 0]
        loss = model(**batch(name, rows), use_cache=False).logits.square().mean()  # not by way of the model's own loss
        with CollectiveCounter() as counter:
            accelerator.backward(loss)
        reductions.append(counter.counts.total["all_reduce"])
    state = accelerator.get_state_dict(model)
    equal = not state or all(torch.equal(state[key], value) for key, value in before.items())
    return whole, equal, reductions
