"""The default plan: common module names of Llama-like decoders, used only where the module tree shows that it fits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ... import compat
from ...core.model_view import pattern_regex
from ...core.sharding_spec import PlanEntry
from ..styles import LINEAR_STYLES

_STYLES = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def llama_like_plan(source: str, prefix: str = "model.", head: str = "lm_head") -> dict[str, PlanEntry]:
    """The plan of a Llama-shaped decoder: column-wise q, k, v, gate, up; row-wise o, down; vocabulary-sharded ends."""
    entries = {f"{prefix}{key}": PlanEntry(f"{prefix}{key}", style, source) for key, style in _STYLES.items()}
    entries[head] = PlanEntry(head, "colwise_gather_output", source)
    return entries


#: A norm over the features of one head has one weight for all heads. Each rank has some heads: its gradient is Partial.
_HEAD_NORMS = ("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm")


def _prefix(model: nn.Module) -> str:
    """The prefix of the layers' names, taken from the input embedding beside them, also in a vision-language model."""
    embedding = compat.input_embedding_module(model)
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    return name.removesuffix("embed_tokens") if name.endswith(".embed_tokens") else "model."


def _head_norms(model: nn.Module, prefix: str) -> dict[str, PlanEntry]:
    """Entries for the norms of queries and keys, where these normalise over the features of one head."""
    entries = {}
    for key in _HEAD_NORMS:
        block, _, leaf = f"{prefix}{key}".rpartition(".")
        blocks = [m for name, m in model.named_modules() if pattern_regex(block).fullmatch(name)]
        sizes = [
            (getattr(m, "head_dim", None), [p.numel() for p in getattr(m, leaf).parameters()])
            for m in blocks
            if hasattr(m, leaf)
        ]
        if sizes and all(numbers == [head_dim] for head_dim, numbers in sizes):
            entries[f"{block}.{leaf}"] = PlanEntry(f"{block}.{leaf}", "replicated_with_grad_allreduce", "default plan")
    return entries


def default_plan(model: nn.Module) -> tuple[dict[str, PlanEntry], str | None]:
    """The default plan for ``model`` (unwrapped), if the module tree shows that it fits.

    Between a column-wise and a row-wise projection every rank computes on its own features. A parameter there that no
    entry matches (a head norm, attention sinks, a bias of scores) would give wrong results, or would need the style of
    a partial gradient. So the plan is refused.

    Returns:
        The entries that match something, and None; or no entries and the reason.
    """
    names = [name for name, _ in model.named_modules()]
    prefix = _prefix(model)
    matched = {
        pattern: entry
        for pattern, entry in (llama_like_plan("default plan", prefix) | _head_norms(model, prefix)).items()
        if any(pattern_regex(pattern).fullmatch(name) for name in names)
    }
    reason = doubts(model, matched)
    if reason is not None:
        return {}, reason
    for block in _blocks(model, matched):
        counted = [
            k for k, v in vars(model.get_submodule(block)).items() if "heads" in k and isinstance(v, int) and v > 1
        ]
        if counted:
            return (
                {},
                f"{block} counts its heads itself ({counted[0]}), so each rank would reshape to heads it does not have",
            )
    return matched, None


def doubts(model: nn.Module, entries: Mapping[str, PlanEntry]) -> str | None:
    """The reason why ``entries`` may be wrong for ``model`` (unwrapped), or None.

    A block is a module with a projection whose features stay sharded. It must have a column-wise and a row-wise
    projection, and an entry must match each of its parameters.
    """
    blocks = _blocks(model, entries)
    if not blocks:
        return "no module has the usual names (model.layers.*.self_attn.q_proj, ...)"
    for block, sides in blocks.items():
        if sides != {"out", "in"}:
            return f"{block} has only one half of a column-wise / row-wise pair"
        for name, _ in model.get_submodule(block).named_parameters():
            full = f"{block}.{name}"
            # The module that owns it, or a wrapper around that module, must match an entry.
            owners = {full[:i] for i, letter in enumerate(full) if letter == "."}
            if not any(pattern_regex(pattern).fullmatch(owner) for pattern in entries for owner in owners):
                return f"{full} is a parameter between sharded projections that the plan does not know"
    return None


def _blocks(model: nn.Module, entries: Mapping[str, PlanEntry]) -> dict[str, set[str]]:
    """Parent of projections whose features stay sharded -> the sharded sides of its projections: "out", "in"."""
    sides: dict[str, str] = {}
    for pattern, entry in entries.items():
        row = LINEAR_STYLES.get(entry.style) if isinstance(entry.style, str) else None
        if row is not None and (row.output if row.side == "out" else row.input).value == "none":
            sides[pattern] = row.side
    blocks: dict[str, set[str]] = {}
    for name, _ in model.named_modules():
        for pattern, side in sides.items():
            if pattern_regex(pattern).fullmatch(name):
                blocks.setdefault(name.rpartition(".")[0], set()).add(side)
    return dict(sorted(blocks.items()))
