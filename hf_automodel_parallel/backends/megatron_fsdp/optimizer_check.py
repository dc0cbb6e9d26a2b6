"""Does an optimizer treat each element on its own? No DTensor operator is right on megatron-fsdp's uneven shards."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import UnsupportedError
from ...optim.sharding_check import TOLERANCE, like_on, run_steps, uneven_numbers

_STEPS = 3


def check_elementwise(
    optimizers: list[torch.optim.Optimizer], names: list[list[list[str]]], shapes: dict[str, torch.Size]
) -> None:
    """Raise unless every optimizer computes on two parts of a parameter what it computes on the whole one. Not
    collective.

    Args:
        optimizers: the user's.
        names: ``names[optimizer][group][i]``, names of their parameters.
        shapes: shape of each parameter, by name.

    Raises:
        UnsupportedError: an optimizer takes a statistic over whole parameters.
        PrepareError: it cannot be tried.
    """
    with torch.random.fork_rng(devices=[]):
        for optimizer, groups in zip(optimizers, names, strict=True):
            kinds = [sorted({len(shapes[name]) for name in group}) for group in groups]
            _check_one(optimizer, kinds)


def _check_one(optimizer: torch.optim.Optimizer, kinds: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(48,) + (16,) * (ndim - 1) for group in kinds for ndim in group]
    if not shapes:
        return
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[uneven_numbers(shape, generator) for shape in shapes] for _ in range(_STEPS)]

    def cut(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part.clone() for tensor in tensors for part in (tensor[:11], tensor[11:])]

    whole = [nn.Parameter(value.clone()) for value in values]
    run_steps(like_on(optimizer, kinds, whole), whole, gradients)
    parts = [nn.Parameter(part) for part in cut(values)]
    doubled = [[ndim for ndim in group for _ in range(2)] for group in kinds]
    run_steps(like_on(optimizer, doubled, parts), parts, [cut(step) for step in gradients])
    for index, (value, expected) in enumerate(zip(values, whole, strict=True)):
        result = torch.cat([part.detach() for part in parts[2 * index : 2 * index + 2]])
        update = (expected.detach() - value).norm().item()
        if not (expected.detach() - result).norm().item() <= TOLERANCE * update + 1e-6 * value.norm().item():
            raise UnsupportedError(
                f"{type(optimizer).__name__} needs a statistic over whole parameters, which megatron-fsdp cuts at any "
                f"row. Use an element-wise optimizer (AdamW, SGD, Adagrad, RMSprop, Lion, ...), or backend='fsdp2'. If "
                f"you know better, set check_optimizer=False."
            )
