"""The reference API's check that tp_size divides the numbers of attention heads, before a plan is selected."""

from __future__ import annotations

from typing import Any

from ..errors import PlanAssertionError
from ..plan.validate import config_with_heads, counted_heads


def validate_tp_mesh(model: Any, tp_mesh: Any) -> None:
    """Check that ``tp_mesh.size()`` divides the numbers of attention heads and of key/value heads of ``model``.

    Args:
        model: an object with a ``config``, which may be composite. A config without head counts passes.
        tp_mesh: an object whose ``size()`` is the number of tp ranks.

    Raises:
        PlanAssertionError: (a ``ValueError`` and an ``AssertionError``) a number of heads is not divisible.
    """
    size = tp_mesh.size()
    if size == 1:
        return
    if getattr(getattr(model, "config", None), "model_type", None) == "nemotron-nas":
        validate_tp_mesh_for_nemotron_nas(model, size)
        return
    for field, value in counted_heads(config_with_heads(model)).items():
        if value % size:
            raise PlanAssertionError(_not_divisible(field, value, size))


def validate_tp_mesh_for_nemotron_nas(model: Any, tp_size: int) -> None:
    """The same check for Nemotron-NAS, whose ``config.block_configs`` describes each layer.

    The layers differ in their number of key/value heads, and some have no attention.

    Raises:
        PlanAssertionError: a number of heads is not divisible, or ``block_configs`` does not describe all layers.
    """
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if heads % tp_size:
        raise PlanAssertionError(_not_divisible("num_attention_heads", heads, tp_size))
    blocks = list(getattr(config, "block_configs", None) or ())
    if len(blocks) < layers:
        raise PlanAssertionError(
            f"block_configs describes {len(blocks)} layers, but num_hidden_layers={layers}: the heads of the others "
            "are unknown."
        )
    for index, block in enumerate(blocks[:layers]):
        attention = _field(block, "attention")
        if _field(attention, "replace_with_linear"):
            continue  # a linear layer instead of attention: no heads, replicated unless a plan names it
        group = _field(attention, "n_heads_in_group")
        if group is None:
            if not _field(attention, "no_op"):
                raise PlanAssertionError(
                    f"block_configs[{index}].attention has neither n_heads_in_group nor no_op=True, so its heads are "
                    "unknown."
                )
        elif (heads // group) % tp_size:
            raise PlanAssertionError(
                _not_divisible(
                    f"block_configs[{index}]: num_attention_heads // n_heads_in_group", heads // group, tp_size
                )
            )


def _field(block: Any, name: str) -> Any:
    return block.get(name) if isinstance(block, dict) else getattr(block, name, None)


def _not_divisible(field: str, value: int, tp_size: int) -> str:
    return (
        f"{field}={value} does not divide by tp_size={tp_size}, and every rank needs a whole number of heads. Choose a "
        f"tp_size that divides it, or tp_size=1."
    )
