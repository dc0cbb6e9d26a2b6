"""``explain``: what a model costs on a mesh, as an object; the command ``plan`` prints it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from ..activation_checkpointing import normalized_mode
from ..config import AutoParallelismConfig
from ..core.mesh import AXES
from ..core.options import CHECKPOINTING_MODES
from ..core.output import VERBOSE_VARIABLE
from ..errors import AutoParallelError, ConfigError, UnsupportedError
from .child import Job, cannot_be_sent, error_of
from .explanation import Explanation
from .interconnect import ORDER, Interconnect
from .measure import Setting, optimizer_class
from .models import dtype_of, name_of
from .remedies import warnings_for


def explain(
    model: nn.Module | str | Any,
    config: AutoParallelismConfig | Mapping[str, Any] | str,
    *,
    world_size: int | None = None,
    batch: int = 1,
    sequence: int = 4096,
    dtype: str | None = None,
    mixed_precision: str = "no",
    optimizer: str = "adamw",
    lora: Mapping[str, Any] | None = None,
    clip: bool = True,
    checkpointing: Sequence[str] = (),
    interconnect: str | None = None,
    gpus_per_node: int | None = None,
    gpu_memory: int | None = None,
    environment: Mapping[str, str] | None = None,
    every_layer: bool = False,
    step: bool = True,
    imports: Sequence[str] = (),
    processes: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> Explanation:
    """What a training step of ``model`` under ``config`` shards, keeps, sends and needs, without a GPU or weights.

    ``Accelerator.prepare``, forward, backward, clipping and optimizer step run in other processes, on a process group
    of simulated ranks and on tensors without memory. Of layers that repeat a few are run, at two depths, and the
    difference is counted for the others.

    Args:
        model: a module on any device (copied to meta; its adapters are kept), a config of transformers, a model
            directory, a ``config.json``, a cached hub id, or the name of a shipped geometry ("llama-3.1-405b").
        config: an ``AutoParallelismConfig`` or what ``AutoParallelismConfig.parse`` takes. The model is run uncompiled.
        world_size: number of ranks, 1 or more, for sizes that ``config`` leaves open; None: an open size is 1.
        batch: rows of each data-parallel rank.
        sequence: tokens of a row, of all cp ranks together.
        dtype: dtype of the parameters, "bf16" if None. A module keeps its own and takes None only.
        mixed_precision: as for ``Accelerator``; trained parameters are then kept in float32.
        optimizer: name of a class of ``torch.optim``.
        lora: arguments of ``peft.LoraConfig``, to wrap the model first.
        clip: the norm of the gradients is clipped.
        checkpointing: further modes of activation checkpointing to measure.
        interconnect: name for :attr:`Explanation.seconds`, see ``planner/interconnects.yaml``.
        gpus_per_node: instead of the interconnect's.
        gpu_memory: bytes, for the warnings.
        environment: variables that ``accelerate launch`` would set (``FSDP_*``).
        every_layer: run all layers instead of few.
        step: False: only prepare the model; memory, collectives and warnings stay empty, and the arguments that a step
            needs are refused: ``checkpointing``, ``interconnect``, ``gpus_per_node``, ``gpu_memory``, ``every_layer``.
        imports: modules that the processes import first, such as one that registers an architecture.
        processes: measurements at a time.
        progress: called with a line for each result.

    Raises:
        ConfigError: an argument is wrong, or the mesh does not fit.
        AutoParallelError: ``prepare`` refuses the model or an option, in its words.

    Examples:
        >>> explain("llama-3.1-405b", "tp=8,dp_shard=128", sequence=8192).memory["peak"]
    """
    config = AutoParallelismConfig.parse(config)
    base = settings_of(config, world_size, batch, sequence, optimizer, mixed_precision, clip, environment)
    dtype = _dtype_of(model, dtype)
    if not step:
        needed = {"checkpointing": checkpointing, "interconnect": interconnect, "gpus_per_node": gpus_per_node}
        needed |= {"gpu_memory": gpu_memory, "every_layer": every_layer}
        without_effect("step=False", [name for name, value in needed.items() if value])
    link = None if interconnect is None else Interconnect.named(interconnect, gpus_per_node)
    own = normalized_mode(config.activation_checkpointing)
    if own == "none" and (environment or {}).get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        own = "full"
    for mode in checkpointing:
        if mode not in CHECKPOINTING_MODES:
            raise ConfigError(f"checkpointing={mode!r}: give {', '.join(CHECKPOINTING_MODES)}.")
    modes = [own, *(mode for mode in dict.fromkeys(checkpointing) if mode != own)]
    if config.sequence_parallel_regather:
        modes = [own]  # refused beside most of them
    modes = modes if step else []
    others = [mode for mode in checkpointing if mode not in modes]
    settings = [base if mode == own else with_checkpointing(base, mode) for mode in modes]
    sizes = {axis: base.config[f"{axis}_size"] for axis in ORDER}
    job = Job(
        portable(model),
        dtype,
        dict(lora) if lora else None,
        base,
        tuple(settings),
        every_layer,
        processes,
        tuple(imports),
    )
    result = Explanation(sizes, {"world_size": base.world, "batch": batch, "sequence": sequence, "dtype": dtype})
    result.about |= {"mixed_precision": mixed_precision, "optimizer": optimizer, "checkpointing": own}
    result.about["sequence_parallel"] = config.sequence_parallel
    result.about |= {"model": model if isinstance(model, str) else type(model).__name__}
    per_node = link.gpus_per_node if link is not None else gpus_per_node or 8
    result.about |= {"interconnect": link and link.name, "gpus_per_node": per_node, "gpu_memory": gpu_memory}
    found = results_of(job)
    placed = next(found)
    progress("plan and placements")
    shard_bytes = placed.pop("shard_bytes")
    result.about |= {name: placed.pop(name) for name in ("layers", "flops_per_token", "experts_used")}
    for name, value in placed.items():
        setattr(result, name, value)
    for mode, figures in zip(modes, found):
        progress(f"activation checkpointing {mode}")
        its = result if mode == own else dataclasses.replace(result, about={**result.about, "checkpointing": mode})
        result.modes[mode] = its
        if mode == own and figures["parameters"] != shard_bytes:
            raise UnsupportedError(
                f"the layers of {result.about['model']} do not repeat as they seem to: few of them say that a rank has "
                f"{figures['parameters']:,} bytes of parameters, and it has {shard_bytes:,}. Use --every-layer."
            )
        _put(its, figures)
        its.seconds = {} if link is None else link.seconds(its.collectives, sizes)
        result.by_checkpointing[mode] = {name: its.memory[name] for name in ("activations", "peak")}
    if others:
        result.notes.append(
            f"activation checkpointing {', '.join(others)}: not measured beside sequence_parallel_regather."
        )
    for its in result.modes.values():
        its.warnings = warnings_for(its, per_node, gpu_memory)
    return result


def _put(found: Explanation, figures: dict[str, Any]) -> None:
    """Move the figures of a measurement into ``found``."""
    found.peaks, found.layer = figures.pop("peaks"), figures.pop("layer")
    found.collectives = [
        dict(zip(("kind", "axis", "count", "tensor_bytes", "sent_bytes"), (*name.split(), *numbers)))
        for name, numbers in figures.pop("collectives").items()
    ]
    found.memory = {**figures, "peak": max(found.peaks.values())}


def without_effect(reason: str, names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if any of ``names``, arguments or options of a step, was given without a step."""
    if names:
        raise ConfigError(
            f"{reason} runs no step, so {', '.join(names)} would have no effect: leave out {reason}, or these."
        )


def _dtype_of(model: Any, dtype: str | None) -> str:
    """Name of the dtype of the parameters: of most elements of a module, else ``dtype`` or "bf16".

    Raises:
        ConfigError: a dtype was given for a module, or it is none.
    """
    if not isinstance(model, nn.Module):
        dtype_of(dtype or "bf16")
        return dtype or "bf16"
    elements: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        elements[parameter.dtype] += parameter.numel()
    own = elements.most_common(1)[0][0] if elements else torch.get_default_dtype()
    if dtype is not None and dtype_of(dtype) != own:
        raise ConfigError(
            f"dtype={dtype!r}: the module's parameters are {own}. Leave dtype out, or convert it (model.to)."
        )
    return name_of(own)


def settings_of(
    config: AutoParallelismConfig,
    world_size: int | None,
    batch: int,
    sequence: int,
    optimizer: str,
    mixed_precision: str,
    clip: bool,
    environment: Mapping[str, str] | None,
) -> Setting:
    """The setting of ``config`` with all sizes of axes inferred.

    Raises:
        ConfigError: a size does not fit ``world_size``, or a value is wrong.
    """
    optimizer_class(optimizer)
    for name, value in (("batch", batch), ("sequence", sequence), ("world_size", world_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: give 1 or more.")
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"mixed_precision={mixed_precision!r}: give no, bf16 or fp16.")
    if config.backend != "fsdp2":
        raise UnsupportedError(f"backend={config.backend!r}: a plan is made with the backend 'fsdp2' only.")
    if str((environment or {}).get("FSDP_OFFLOAD_PARAMS", "false")).lower() == "true":
        raise UnsupportedError("fsdp_offload_params=true: memory is counted for one device only. Leave it out.")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {name: values[name] for name in config.to_dict() if name not in ("compile", "tp_handler", "cp_handler")}
    config = AutoParallelismConfig(**values)
    if world_size is None:
        world_size = math.prod(values.get(f"{axis}_size") or 1 for axis in AXES)
    config.resolve_sizes(world_size)
    if sequence % config.cp_size:  # type: ignore[operator]
        raise ConfigError(f"sequence={sequence} does not divide by cp_size={config.cp_size}.")
    values |= {f"{axis}_size": getattr(config, f"{axis}_size") for axis in AXES}
    return Setting(values, batch, sequence, optimizer, mixed_precision, clip, dict(environment or {}))


def with_checkpointing(setting: Setting, mode: str) -> Setting:
    """``setting`` with another mode of activation checkpointing."""
    environment = {k: v for k, v in setting.environment.items() if k != "FSDP_ACTIVATION_CHECKPOINTING"}
    values = {**setting.config, "activation_checkpointing": mode}
    return dataclasses.replace(setting, config=values, environment=environment)


def portable(model: Any) -> Any:
    """``model`` as another process can read it: a module without memory, anything else as it is."""
    if not isinstance(model, nn.Module):
        return os.path.abspath(model) if isinstance(model, str) and Path(model).exists() else model
    import copy

    # The memo stands for the values, so that none is copied.
    memo = {id(t): _without_memory(t) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _without_memory(tensor: Any) -> Any:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def results_of(job: Job) -> Iterator[Any]:
    """The results of a job, which runs in a process of its own: this one may have an Accelerator or a process group.

    Raises:
        AutoParallelError: the first error, in the class and words of whoever raised it; or that the process ended
            without its results.
    """
    try:
        text = pickle.dumps(job)
    except Exception as error:  # pickle raises what the objects raise
        raise cannot_be_sent(error) from error
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path), os.getcwd()])
    # The tensors have no memory, so more threads would only wait.
    values = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | {
        VERBOSE_VARIABLE: "0"
    }
    values = {name: value for name, value in values.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    read, write = os.pipe()
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.child", str(write)]
    # Files, because a full pipe that nobody reads stops its writer.
    with open(read, "rb") as results, tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(text)
        given.seek(0)
        try:
            child = subprocess.Popen(
                command, stdin=given, stdout=said, stderr=said, env=values, pass_fds=(write,), start_new_session=True
            )
        finally:
            os.close(write)
        with child:
            try:
                for line in results:
                    try:
                        kind, *found = json.loads(line)
                    except ValueError:
                        break  # it ended within a line
                    if kind == "error":
                        raise error_of(*found)
                    yield found[0]
                if child.wait():
                    raise AutoParallelError(
                        f"the simulated step ended with an error: {_reason(child.returncode, said)}"
                    )
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)  # its forked processes, too


def _reason(code: int, said: IO[bytes]) -> str:
    """Why a process ended with ``code`` != 0: the last line that it wrote, or the signal."""
    if code < 0:
        more = "; most likely memory ran out" if code == -signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-code).name}{more}."
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {code}, no message."
