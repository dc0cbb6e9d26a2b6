"""Result files: what was measured, with which versions, on what, when, of which commit, by which command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

#: Keys of every result file.
KEYS = ("suite", "workload", "date", "commit", "command", "versions", "hardware", "settings", "rows", "not_measured")

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "megatron-fsdp", "nemo-automodel")


class Recorder:
    """Writes JSON files, one per workload or case, into a directory, and tells on stderr what is going on.

    Attributes:
        directory: of the files.
        suite: name of the suite.
        smoke: the suite is to be as small as possible: it is run to see that it runs.
    """

    def __init__(self, directory: Path, suite: str, command: str, smoke: bool = False) -> None:
        self.directory = directory
        self.suite = suite
        self.smoke = smoke
        self._command = command
        self._begin = time.monotonic()

    def progress(self, text: str) -> None:
        """One line on stderr."""
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    def record(
        self,
        workload: str,
        rows: list[dict[str, Any]],
        settings: dict[str, Any] | None = None,
        not_measured: list[dict[str, str]] | None = None,
        case: str = "",
        **versions: str,
    ) -> Path:
        """Write ``<suite>-<workload>[-<case>].json``, in place of an earlier one.

        Args:
            workload: name, as in ``--only``.
            rows: the figures, one dict per measured case.
            settings: what they have in common: sizes, rounds, dtype.
            not_measured: ``{"what": ..., "why": ...}`` of each case without figures.
            case: for a workload that writes a file for each of its cases, as they are measured.
            versions: of further packages.
        """
        if self.smoke and not all("ours" in row.get("peers", ["ours"]) for row in rows or [{"peers": []}]):
            raise SystemExit(f"{workload}: ours was not measured: {not_measured}")
        content = {
            "suite": self.suite,
            "workload": workload,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "command": self._command,
            "versions": package_versions() | versions,
            "hardware": hardware(),
            "settings": settings or {},
            "rows": rows,
            "not_measured": not_measured or [],
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{'-'.join(filter(None, (self.suite, workload, case)))}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        self.progress(f"written: {path}")
        return path


def read_results(directory: Path) -> dict[str, dict[str, Any]]:
    """Name without suffix -> content of each result file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def package_versions() -> dict[str, str]:
    """Python's and those of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30), "gpus": gpus}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The last one that changed the package; ``+changes`` if its files differ from that."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", "hf_automodel_parallel"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    name = git("log", "-1", "--format=%h", "--abbrev=12") or "unknown"
    return f"{name}+changes" if git("status", "--porcelain") else name
