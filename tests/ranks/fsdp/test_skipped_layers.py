"""Layers that only some ranks run: those that attend to images, and those that LayerDrop skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.models import randomize
from harness.pool import expect_error, run_distributed
from harness.training import data_rank, trainable
from harness.vision_language import IMAGE
from torch import nn

from hf_automodel_parallel import AutoParallelismConfig

Batch = dict[str, torch.Tensor]
SHARDED = {"dp_shard_size": 2}

#: Images at one data-parallel rank alone: rank -> row -> number of images.
MIXED, ALL, NONE = [[1, 2], [0, 0]], [[1, 2], [2, 1]], [[0, 0], [0, 0]]


# ---- layers that attend to images -----------------------------------------------------------------------------------


def cross_attending(frozen: bool = False) -> nn.Module:
    """Mllama: without images its second layer is skipped."""
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 48,
        "vision_output_dim": 64,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.MllamaForConditionalGeneration(config)
        randomize(model)
    if frozen:
        model.model.vision_model.requires_grad_(False)
    return model


def with_images(images: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 110, (len(images), 14), generator=generator)
    mask = torch.zeros(len(images), 14, max(1, *images), 2, dtype=torch.long)
    for row, count in enumerate(images):
        for index in range(count):
            ids[row, 2 + 3 * index] = IMAGE
            mask[row, 2 + 3 * index :, index, 0] = 1
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)}
    if sum(images):
        most = max(images)
        batch["pixel_values"] = torch.randn(len(images), most, 2, 3, 16, 16, generator=generator)
        batch["aspect_ratio_ids"] = torch.tensor([[int(i < count) for i in range(most)] for count in images])
        batch["aspect_ratio_mask"] = torch.tensor([[[1, 0]] * most] * len(images))
        batch["cross_attention_mask"] = mask
    return batch


def image_gradients(images: list[list[int]], sizes: dict[str, Any], frozen: bool) -> tuple[float, dict[str, Any]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = cross_attending(frozen)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    rank = data_rank(accelerator)
    loss = model(**with_images(images[rank], rank), use_cache=False).loss
    accelerator.backward(loss)
    return mean_over_ranks(loss), full_grads(model)


@pytest.mark.core_cases("first-full")
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("images", [MIXED, MIXED[::-1], ALL, NONE], ids=["first", "second", "all", "none"])
def test_ranks_with_and_without_images_meet(images, frozen):
    model, want_loss = cross_attending(frozen), 0.0
    for rank, rows in enumerate(images):
        loss = model(**with_images(rows, rank), use_cache=False).loss / 2
        loss.backward()
        want_loss += loss.item()
    want = {name: p.grad for name, p in model.named_parameters()}
    for loss, gradients in run_distributed(2, image_gradients, images, SHARDED, frozen):
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


def test_layers_as_units_need_images_on_all_ranks():
    sizes = {**SHARDED, "towers": "layers"}
    expect_error(2, image_gradients, MIXED, sizes, False, match="some data-parallel ranks run")


# ---- LayerDrop ------------------------------------------------------------------------------------------------------


def dropping(kind: str, probability: float = 0.5) -> nn.Module:
    common = {"vocab_size": 128, "dropout": 0.0, "pad_token_id": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if kind == "opt":
            config = transformers.OPTConfig(
                **common, **ids, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, ffn_dim=96,
                num_attention_heads=4, max_position_embeddings=32, layerdrop=probability,
            )  # fmt: skip
            model: nn.Module = transformers.OPTForCausalLM(config)
        elif kind == "bart":
            config = transformers.BartConfig(
                **common, **ids, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=96,
                encoder_attention_heads=4, decoder_attention_heads=4, decoder_layerdrop=probability,
                max_position_embeddings=32,
            )  # fmt: skip
            model = transformers.BartForConditionalGeneration(config)
        else:
            config = transformers.Wav2Vec2Config(
                vocab_size=128, hidden_size=64, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4,
                layerdrop=probability, mask_time_prob=0.0, hidden_dropout=0.0, attention_dropout=0.0,
                activation_dropout=0.0,
                feat_proj_dropout=0.0, final_dropout=0.0, conv_dim=(16, 16), conv_stride=(10, 4), conv_kernel=(10, 4),
                num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            )  # fmt: skip
            model = transformers.Wav2Vec2ForCTC(config)
        randomize(model)
    return model.train()


def prepare_dropping(kind: str, training: bool, sizes: dict[str, int]) -> None:
    """Another seed at each rank, as in every data-parallel run."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = dropping(kind).train(training)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(3, 128, (2, 8))
    model(input_ids=ids, labels=ids)
    model.train()
    model(input_ids=ids, labels=ids)


@pytest.mark.core_cases("opt-model.decoder.layerdrop-at-prepare")
@pytest.mark.parametrize("training", [True, False], ids=["at-prepare", "at-the-first-training-step"])
@pytest.mark.parametrize("kind, place", [("opt", "model.decoder.layerdrop"), ("bart", "model.decoder.layerdrop")])
def test_dropping_layers_is_refused_before_ranks_wait_for_each_other(kind, place, training):
    match = rf"{place}=0\.5 \(LayerDrop\).*model\.{place} = 0\.0"
    expect_error(2, prepare_dropping, kind, training, SHARDED, match=match, within=60)


def test_one_data_parallel_rank_may_drop_layers():
    run_distributed(2, prepare_dropping, "opt", True, {"tp_size": 2})


def sound(rank: int) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(4, 128, (2, 3), generator=generator)
    return {"input_values": torch.randn(2, 2000, generator=generator), "labels": labels}


def synced() -> tuple[float, dict[str, Any]]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**SHARDED))
    model = dropping("wav2vec2")
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(dist.get_rank() + 1)
    loss = model(**sound(dist.get_rank())).loss
    accelerator.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / 2, full_grads(model)


def test_transformers_runs_all_layers_where_it_knows_of_the_sharding():
    model, want_loss = dropping("wav2vec2", 0.0), 0.0
    for rank in range(2):
        loss = model(**sound(rank)).loss / 2
        loss.backward()
        want_loss += loss.item()
    loss, gradients = run_distributed(2, synced)[0]
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, {name: p.grad for name, p in model.named_parameters()})
