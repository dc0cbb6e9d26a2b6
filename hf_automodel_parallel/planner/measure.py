"""One step of one rank on simulated ranks: ``Accelerator.prepare``, forward, backward, clipping and optimizer step on
tensors without memory. A process has one group, so each measurement is a process of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..accelerate_plugin.prepared import prepared
from ..config import AutoParallelismConfig
from ..core.mesh import AXES
from ..core.model_view import ModelView
from ..errors import ConfigError, UnsupportedError
from ..strategies.context import ParallelizeContext
from ..tensor_parallel.vocab_parallel.logits import ShardedLogits
from ..trainer_plugin.metrics import flops_per_token
from .counting import Memory
from .layer import LayerTrace


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        config: fields of ``AutoParallelismConfig``, all sizes of axes given.
        batch: rows of each data-parallel rank's batch.
        sequence: tokens of a row, of all cp ranks together.
        optimizer: name of a class of ``torch.optim``, in any case.
        mixed_precision: "no", "bf16" or "fp16".
        clip: the norm of gradients is clipped.
        environment: variables that ``accelerate launch`` would set.
    """

    config: dict[str, Any]
    batch: int
    sequence: int
    optimizer: str
    mixed_precision: str
    clip: bool
    environment: dict[str, str]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(self.config.get(f"{axis}_size") or 1 for axis in AXES)


def simulate(setting: Setting, network: nn.Module) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """Make this process rank 0 of simulated ranks, and prepare ``network`` (on meta, changed in place) there.

    Returns:
        The Accelerator, the prepared model (its parameters still on meta), the prepared optimizer.

    Raises:
        AutoParallelError: ``prepare`` refuses the model or an option.
    """
    from accelerate import Accelerator

    compat.start_simulated_ranks(setting.world)
    _set_environment(setting)
    # Both look at values, which no tensor has here.
    config = AutoParallelismConfig(**{**setting.config, "check_optimizer": False, "audit": "off"})
    accelerator = Accelerator(parallelism_config=config, mixed_precision=setting.mixed_precision, cpu=True)
    made: Any = optimizer_class(setting.optimizer)
    optimizer = made([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    model, prepared_optimizer = accelerator.prepare(network, optimizer)
    return accelerator, model, prepared_optimizer


def _set_environment(setting: Setting) -> None:
    foreign = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_")
    for name in [name for name in os.environ if name.startswith(foreign)]:
        del os.environ[name]
    os.environ.update(setting.environment)
    os.environ.update(ACCELERATE_USE_CPU="true", FSDP_CPU_RAM_EFFICIENT_LOADING="false", LOCAL_WORLD_SIZE="1")
    os.environ.update(WORLD_SIZE=str(setting.world), RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of ``torch.optim`` of this name, in any case.

    Raises:
        ConfigError: there is none.
    """
    known: dict[str, type[torch.optim.Optimizer]] = {
        cls.__name__.lower(): cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise ConfigError(f"optimizer {name!r}: give a class of torch.optim: {', '.join(sorted(known))}.")
    return known[name.lower()]


def placements(setting: Setting, network: nn.Module) -> dict[str, Any]:
    """What :func:`simulate` decides on the whole model.

    Returns:
        fields of :class:`~.explanation.Explanation` that need no step, ``shard_bytes`` (parameters of this rank) and
        ``layers`` (their number).

    Raises:
        AutoParallelError: ``prepare`` refuses the model or an option.
    """
    total = {name: (p.numel(), p.requires_grad) for name, p in network.named_parameters()}
    used = _experts_used(network)
    operations = flops_per_token(network, used)
    _, model, _ = simulate(setting, network)
    context: ParallelizeContext = prepared(model).context  # type: ignore[union-attr]
    spec, plan = context.spec, context.plan
    replicated = (
        {} if spec is None else {n for n in total if n not in spec.parameters or spec.parameters[n].dim is None}
    )
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    return {
        "origin": None if plan is None else plan.origin,
        "rows": [] if spec is None else [list(map(str, row)) for row in spec.rows],
        "notes": [] if spec is None else list(spec.notes),
        "unmatched": [] if spec is None else [f"{entry.pattern} ({entry.style_name})" for entry in spec.unmatched],
        "parameters": sum(count for count, _ in total.values()),
        "trainable": sum(count for count, trains in total.values() if trains),
        "replicated_over_tp": sum(total[name][0] for name in replicated),
        "largest_replicated": sorted(((sizes[n], n) for n in replicated if n in sizes), reverse=True)[:3],
        "shard_bytes": _bytes(model.parameters()),
        "layers": len(context.structure.layers) if context.structure is not None else 0,
        "flops_per_token": operations,
        "experts_used": used,
    }


def _experts_used(network: nn.Module) -> float | None:
    """The share of the experts that a token uses, as the config says."""
    config: Any = getattr(ModelView.of(network).inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    used = getattr(text, "num_experts_per_tok", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if used and getattr(text, name, None):
            return used / getattr(text, name)
    return None


def measure(setting: Setting, network: nn.Module) -> dict[str, Any]:
    """Bytes and collectives of one step of rank 0, after a first one that sets up what is set up once.

    Returns:
        bytes by name (``parameters``, ``gradients``, ``optimizer``, ``buffers``, ``activations``, ``logits``,
        ``gathered``), ``peaks``: phase -> bytes, in the order of a step, ``collectives``: "kind axis" -> [calls,
        bytes of full tensors, bytes sent], and ``layer``: see :class:`.layer.LayerTrace`.

    Raises:
        UnsupportedError: the model's forward needs values, which tensors without memory do not have.
    """
    accelerator, model, optimizer = simulate(setting, network)
    context: ParallelizeContext = prepared(model).context  # type: ignore[union-attr]
    memory = Memory()
    figures: dict[str, Any] = {}
    with compat.fake_tensor_mode(), compat.quiet_fake_tensors():
        model.to_empty(device="cpu")
        layers = context.structure.main_layers  # type: ignore[union-attr]
        marks = _Marks(memory, layers, context.structure.head)  # type: ignore[union-attr]
        memory.add([*model.parameters(), *model.buffers()])
        with memory.watching_sizes(), memory:
            try:
                _step(accelerator, model, optimizer, setting, memory, marks)
            except (RuntimeError, NotImplementedError) as error:
                if "fake" not in type(error).__module__ and "Dynamic" not in type(error).__name__:
                    raise
                first = str(error).strip().splitlines()[0]
                raise UnsupportedError(
                    f"the forward of {type(ModelView.of(model).inner).__name__} needs the values of tensors, so its "
                    f"step cannot run without them ({type(error).__name__}: {first}). Use --no-step (step=False)."
                ) from error
            optimizer.zero_grad()
            memory.restart()
            tp = setting.config.get("tp_size") or 1
            counts = LayerTrace(accelerator.torch_device_mesh, memory, model, layers, context.spec, tp)
            with counts.watching():
                figures |= _step(accelerator, model, optimizer, setting, memory, marks)
        figures["gradients"] = _bytes([p.grad for p in model.parameters() if p.grad is not None])
        states = optimizer.state.values()
        figures["optimizer"] = _bytes([v for s in states for v in s.values() if isinstance(v, torch.Tensor)])
        figures["parameters"], figures["buffers"] = _bytes(model.parameters()), _bytes(model.buffers())
        figures["gathered"] = memory.most_gathered
    figures["peaks"] = memory.peaks
    figures["collectives"] = {
        f"{kind} {axis}": [calls.count, calls.tensor_bytes, calls.sent_bytes]
        for (kind, axis), calls in counts.calls.items()
    }
    figures["layer"] = counts.found
    return figures


def _step(
    accelerator: Any, model: nn.Module, optimizer: Any, setting: Setting, memory: Memory, marks: _Marks
) -> dict[str, int]:
    """One step; returns the bytes that its forward keeps for the backward."""
    memory.phase = "forward"
    batch: dict[str, Any] = {
        name: torch.zeros(setting.batch, setting.sequence, dtype=torch.long) for name in ("input_ids", "labels")
    }
    sharded: Any = contextlib.nullcontext()
    if accelerator.parallelism_config.cp_size > 1:
        batch["shift_labels"] = torch.zeros_like(batch["labels"])
        batch["position_ids"] = torch.zeros_like(batch["labels"])
        buffers = list(batch.values())
        sharded = accelerator.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1] * len(buffers))
    if "use_cache" in inspect.signature(type(ModelView.of(model).inner).forward).parameters:
        batch["use_cache"] = False
    with sharded:
        before = memory.now - memory.gathered
        marks.logits = 0
        loss = model(**batch).loss
        kept = memory.now - memory.gathered - before
        memory.phase = "head's backward"
        accelerator.backward(loss)
    memory.phase = "clipping and step"
    if setting.clip:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"activations": kept - marks.logits, "logits": marks.logits}


class _Marks:
    """Hooks that tell :class:`Memory` where a step is: which layer's backward runs.

    Attributes:
        logits: bytes of the logits on this rank.
    """

    def __init__(self, memory: Memory, layers: list[nn.Module], head: list[nn.Module]) -> None:
        self.memory = memory
        self.logits = 0
        for index, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda _, __, output, index=index: self._watch(output, index)  # type: ignore[misc]
            )
        if head:
            head[-1].register_forward_hook(self._after_head)

    def _after_head(self, _: nn.Module, __: Any, output: Any) -> None:
        part = output.stored() if isinstance(output, ShardedLogits) else output
        self.logits = part.untyped_storage().nbytes() if isinstance(part, torch.Tensor) else 0

    def _watch(self, output: Any, index: int) -> None:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _: self._enter(f"backward of layer {index}"))

    def _enter(self, phase: str) -> None:
        self.memory.phase = phase


def _bytes(tensors: Any) -> int:
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in locals_)
