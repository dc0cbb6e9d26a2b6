"""Tiny models of the families that have a strategy of their own, and what the ranks do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import full_grads, mean_over_ranks
from harness.models import MATRIX_STD, VECTOR_STD, make_batches
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.strategies.families.bagel import (
    BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS,
)
from hf_automodel_parallel.strategies.registry import (
    get_parallelization_strategy,
)

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_NEMOTRON_H = _TEXT | {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "intermediate_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 32,
}
_QWEN3_5 = _TEXT | {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "intermediate_size": 96,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DEEPSEEK_V4 = _TEXT | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 2,
}
_TEXT_MODELS = {"nemotron_h": _NEMOTRON_H, "qwen3_5_text": _QWEN3_5, "deepseek_v4": _DEEPSEEK_V4}

_WAN: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
#: Image-to-video: a second pair of keys and values in the cross-attention, and an image embedder.
_WAN_IMAGE = _WAN | {"image_dim": 16, "added_kv_proj_dim": 48}
_HUNYUAN_VIDEO: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 16,
    "image_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}

LORA: dict[str, dict[str, Any]] = {
    "nemotron_h": {"target_modules": ["q_proj", "o_proj", "in_proj", "up_proj", "down_proj"]},
    "qwen3_5_text": {"target_modules": ["in_proj_qkv", "out_proj", "q_proj", "o_proj", "up_proj", "down_proj"]},
    "deepseek_v4": {"target_modules": ["q_a_proj", "kv_proj", "o_b_proj", "up_proj", "down_proj"]},
    "wan": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]},
    "hunyuan_video": {"target_modules": ["to_q", "add_k_proj", "to_out.0", "to_add_out", "ff.net.0.proj", "ff.net.2"]},
}


def build(family: str, adapter: bool = False, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """The model of ``family`` with random values everywhere; ``dtype`` as its library would load it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _construct(family, overrides)
        _randomize(model)
        if dtype != torch.float32:
            _store(model, family, dtype)
        if adapter:
            config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **LORA[family])
            model = get_peft_model(model, config)
    return model


def _construct(family: str, overrides: dict[str, Any]) -> nn.Module:
    if family in _TEXT_MODELS:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(family, **(_TEXT_MODELS[family] | overrides))
        return AutoModelForCausalLM.from_config(config)
    from diffusers import HunyuanVideo15Transformer3DModel, WanTransformer3DModel

    if family == "hunyuan_video":
        return HunyuanVideo15Transformer3DModel(**(_HUNYUAN_VIDEO | overrides))
    return WanTransformer3DModel(**((_WAN if family == "wan" else _WAN_IMAGE) | overrides))


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=VECTOR_STD)
        else:
            parameter.normal_(std=MATRIX_STD)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # which experts a token goes to; every one a different expert
            buffer.copy_(torch.randint(4, buffer.shape[:1]).unsqueeze(1) + torch.arange(buffer.shape[1]))
            buffer.remainder_(4)


def kept_in_float32(model: nn.Module, family: str) -> set[str]:
    """Names of what is float32 when the model is stored in bfloat16."""
    listed = {"A_log"} if family == "qwen3_5_text" else set()  # as in its checkpoints
    for field in ("_keep_in_fp32_modules_strict",) if family in _TEXT_MODELS else ("_keep_in_fp32_modules",):
        listed |= set(getattr(model, field, None) or ())
    names = {n for n, _ in model.named_parameters() if not listed.isdisjoint(n.split("."))}
    return names | {n for n, _ in model.named_parameters() if any(n.endswith(part) for part in listed)}


def _store(model: nn.Module, family: str, dtype: torch.dtype) -> None:
    kept = kept_in_float32(model, family)
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(dtype)


def batches_for(family: str, parts: int, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of equal size; those of the video models have a ``target``."""
    rows //= parts
    if family in _TEXT_MODELS:
        return make_batches(parts, rows, 16, 128, seed=3)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator)

    batches = []
    for _ in range(parts):
        batch = {"timestep": torch.rand(rows, generator=generator) * 1000, "target": draw(4, 2, 4, 4)}
        if family == "hunyuan_video":
            mask = torch.ones(rows, 6)
            mask[0, 4:] = 0
            batch |= {
                "hidden_states": draw(9, 2, 4, 4),
                "encoder_hidden_states": draw(6, 16),
                "encoder_attention_mask": mask,
                "encoder_hidden_states_2": draw(4, 16),
                "encoder_attention_mask_2": torch.ones(rows, 4),
                "image_embeds": draw(5, 16),
            }
        else:
            batch |= {"hidden_states": draw(4, 2, 4, 4), "encoder_hidden_states": draw(6, 16)}
        if family == "wan_image":  # the last 512 tokens are text
            batch |= {"encoder_hidden_states": draw(512, 16), "encoder_hidden_states_image": draw(5, 16)}
        batches.append(batch)
    return batches


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss, or the mean squared error of a video model."""
    if "labels" in batch:
        return model(**batch, use_cache=False).loss
    inputs = {key: value for key, value in batch.items() if key != "target"}
    return (model(**inputs).sample.float() - batch["target"]).square().mean()


def one_process(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, Any]]:
    """The mean of the losses and its gradients in one process."""
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def _result(loss: torch.Tensor, model: nn.Module) -> tuple[float, dict[str, torch.Tensor | None]]:
    return mean_over_ranks(loss), full_grads(model)


def prepared(
    family: str, sizes: dict[str, int], dp_size: int, arguments: dict[str, Any] | None = None, **config: Any
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Loss and gradients of one step through ``Accelerator.prepare``."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **config))
    model = build(family, **(arguments or {}))
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-3))
    mine = dist.get_rank() // accelerator.parallelism_config.tp_size
    loss = loss_of(model, batches_for(family, dp_size)[mine])
    accelerator.backward(loss)
    return _result(loss, model)


def parallelized(
    family: str,
    sizes: dict[str, int],
    dp_size: int,
    arguments: dict[str, Any] | None = None,
    policy: MixedPrecisionPolicy | None = MixedPrecisionPolicy(),  # noqa: B008
    **options: Any,
) -> tuple[float, dict[str, torch.Tensor | None], dict[str, torch.dtype]]:
    """The same through the family's ``parallelize``, and the dtypes of parameters in flight."""
    tp, shard = sizes.get("tp_size", 1), sizes.get("dp_shard_size", 1)
    mesh = init_device_mesh("cpu", (shard, tp), mesh_dim_names=("dp_shard_cp", "tp"))
    model = build(family, **(arguments or {}))
    model = get_parallelization_strategy(model).parallelize(model, mesh, mp_policy=policy, **options)
    seen = _in_flight(model)
    loss = loss_of(model, batches_for(family, dp_size)[dist.get_rank() // tp])
    loss.backward()
    return *_result(loss, model), seen


def _in_flight(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of each parameter when its module is called, filled by the next forward."""
    seen: dict[str, torch.dtype] = {}

    def noting(name: str, module: nn.Module) -> Callable[..., Any]:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            for key, parameter in module.named_parameters(recurse=False):
                seen[f"{name}.{key}" if name else key] = parameter.dtype
            return inner(*args, **kwargs)

        return forward

    for name, module in model.named_modules():
        module.forward = noting(name, module)  # type: ignore[method-assign]
    return seen


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + torch.tanh(self.mlp(x))


def nested(path: str, layers: nn.ModuleList) -> nn.Module:
    for name in reversed(path.split(".")):
        layers, inner = nn.Module(), layers
        layers.add_module(name, inner)
    return layers


class BagelForUnifiedMultimodal(nn.Module):
    """A stand-in with the names of BAGEL's modules; no library has the model."""

    def __init__(self, vision: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        for path in BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS[: 1 + vision]:
            _, tower, rest = path.split(".", 2)
            self.model.add_module(tower, nested(rest, nn.ModuleList(Block() for _ in range(2 + ("vit" in path)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for path in BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS:
            for layer in self.get_submodule(path):
                x = layer(x)
        return x.square().mean()
