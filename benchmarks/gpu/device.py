"""What differs between a GPU and the CPU: names, memory, synchronisation. Code for CUDA alone stands here."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..recorder import ROOT

#: Part of a GPU's name -> dense bf16 TFLOP/s of its data sheet. The longest part that occurs counts.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "A10": 125.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "H20": 148.0,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 6000 Ada": 364.0,
}


_DESCRIBE = "import json; from benchmarks.gpu import device; print(json.dumps(device.describe('cuda')))"


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of the GPU called ``name``; None if it is not in the table."""
    found = [part for part in PEAK_TFLOPS if part.lower() in name.lower()]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def describe(device: str) -> dict[str, Any]:
    """Name, bytes of memory and peak of the first device, and how many there are, as JSON."""
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"name": "cpu", "memory": memory, "peak_tflops": None, "count": os.cpu_count()}
    if not torch.cuda.is_available():
        return {"name": "", "memory": 0, "peak_tflops": None, "count": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "peak_tflops": peak_tflops(properties.name),
        "count": torch.cuda.device_count(),
    }


def described_elsewhere(device: str) -> dict[str, Any]:
    """:func:`describe` in a process of its own: this one takes no memory of a GPU, nor the GPU itself where it serves
    one process at a time.
    """
    if device == "cpu":
        return describe(device)
    command = [sys.executable, "-c", _DESCRIBE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"torch cannot describe the GPU: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def visible_devices(environment: Mapping[str, str], count: int) -> str:
    """``CUDA_VISIBLE_DEVICES`` for ``count`` processes: the first ones of those that are visible now.

    The Trainer would otherwise wrap a model in DataParallel wherever it sees a second GPU.
    """
    given = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(given[:count] or [str(index) for index in range(count)])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin to look for the highest memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB of this process: on a GPU since :func:`reset_peak` (tensors, and what the allocator holds), else of its
    whole life.
    """
    if device.type == "cuda":
        return {
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2),
        }
    return {"peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


def empty_cache(device: torch.device) -> None:
    """Give back what the allocator holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def this_device(device: str) -> torch.device:
    """The device of this process, and make it the current one."""
    if device == "cpu":
        return torch.device("cpu")
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(found)
    return found


def quiet_trainer(device: torch.device) -> dict[str, Any]:
    """Arguments of a Trainer that trains at one rate, logs each step, and writes and prints nothing."""
    return {
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
    }


def is_out_of_memory(message: str) -> bool:
    """True if an error's text is the allocator's."""
    return "out of memory" in message.lower()


def versions() -> dict[str, str]:
    """Of what only a GPU has, and of the packages that only some cases need."""
    found = {"cuda": str(torch.version.cuda)}
    for package in ("bitsandbytes", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
