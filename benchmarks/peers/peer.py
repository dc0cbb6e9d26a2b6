"""What a peer hands back: the parallelised model, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..timing import Stopwatch
from .case import trainable


class NotPossible(Exception):
    """A peer cannot do a case; the message says why."""


class Peer:
    """A parallelised model with its training step.

    Args:
        model: as :func:`benchmarks.peers.case.build` made it, parallelised.
        loss: of a batch; default: what the model computes with labels.
        backward: default: ``loss.backward()``.
        optimizer: SGD over the trainable parameters by default; only :meth:`train` uses it.
        activate: called before a step that follows one of another peer.
        prepare_seconds: wall clock and CPU that ``accelerator.prepare`` took.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
        optimizer: Any = None,
        activate: Callable[[], None] = lambda: None,
        prepare_seconds: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.model = model
        self._trainable = trainable(model)
        self.loss = loss or (lambda batch: model(**batch, use_cache=False).loss)
        self.backward = backward
        self.optimizer = optimizer or sgd(self._trainable)
        self.activate = activate
        self.prepare_seconds = prepare_seconds

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward, backward with all gradients complete, gradients set to None; the loss of this rank's batch."""
        loss = self.loss(batch)
        self.backward(loss)
        for parameter in self._trainable:  # not by a walk through the modules, of which peers have more or fewer
            parameter.grad = None
        return loss.detach()

    def train(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The same with an optimizer step."""
        loss = self.loss(batch)
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What the comparison of losses trains with: its update is proportional to the gradient, unlike Adam's."""
    return torch.optim.SGD(parameters, lr=0.5, foreach=False)


def prepared_by(accelerator: Any, activate: Callable[[], None], model: nn.Module) -> Peer:
    """The model through ``accelerator.prepare``."""
    optimizer = sgd(trainable(model))
    watch = Stopwatch()
    model, prepared = accelerator.prepare(model, optimizer)
    return Peer(model, None, accelerator.backward, prepared, activate, watch.read())
