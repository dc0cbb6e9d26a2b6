"""What a model computes in one process on all of the data: the reference that parallel runs are compared with.

There is no `Trainer` and no `Accelerator` in here, so that an error of theirs cannot be on both sides of a comparison.
"""

from typing import Any

import torch
from torch import nn

from .models import IGNORED_LABEL

Batch = dict[str, torch.Tensor]

OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def loss_and_grads(
    model: nn.Module, batches: list[Batch], combine: str = "mean"
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """The loss over all micro-batches and its gradients by the names of `model.named_parameters()`.

    `combine="mean"` is the mean of the losses of the micro-batches, whatever number of labels each has.
    `combine="tokens"` divides the sum over all labels by their number, which is what the stock `Trainer` does: every
    micro-batch gets `num_items_in_batch`, the number of labels of all of them together.

    The gradients of frozen and unused parameters are None. `model` keeps no gradients.
    """
    model.zero_grad(set_to_none=True)
    loss = _backward(model, batches, combine)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss, gradients


def train_steps(
    model: nn.Module,
    step_batches: list[list[Batch]],
    lr: float = 1e-3,
    max_grad_norm: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    combine: str = "mean",
) -> list[dict[str, float]]:
    """Trains `model` in place, one optimizer step for each list of micro-batches.

    Returns for every step the loss and the norm of its gradients (before clipping).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = OPTIMIZERS[optimizer](parameters, lr=lr, weight_decay=weight_decay)
    history = []
    for batches in step_batches:
        stepper.zero_grad(set_to_none=True)
        loss = _backward(model, batches, combine)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
        stepper.step()
        history.append({"loss": loss, "grad_norm": grad_norm.item()})
    return history


def count_labels(batches: list[Batch]) -> int:
    """Labels that enter the loss: causal models predict no first token."""
    return sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches)


def _backward(model: nn.Module, batches: list[Batch], combine: str) -> float:
    if combine not in ("mean", "tokens"):
        raise ValueError(f"combine must be 'mean' or 'tokens', not {combine!r}")
    total = 0.0
    for batch in batches:
        if combine == "mean":
            loss = model(**batch).loss / len(batches)
        else:
            loss = model(**batch, num_items_in_batch=count_labels(batches)).loss
        loss.backward()
        total += loss.item()
    return total
