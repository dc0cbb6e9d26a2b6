"""torch's ``fully_shard`` on each decoder layer and on the model, nothing else."""

from __future__ import annotations

from torch.distributed.fsdp import fully_shard

from .case import Case, build, compile_layers, layers_of, mesh_of
from .peer import NotPossible, Peer


def build_peer(case: Case) -> Peer:
    """FSDP2 alone."""
    if case.tp > 1:
        raise NotPossible("no tensor parallelism: that is the peer floor")
    model = build(case)
    if case.compiled:
        compile_layers(model)
    for module in (*layers_of(model), model):
        fully_shard(module, mesh=mesh_of(case)["dp"])
    return Peer(model)
