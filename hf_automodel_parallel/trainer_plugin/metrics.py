"""``ParallelMetrics``: a Trainer callback that adds speed and memory to what the Trainer logs."""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from .. import compat
from ..accelerate_plugin.prepared import PreparedModel, prepared
from ..accelerate_plugin.throughput import BatchCounter, local_bytes, peak_memory, state_bytes
from ..core.output import size_text, tell
from ..core.ranks import gather_tensors
from ..errors import ConfigError

logger = logging.getLogger(__name__)


class ParallelMetrics(TrainerCallback):
    """Adds to each training log of the Trainer, so that TensorBoard, W&B and the log history have it:

    * ``tokens_per_second`` (padding included) and ``tokens_per_second_per_device``; each batch of a tp group, or of a
      tp and cp group, counts once;
    * ``tflops_per_device``: matrix products of forward and backward with weights, without those of attention scores
      and of recomputed activations; frozen weights have no product for their own gradient. Left out where the
      parameters do not tell it (:func:`flops_per_token`), unless ``flops_per_token`` is given;
    * ``mfu``, with ``peak_tflops``: its share of what the device can do;
    * ``data_wait_seconds`` of an optimizer step, and ``peak_memory_gib``: of the rank with most.

    Times are of training steps only, not of evaluation and saving. One all-gather of four numbers for each log. A
    script that runs in one process, without a launcher, gets a warning and no metrics.

    With ``plan`` rank 0 says once, after the first step, what it holds beside what was predicted: parameters, optimizer
    state and, on CUDA, the peak.

    Args:
        peak_tflops: what a device can do in the dtype of the training.
        flops_per_token: floating-point operations of forward and backward, instead of those counted from the model.
        plan: file that ``hf-automodel-parallel plan ... --json`` printed, for the same mesh.

    Raises:
        ConfigError: ``plan`` is no such file; when training begins on several ranks without an
            :class:`AutoParallelismConfig`, or on another mesh than that of ``plan``.

    Examples:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[ParallelMetrics(peak_tflops=989)])
    """

    def __init__(
        self,
        peak_tflops: float | None = None,
        flops_per_token: float | None = None,
        plan: str | Path | None = None,
    ) -> None:
        self.peak_tflops, self.flops_per_token = peak_tflops, flops_per_token
        self._prediction = None if plan is None else _Prediction(Path(plan))
        self._record: PreparedModel | None = None
        self._counter: BatchCounter | None = None
        self._clear(time.perf_counter())

    def _clear(self, now: float) -> None:
        self._steps, self._seconds, self._waited, self._since = 0, 0.0, 0.0, now

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        record = None if model is None else prepared(model)
        if record is None and not (dist.is_available() and dist.is_initialized()):
            warnings.warn("ParallelMetrics: this is one process, so there is nothing to measure.", stacklevel=2)
            return
        if record is None:
            raise ConfigError(
                "ParallelMetrics measures a model that AutoParallelismConfig parallelises. Give the Trainer one, or "
                "leave the callback out."
            )
        if self._prediction is not None:
            self._prediction.check(record)
        self._record, self._counter = record, BatchCounter(model)
        self._clear(time.perf_counter())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._counter is not None:
            self._counter.remove()
        self._record = self._counter = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._waited += now - self._since
        self._seconds += now - self._since
        self._since = now

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._prediction is not None and self._record is not None:
            self._prediction.tell(self._record, optimizer)
            self._prediction = None
        now = time.perf_counter()
        self._seconds += now - self._since
        self._steps += 1
        self._since = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def measured(self) -> dict[str, float]:
        """The metrics since the last call; empty before the first step. Collective."""
        record, counter = self._record, self._counter
        if record is None or counter is None or not self._steps:
            return {}
        config: Any = record.config
        device = record.context.device
        mine = [counter.tokens, self._seconds, self._waited / self._steps, peak_memory(device)]
        everyone = gather_tensors(torch.tensor(mine, dtype=torch.float64))
        ranks = len(everyone)
        slowest = everyone.max(dim=0).values.tolist()
        counter.reset()
        self._clear(time.perf_counter())
        result = {"data_wait_seconds": slowest[2], "peak_memory_gib": slowest[3] / 2**30}
        tokens = everyone[:, 0].sum().item() / config.tp_size
        if tokens:
            result["tokens_per_second"] = tokens / slowest[1]
            result["tokens_per_second_per_device"] = tokens / slowest[1] / ranks
            flops = flops_per_token(record.context.model) if self.flops_per_token is None else self.flops_per_token
            if flops is not None:
                result["tflops_per_device"] = result["tokens_per_second_per_device"] * flops / 1e12
                if self.peak_tflops is not None:
                    result["mfu"] = result["tflops_per_device"] / self.peak_tflops
        return {name: float(f"{value:.4g}") for name, value in result.items()}


class _Prediction:
    """What ``plan --json`` said of a rank.

    Raises:
        ConfigError: ``path`` is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(path.read_text())
            self.sizes: dict[str, int] = dict(found["sizes"])
            self.memory = {name: int(found["memory"][name]) for name in ("parameters", "optimizer", "peak")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"ParallelMetrics(plan={str(path)!r}) is no file of hf-automodel-parallel plan --json: "
                f"{type(error).__name__}: {error}."
            ) from error

    def check(self, record: PreparedModel) -> None:
        """Raise if the prediction is of another mesh."""
        sizes = {axis: getattr(record.config, f"{axis}_size") for axis in self.sizes}
        if sizes != self.sizes:
            raise ConfigError(
                f"ParallelMetrics(plan={str(self.path)!r}) is of the mesh {self.sizes}, and this run has {sizes}. Run "
                "plan with the sizes of this run."
            )

    def tell(self, record: PreparedModel, optimizer: Any) -> None:
        """Say on rank 0 what is held beside what was predicted."""
        held = {"parameters": sum(local_bytes(p) for p in record.context.model.parameters())}
        if optimizer is not None:
            held["optimizer"] = state_bytes(optimizer)
        if record.context.device.type == "cuda":  # on the CPU it would be of the whole process
            held["peak"] = peak_memory(record.context.device)
        names = {"parameters": "parameters", "optimizer": "optimizer state", "peak": "peak"}
        parts = (f"{names[name]} {size_text(size)}, said {size_text(self.memory[name])}" for name, size in held.items())
        tell(logger, f"memory beside {self.path.name}: {'; '.join(parts)}")


def flops_per_token(model: nn.Module, experts_used: float | None = None) -> float | None:
    """Operations of the matrix products with weights for a token, forward and backward.

    Two for each weight forward and two for the gradient of its input; two more if it is trained. An embedding table
    counts where it is the output head, too. None where not each token uses each weight: for models with experts,
    without ``experts_used``, the share of them that a token uses, with an encoder and a decoder, or with a tower for
    images or sound; and for quantised weights.
    """
    config: Any = getattr(model, "config", None)
    towers = set(getattr(config, "sub_configs", None) or ()) - {"text_config"}
    if towers or getattr(config, "is_encoder_decoder", False):
        return None
    head = getattr(compat.lm_head_module(model), "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    total = 0.0
    for name, parameter in model.named_parameters():
        expert = ".experts." in name
        if (expert and experts_used is None) or not parameter.is_floating_point():
            return None
        if parameter.ndim >= 2 and id(parameter) not in tables:
            share = experts_used if expert and experts_used is not None else 1
            total += parameter.numel() * (6 if parameter.requires_grad else 4) * share
    return total
