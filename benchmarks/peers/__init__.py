"""The implementations that are measured side by side; each builds the same model with the same weights."""

from __future__ import annotations

import importlib

from .case import Case
from .peer import NotPossible, Peer

#: name -> what it is, as shown
PEERS = {
    "floor": "hand-written floor",
    "styles": "torch's styles",
    "native": "transformers' DistributedConfig",
    "accelerate_fsdp": "stock Accelerate FSDP2",
    "raw_fsdp": "torch's fully_shard",
    "ours": "hf_automodel_parallel",
}

__all__ = ["PEERS", "Case", "NotPossible", "Peer", "build_peer", "chosen"]


def build_peer(name: str, case: Case) -> Peer:
    """The peer's model for a case; collective.

    Raises:
        NotPossible: the peer has no such case.
    """
    peer: Peer = importlib.import_module(f"{__name__}.{name}").build_peer(case)
    return peer


def chosen(names: list[str] | None) -> list[str]:
    """The peers of ``--peers``.

    Raises:
        SystemExit: an unknown name.
    """
    unknown = [name for name in names or [] if name not in PEERS]
    if unknown:
        raise SystemExit(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    return list(names or PEERS)
