"""Plans of models whose layers are of several kinds, beyond what their configs say."""

from __future__ import annotations

from torch import nn


def nemotron_h(model: nn.Module, sequence_parallel: bool = False) -> dict[str, str]:
    """The plan of ``NemotronHForCausalLM``, of transformers or of the checkpoint's own code.

    Embedding, head, MLPs, experts with their shared expert, and attention by heads. Mamba mixers stay whole: their
    input projection packs five parts of different sizes. So does attention that counts its heads itself.

    Args:
        model: the model, unwrapped. Its layers are at ``model.layers`` or ``backbone.layers``.
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
        if isinstance(getattr(module, "up_proj", None), nn.Parameter):  # experts in one parameter, not a module each
            experts = f"{mixer}.experts"
            plan |= {f"{experts}.up_proj": "colwise", f"{experts}.down_proj": "rowwise", experts: "moe_tp_experts"}
            break
    return plan


def _counts_heads(attention: nn.Module) -> bool:
    return any("heads" in name and type(value) is int and value > 1 for name, value in vars(attention).items())
