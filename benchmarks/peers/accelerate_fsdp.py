"""Stock Accelerate's FSDP2.

On CPU Accelerate does not turn FSDP on, so its state is told that it is on; the code that shards is its own.
"""

from __future__ import annotations

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from .accelerate_state import new_state
from .case import Case, build, compile_layers, trainable
from .peer import NotPossible, Peer, sgd


def build_peer(case: Case) -> Peer:
    """The model through ``prepare``, FSDP2 alone."""
    if case.tp > 1:
        raise NotPossible("Accelerate has no tensor parallelism of its own: transformers shards the model")
    activate = new_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(dp_shard_size=case.dp))
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = build(case)
    if case.compiled:
        compile_layers(model)
    model, optimizer = accelerator.prepare(model, sgd(trainable(model)))
    return Peer(model, backward=accelerator.backward, optimizer=optimizer, activate=activate)
