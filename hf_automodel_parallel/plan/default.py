"""The plan of last resort: the common names of decoder layers, used only where it can be seen to be right."""

from __future__ import annotations

from torch import nn

from .names import pattern_regex
from .spec import PlanEntry

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


def default_plan(model: nn.Module) -> tuple[dict[str, PlanEntry], str | None]:
    """The default plan for ``model`` (unwrapped), if it can be seen to be right there.

    Between a column-wise and a row-wise projection every rank works on its own features. A parameter in that place that no
    entry names (a head norm, attention sinks, a bias of scores) would be wrong or have a partial gradient; a plan that does
    not know it cannot be trusted, so it is not used.

    Returns:
        The entries that match something, and None; or no entries and the reason.
    """
    names = [name for name, _ in model.named_modules()]
    matched = {
        pattern: entry
        for pattern, entry in llama_like_plan("default plan").items()
        if any(pattern_regex(pattern).fullmatch(name) for name in names)
    }
    blocks: set[str] = set()
    for pattern, entry in matched.items():
        if entry.style in ("colwise", "rowwise"):
            blocks |= {name.rpartition(".")[0] for name in names if pattern_regex(pattern).fullmatch(name)}
    if not blocks:
        return {}, "no module has the usual names (model.layers.*.self_attn.q_proj, ...)"
    sides = {block: {"colwise": 0, "rowwise": 0} for block in blocks}
    for pattern, entry in matched.items():
        for name in names:
            block = name.rpartition(".")[0]
            if entry.style in ("colwise", "rowwise") and block in sides and pattern_regex(pattern).fullmatch(name):
                sides[block][entry.style] += 1
    for block, count in sorted(sides.items()):
        if not (count["colwise"] and count["rowwise"]):
            return {}, f"{block} has only one half of a column-wise / row-wise pair"
        counted = [
            k for k, v in vars(model.get_submodule(block)).items() if "heads" in k and isinstance(v, int) and v > 1
        ]
        if counted:
            return (
                {},
                f"{block} counts its heads itself ({counted[0]}), so each rank would reshape to heads it does not have",
            )
        for name, _ in model.get_submodule(block).named_parameters():
            full = f"{block}.{name}"
            # The owner, or a wrapper above it, must be one of the planned projections.
            owners = {full[:i] for i, letter in enumerate(full) if letter == "."}
            if not any(pattern_regex(pattern).fullmatch(owner) for pattern in matched for owner in owners):
                return {}, f"{full} is a parameter between sharded projections that the plan does not know"
    return matched, None
