"""``hf-automodel-parallel env``: versions, devices and settings, for bug reports."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import typer

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "torchao",
    "megatron-fsdp",
)
_VARIABLES = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "HF_AUTO", "NCCL_", "GLOO_", "OMP_NUM", "CUDA_VISIBLE")


def env() -> None:
    """Print versions, devices and settings, as a list for a bug report."""
    for name, value in _facts():
        typer.echo(f"- {name}: {value}")


def _facts() -> Iterator[tuple[str, str]]:
    import torch

    from ..version import __version__

    yield "hf-automodel-parallel", f"{__version__} ({Path(__file__).resolve().parents[1]})"
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", f"{platform.platform()}, {os.cpu_count()} CPU cores"
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "CUDA of torch", str(torch.version.cuda)
    if torch.cuda.is_available():
        yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        yield "GPU", "none"
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            yield name, os.environ[name]
