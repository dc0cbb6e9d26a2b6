"""This package, inside of ``Accelerator.prepare``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from hf_automodel_parallel import AutoParallelismConfig

from .accelerate_state import new_state
from .case import Case, build
from .floor import COLUMN, ROW
from .peer import Peer, prepared_by


def config(case: Case, **options: Any) -> AutoParallelismConfig:
    """What a user would pass for the case, with more options."""
    fields: dict[str, Any] = {"tp_size": case.tp, "dp_shard_size": case.dp, "compile": case.compiled}
    if case.sequence_parallel:
        fields["sequence_parallel"] = True
    if case.tp > 1 and not case.whole:
        fields["tp_plan"] = layers_plan()
    return AutoParallelismConfig(**fields, **options)


def layers_plan() -> dict[str, str]:
    """Only the decoder layers."""
    styles = {name: "colwise" for name in COLUMN} | {name: "rowwise" for name in ROW}
    blocks = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in styles}
    return {f"model.layers.*.{blocks[name]}.{name}": style for name, style in styles.items()}


def accelerator_for(case: Case, state_dict_type: str | None = None, **options: Any) -> tuple[Any, Callable[[], None]]:
    """An Accelerator, and what activates its state."""
    activate, plugin = new_state(), None
    if state_dict_type is not None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type=state_dict_type
        )
    return Accelerator(cpu=True, parallelism_config=config(case, **options), fsdp_plugin=plugin), activate


def build_peer(case: Case) -> Peer:
    """The model through ``prepare``."""
    accelerator, activate = accelerator_for(case)
    return prepared_by(accelerator, activate, build(case))
