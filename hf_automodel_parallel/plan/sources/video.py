"""Plans of the video transformers of diffusers, which bring none of their own.

Attention is sharded by heads: queries, keys and values column-wise, the projection behind them row-wise. What lies
between (the norms of queries and keys, the count of heads) follows from the module tree and is completed by
:mod:`hf_automodel_parallel.strategies.families.video`. Modulations, six vectors per sample, are sharded for their
memory and gathered. The patch embedding and the output projection are small and stay whole.
"""

from __future__ import annotations


def _pair(first: str, second: str) -> dict[str, str]:
    """Two layers with something element-wise in between."""
    return {first: "colwise", second: "rowwise"}


def _attention(path: str, *added: str, out: tuple[str, ...] = ("to_out.0",)) -> dict[str, str]:
    """An attention at ``path``; ``added`` are projections of a second stream, ``out`` those behind the heads."""
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

#: ``HunyuanVideo15Transformer3DModel``: two streams, of the video and of its conditions, with one attention over both.
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
