"""Several modules as one FSDP2 unit: the output of each of them gathers the unit again when it is differentiated.

FSDP2 (torch 2.11 to 2.13) watches the output of that module of a unit alone which runs last. Final norm and head are
such a unit. Let one forward's loss use the norm's output and not the logits, and another forward's loss its logits,
before one backward of both: after the second forward's part of the backward the unit is freed, and the norm of the
first, whose output nobody watched, then reads freed memory, which ends the process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def gather_again_in_backward(modules: list[nn.Module]) -> None:
    """Hook this in for ``modules``, which are one FSDP2 unit. Gathering what is there already costs nothing."""
    if len(modules) > 1:
        for module in modules:
            module.register_forward_hook(_watch)


@torch.compiler.disable
def _watch(module: FSDPModule, _: Any, output: Any) -> None:  # type: ignore[misc]
    def gather(_: torch.Tensor) -> None:
        module.unshard()

    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(gather)
