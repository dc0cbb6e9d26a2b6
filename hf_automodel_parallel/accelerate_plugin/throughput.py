"""What the training forwards of a model computed on this rank, and the memory of its device."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class BatchCounter:
    """Counts the rows and tokens of the training forwards of ``model`` on this rank, padding included.

    Tokens are the positions of ``input_ids`` or ``inputs_embeds``, as the model gets them: under cp a sequence shard.
    Forwards without gradients (evaluation, generation) do not count, nor those of a model that a script compiles whole.

    Attributes:
        rows: since the last :meth:`reset`.
        tokens: since then; stays 0 for models without text.
        began: time of the first of these forwards, by ``time.perf_counter``; None before it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reset()
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def reset(self) -> None:
        self.rows = self.tokens = 0
        self.began: float | None = None

    def remove(self) -> None:
        """Stop counting."""
        self._hook.remove()

    def _count(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        # Where a script compiles the whole model, a count would be a guard of its graph.
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        if self.began is None:
            self.began = time.perf_counter()
        text = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        first = next((x for x in (text, *args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim), None)
        if first is None:
            return
        self.rows += first.shape[0]
        if first is text or not first.is_floating_point():
            self.tokens += first.shape[0] * first.shape[1] if first.ndim > 1 else 0


def synchronize(device: torch.device) -> None:
    """Wait for the work that was queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has needed at most so far: of tensors on ``device``, on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of this rank's shard of ``tensor``."""
    with torch.no_grad():
        shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard.numel() * shard.element_size()


def state_bytes(optimizer: Any) -> int:
    """Bytes of this rank's shards of the tensors in the state of ``optimizer``."""
    states = (x for s in optimizer.state.values() if isinstance(s, dict) for x in s.values())
    return sum(local_bytes(x) for x in states if isinstance(x, torch.Tensor))
