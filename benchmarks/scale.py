"""The scale suite: collectives, bytes and memory of one rank while the number of ranks grows, on simulated ranks.

The process group's collectives do nothing and the tensors have no memory, so the geometries are the published ones. Two
depths are run, and the figures of a layer are their difference; the model's depth times that, and the rest, is what a
rank has.
"""

from __future__ import annotations

import argparse
from typing import Any

from .fake_world import GEOMETRIES, in_process
from .recorder import Recorder

WORLDS = (8, 64, 1024, 16384)
TP = 8
SEQUENCE = 4096

#: geometry -> two depths, the model's depth. DeepSeek-V3's first three layers are dense; the two depths have them all.
DEPTHS = {"Llama 3.1 405B": (2, 4, 126), "DeepSeek-V3": (4, 5, 61)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--geometry", choices=GEOMETRIES, help="only this one")


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every geometry on every number of ranks."""
    for geometry in GEOMETRIES:
        if arguments.geometry in (None, geometry):
            _geometry(geometry, WORLDS[:1] if recorder.smoke else WORLDS, recorder)


def _geometry(geometry: str, worlds: tuple[int, ...], recorder: Recorder) -> None:
    few, many, depth = DEPTHS[geometry]
    given = {"geometry": geometry, "worlds": worlds, "tp": TP, "depths": (few, many), "sequence": SEQUENCE}
    found = in_process("benchmarks.scale:measure", **given)
    rows, left_out = [], []
    for world, figures in zip(worlds, found):
        if isinstance(figures, str):
            left_out.append({"what": f"{geometry} on {world:,} ranks", "why": figures})
            recorder.progress(f"scale: {geometry}, {world:,} ranks: {figures}")
            continue
        first, second = figures
        layer = {key: (second[key] - first[key]) / (many - few) for key in first}
        row: dict[str, Any] = {"world": world, "layer": layer}
        row["model"] = {key: first[key] + (depth - few) * layer[key] for key in layer}
        rows.append(row)
        recorder.progress(f"scale: {geometry}, {world:,} ranks: {row['model']}")
    name = geometry.lower().replace(" ", "-")
    settings = {"geometry": geometry, "tp": TP, "tokens": SEQUENCE, "depth": depth, "dtype": "bfloat16"}
    recorder.record("step", rows, settings, left_out, case=name)


def measure(geometry: str, worlds: list[int], tp: int, depths: list[int], sequence: int) -> list[Any]:
    """For each number of ranks the figures of both depths, or why there are none; in a process of its own."""
    import torch.distributed as dist

    found: list[Any] = []
    for world in worlds:
        try:
            figures = []
            for layers in depths:
                figures.append(_step(geometry, world, tp, layers, sequence))
                dist.destroy_process_group()
            found.append(figures)
        except Exception as error:  # of another library's code
            found.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            dist.destroy_process_group()
    return found


def _step(geometry: str, world: int, tp: int, layers: int, sequence: int) -> dict[str, float]:
    """Of one step of rank 0: collectives by kind, bytes sent, bytes of parameters, peak of all memory."""
    import warnings

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from .counting import Collectives
    from .fake_world import prepared

    class Tracker(MemTracker):
        """For parameters that are no leaves in forward: it cannot set its hooks on them."""

        def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> tuple[int, int]:
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    warnings.simplefilter("ignore")
    options = {"sequence_parallel": True, "activation_checkpointing": "full"}
    model, _ = prepared(geometry, world, tp, layers, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ids = torch.zeros(1, sequence, dtype=torch.long)
        tracker = Tracker()
        tracker.track_external(model)
        with tracker, Collectives() as seen:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        peak = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
    shards = sum(p.to_local().numel() * p.element_size() for p in model.parameters())  # type: ignore[operator]
    return {**seen.figures(), "parameters": shards, "peak": peak}
