"""At the first optimizer step: the copies of a replicated parameter have equal gradients on all ranks of a tp group.

A plan says which replicated parameters see sharded activations, so that their gradients are summed. Where it forgets one (a
learnable activation between two sharded projections, say), each rank would train its own copy, without an error and with a
loss that looks right. Complete gradients of copies are computed alike and come out equal; forgotten ones differ by as much
as they are large, so one look tells.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .errors import AutoParallelError

#: Copies may differ by rounding (kernels with atomics); a forgotten sum differs by about the gradient itself.
RELATIVE_TOLERANCE = 1e-2
#: Gradients below this part of the largest one are rounding noise of something that is zero in exact arithmetic.
NOISE_FLOOR = 1e-5


class GradientAuditError(AutoParallelError, RuntimeError):
    """Training would go wrong without a sign; the message names the parameters, the likely cause and the remedy."""


@torch.no_grad()
def check_replicated_gradients(model: nn.Module, tp_mesh: DeviceMesh) -> bool:
    """Compare the gradients of parameters replicated over ``tp_mesh`` between its ranks.

    Collective: every rank calls it, after outstanding partial gradients were summed and before the step. Costs one small
    gather over all ranks.

    Returns:
        False if there was nothing to look at: no replicated parameter has a gradient, or a gradient is not finite.

    Raises:
        GradientAuditError: on all ranks alike.
    """
    names, norms = [], []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements[-1].is_replicate():
            names.append(name)
            norms.append(torch.linalg.vector_norm(gradient.to_local().float()))
    if not names:
        return False
    mine = torch.stack(norms).to(next(model.parameters()).device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)  # over all ranks, so that all tp groups come to the same end
    table = torch.stack(everyone).view(-1, tp_mesh.size(), len(names))  # tp is the innermost axis of the mesh
    if not torch.isfinite(table).all():
        return False  # an overflow says nothing about copies; the next step is looked at
    largest = table.amax(1)
    spread = largest - table.amin(1)
    suspicious = (spread > RELATIVE_TOLERANCE * largest) & (spread > NOISE_FLOOR * table.max())
    wrong = [name for name, flag in zip(names, suspicious.any(0).tolist(), strict=True) if flag]
    if not wrong:
        return True
    pattern = ".".join("*" if part.isdigit() else part for part in wrong[0].split("."))
    owner = pattern.removeprefix("base_model.model.").rpartition(".")[0]
    raise GradientAuditError(
        f"{len(wrong)} replicated parameters have different gradients on the ranks of a tp group ({', '.join(wrong[:4])}"
        f"{', ...' if len(wrong) > 4 else ''}); training on would let their copies drift apart. Likely cause: they see sharded "
        f"activations and the plan does not say so. Remedy: pass tp_plan={{**model.tp_plan, {owner!r}: "
        f"'replicated_with_grad_allreduce'}}, or leave the projections around them out of the plan, or use tp_size=1. Other "
        f"causes: random numbers drawn on some ranks only, or different batches on the ranks of one tp group."
    )
