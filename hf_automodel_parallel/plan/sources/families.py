"""Plans written for model families: decoder models (:data:`FAMILIES`), Nemotron-H, and video transformers of diffusers.

The families and their order of preference are those of NVIDIA NeMo AutoModel's ``PARALLELIZE_FUNCTIONS``; the plans are
our own. They differ where a plan there leaves a parameter with a gradient that is never all-reduced (``q_norm``,
``k_norm``), or gives sharded logits to the model's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.model_view import pattern_regex
from ...core.sharding_spec import PlanEntry
from ...errors import PlanError, without_stop
from .huggingface import huggingface_plan
from .llama_like import doubts

PlanFunction = Callable[..., Mapping[str, Any]]

_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
# A norm over the features of one head has one weight for all heads. Each rank has only some of the heads, so the
# gradient is Partial. A plan keeps entries of this style only where the model has such norms.
_SUMMED = "replicated_with_grad_allreduce"
_EMBEDDING = {"embed_tokens": "embedding_rowwise"}

#: kind -> plan of the layers and of the embedding; patterns are relative to the text model.
KINDS: dict[str, dict[str, str]] = {
    "llama": {
        **_EMBEDDING,
        **_ATTENTION,
        "layers.*.self_attn.q_norm": _SUMMED,
        "layers.*.self_attn.k_norm": _SUMMED,
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    },
    "phi": {
        **_EMBEDDING,
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.dense": "rowwise",
        "layers.*.self_attn.q_layernorm": _SUMMED,
        "layers.*.self_attn.k_layernorm": _SUMMED,
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    },
    # One matrix packs queries, keys and values in blocks of different sizes, so attention computes on all heads. Gate
    # and up are two equal blocks.
    "phi3": {
        **_EMBEDDING,
        "layers.*.self_attn.qkv_proj": "rowwise_split_input",
        "layers.*.self_attn.o_proj": "colwise_gather_output",
        "layers.*.mlp.gate_up_proj": "packed_colwise",
        "layers.*.mlp.down_proj": "rowwise",
    },
    # The Mamba mixer next to the attention is replicated.
    "falcon_h1": {
        **_EMBEDDING,
        **_ATTENTION,
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    },
}


@dataclass(frozen=True)
class Family:
    """One line of :data:`FAMILIES`.

    Attributes:
        kind: a key of :data:`KINDS`, or "own" for the model's own ``_tp_plan``.
        text: name of the text model within the model.
        head: name of the output projection.
        model_type: the only ``config.model_type`` that the plan is for; None for any.
    """

    kind: str
    text: str = "model"
    head: str = "lm_head"
    model_type: str | None = None

    def __call__(self, model: nn.Module, sequence_parallel: bool = False) -> dict[str, str]:
        """The plan of ``model``, without PEFT's wrapper: pattern -> style name.

        Args:
            model: a model of the class that this family is registered for, or of a subclass.
            sequence_parallel: accepted for the reference API's signature. Plans here do not depend on it: sequence
                parallelism is derived from the plan and the module tree.

        Raises:
            PlanError: the plan does not fit this model; the message says why.
        """
        found = getattr(getattr(model, "config", None), "model_type", None)
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]

        def matches(pattern: str) -> bool:
            return any(map(pattern_regex(pattern).fullmatch, names))

        if self.model_type is not None and found != self.model_type:
            raise PlanError(f"the plan is for model_type {self.model_type!r}, not {found!r}")
        if self.kind == "own":
            entries = huggingface_plan(model)
            if not entries:
                raise PlanError("the model has no _tp_plan and its config no base_model_tp_plan")
            own = {pattern: entry.style for pattern, entry in entries.items() if matches(pattern)}
            # transformers 5.17 has no entry for the head of some composite models
            return own if self.head in own or not matches(self.head) else own | {self.head: "colwise_gather_output"}
        plan = {f"{self.text}.{key}": style for key, style in KINDS[self.kind].items()}
        plan[self.head] = "colwise_gather_output"
        plan = {pattern: style for pattern, style in plan.items() if style != _SUMMED or matches(pattern)}
        missing = [pattern for pattern in plan if not matches(pattern)]
        if missing:
            raise PlanError(f"the plan names {', '.join(missing)}, which the model does not have")
        reason = doubts(model, {pattern: PlanEntry(pattern, style, "") for pattern, style in plan.items()})
        if reason is not None:
            raise PlanError(reason)
        return plan


_IN_VLM = "model.language_model"

#: class name -> its family. Looked up through the bases of a class, so that subclasses get the same plan.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen2ForCausalLM": Family("llama"),
    "Qwen3ForCausalLM": Family("llama"),
    "Qwen3ForSequenceClassification": Family("llama", head="score"),
    "Gemma3ForCausalLM": Family("llama"),
    "Gemma3ForConditionalGeneration": Family("llama", text=_IN_VLM),
    "Ministral3ForCausalLM": Family("llama"),
    "Mistral3ForConditionalGeneration": Family("llama", text=_IN_VLM),
    "PhiForCausalLM": Family("phi"),
    "Phi3ForCausalLM": Family("phi3"),
    "FalconH1ForCausalLM": Family("falcon_h1"),
    "Qwen3_5ForCausalLM": Family("own"),
    "Qwen3_5ForConditionalGeneration": Family("own", text=_IN_VLM),
    "DeciLMForCausalLM": Family("llama", model_type="nemotron-nas"),
}

#: The reference's name for the plan of Llama-3.3-Nemotron-Super.
LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME = "llama_nemotron_super_tp_plan"


def llama_nemotron_super_plan(model: nn.Module) -> dict[str, str]:
    """The plan called :data:`LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME`: DeciLM's for models of type nemotron-nas, else
    Llama's.

    Raises:
        PlanError: the plan does not fit ``model``.
    """
    config = getattr(model, "config", None)
    architectures = getattr(config, "architectures", None) or []
    deci = architectures[:1] == ["DeciLMForCausalLM"] and getattr(config, "model_type", None) == "nemotron-nas"
    try:
        return FAMILIES["DeciLMForCausalLM" if deci else "LlamaForCausalLM"](model)
    except PlanError as error:
        raise PlanError(
            f"tp_plan={LLAMA_NEMOTRON_SUPER_TP_PLAN_NAME!r} does not fit {type(model).__name__}: "
            f"{without_stop(error)}. Leave tp_plan out for the plan of the model's own class, or give one for its "
            f"layers."
        ) from error


# ---- a hybrid model: layers of several kinds, which its config alone does not distinguish --------------------------


def nemotron_h(model: nn.Module, sequence_parallel: bool = False) -> dict[str, str]:
    """The plan of ``NemotronHForCausalLM``, of transformers or of the checkpoint's own code.

    Shards the embedding, the output projection, MLPs, experts with their shared expert, and attention by heads. Mamba
    mixers are replicated, because their input projection packs five blocks of different sizes. Attention that counts
    its heads itself is replicated, too.

    Args:
        model: the model, without PEFT's wrapper. Its layers are at ``model.layers`` or ``backbone.layers``.
        sequence_parallel: accepted for the reference API's signature, without effect.

    Returns:
        pattern -> style name.
    """
    base = "backbone" if hasattr(model, "backbone") else "model"
    mixer = f"{base}.layers.*.mixer"
    plan = {
        f"{base}.embeddings": "embedding_rowwise",
        f"{mixer}.up_proj": "colwise",
        f"{mixer}.down_proj": "rowwise",
        f"{mixer}.shared_experts.up_proj": "colwise",
        f"{mixer}.shared_experts.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
    for module in model.modules():
        if isinstance(getattr(module, "q_proj", None), nn.Module) and not _counts_heads(module):
            plan |= {f"{mixer}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
            plan[f"{mixer}.o_proj"] = "rowwise"
            break
    for module in model.modules():
        if isinstance(getattr(module, "up_proj", None), nn.Parameter):  # fused experts: one parameter for all of them
            experts = f"{mixer}.experts"
            plan |= {f"{experts}.up_proj": "colwise", f"{experts}.down_proj": "rowwise", experts: "moe_tp_experts"}
            break
    return plan


def _counts_heads(attention: nn.Module) -> bool:
    return any("heads" in name and type(value) is int and value > 1 for name, value in vars(attention).items())


# ---- video transformers of diffusers, which have no _tp_plan -------------------------------------------------------

# Attention is sharded by heads: queries, keys and values column-wise, the output projection row-wise. The norms of
# queries and keys and the count of heads follow from the module tree; strategies/families/video.py adds them.
# Modulations, six vectors per sample, are sharded to save memory, and their outputs are all-gathered. The patch
# embedding and the output projection are small and stay replicated.


def _pair(first: str, second: str) -> dict[str, str]:
    """A column-wise and a row-wise layer with an element-wise function between them."""
    return {first: "colwise", second: "rowwise"}


def _attention(path: str, *added: str, out: tuple[str, ...] = ("to_out.0",)) -> dict[str, str]:
    """An attention at ``path``; ``added``: input projections of a second stream; ``out``: output projections."""
    inputs = {f"{path}.{name}": "colwise" for name in ("to_q", "to_k", "to_v", *added)}
    return inputs | {f"{path}.{name}": "rowwise" for name in out}


def _feed_forward(path: str) -> dict[str, str]:
    return _pair(f"{path}.net.0.proj", f"{path}.net.2")


#: ``WanTransformer3DModel``; the entries of the image branch match only in image-to-video models.
WAN: dict[str, str] = {
    **_pair("condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2"),
    **_pair("condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2"),
    "condition_embedder.time_proj": "colwise_gather_output",
    **_feed_forward("condition_embedder.image_embedder.ff"),
    **_attention("blocks.*.attn1"),
    **_attention("blocks.*.attn2", "add_k_proj", "add_v_proj"),
    **_feed_forward("blocks.*.ffn"),
}

#: ``HunyuanVideo15Transformer3DModel``: two streams, video and conditions, with one joint attention.
HUNYUAN_VIDEO: dict[str, str] = {
    **_pair("image_embedder.linear_1", "image_embedder.linear_2"),
    **_pair(
        "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "context_embedder.time_text_embed.timestep_embedder.linear_2",
    ),
    **_pair(
        "context_embedder.time_text_embed.text_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2",
    ),
    **_attention("context_embedder.token_refiner.refiner_blocks.*.attn"),
    **_feed_forward("context_embedder.token_refiner.refiner_blocks.*.ff"),
    **_pair("context_embedder_2.linear_1", "context_embedder_2.linear_2"),
    **_pair("time_embed.timestep_embedder.linear_1", "time_embed.timestep_embedder.linear_2"),
    **_pair("time_embed.timestep_embedder_r.linear_1", "time_embed.timestep_embedder_r.linear_2"),
    "transformer_blocks.*.norm1.linear": "colwise_gather_output",
    "transformer_blocks.*.norm1_context.linear": "colwise_gather_output",
    **_attention("transformer_blocks.*.attn", "add_q_proj", "add_k_proj", "add_v_proj", out=("to_out.0", "to_add_out")),
    **_feed_forward("transformer_blocks.*.ff"),
    **_feed_forward("transformer_blocks.*.ff_context"),
}
