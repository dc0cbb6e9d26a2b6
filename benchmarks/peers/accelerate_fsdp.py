"""Stock Accelerate's FSDP2.

On CPU Accelerate does not turn FSDP on, so its state is told that it is on; the code that shards is its own.
"""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from .accelerate_state import new_state
from .case import Case, build, compile_layers
from .peer import NotPossible, Peer, prepared_by


def accelerator_for() -> tuple[Accelerator, Callable[[], None]]:
    """An Accelerator, and what activates its state."""
    activate = new_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)  # without a mesh: all ranks shard
    # in both, as Accelerate does where it turns FSDP on itself
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator, activate


def build_peer(case: Case) -> Peer:
    """The model through ``prepare``, FSDP2 alone."""
    if case.tp > 1:
        raise NotPossible("Accelerate has no tensor parallelism of its own: transformers shards the model")
    accelerator, activate = accelerator_for()
    model = build(case)
    if case.compiled:
        compile_layers(model)
    return prepared_by(accelerator, activate, model)
