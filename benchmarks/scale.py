"""The scale suite: collectives, bytes and memory of one rank while the number of ranks grows, on simulated ranks.

Counted by ``explain`` on the geometries that the package ships, which have the published sizes. Two depths are run,
and the figures of a layer are their difference; the model's depth times that, and the rest, is what a rank has. The
optimizer is SGD, so that its state is not in the peak.
"""

from __future__ import annotations

import argparse
from typing import Any

from .counting import figures
from .recorder import Recorder

WORLDS = (8, 64, 1024, 16384)
TP = 8
SEQUENCE = 4096

#: geometry -> two depths, the model's depth. DeepSeek-V3's first three layers are dense; the two depths have them all.
GEOMETRIES = {"Llama 3.1 405B": (2, 4, 126), "DeepSeek-V3": (4, 5, 61)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--geometry", choices=GEOMETRIES, help="only this one")


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every geometry on every number of ranks."""
    for geometry in GEOMETRIES:
        if arguments.geometry in (None, geometry):
            _geometry(geometry, WORLDS[:1] if recorder.smoke else WORLDS, recorder)


def _geometry(geometry: str, worlds: tuple[int, ...], recorder: Recorder) -> None:
    from hf_automodel_parallel import AutoParallelError

    few, many, depth = GEOMETRIES[geometry]
    rows, left_out = [], []
    for world in worlds:
        try:
            first, second = (_step(shipped_name(geometry), world, layers) for layers in (few, many))
        except AutoParallelError as error:
            left_out.append({"what": f"{geometry} on {world:,} ranks", "why": str(error)})
            recorder.progress(f"scale: {geometry}, {world:,} ranks: {error}")
            continue
        layer = {key: (second[key] - first[key]) / (many - few) for key in first}
        row: dict[str, Any] = {"world": world, "layer": layer}
        row["model"] = {key: first[key] + (depth - few) * layer[key] for key in layer}
        rows.append(row)
        recorder.progress(f"scale: {geometry}, {world:,} ranks: {row['model']}")
    settings = {"geometry": geometry, "tp": TP, "tokens": SEQUENCE, "depth": depth, "dtype": "bfloat16"}
    recorder.record("step", rows, settings, left_out, case=shipped_name(geometry))


def shipped_name(geometry: str) -> str:
    """The name under which the package ships the geometry."""
    return geometry.lower().replace(" ", "-")


def _step(name: str, world: int, layers: int) -> dict[str, int]:
    """Of one step of rank 0: collectives by kind, bytes sent, bytes of parameters, peak of all memory."""
    from hf_automodel_parallel import explain
    from hf_automodel_parallel.planner.models import model_config

    config = model_config(name)
    config.num_hidden_layers = layers
    options = {"sequence_parallel": True, "activation_checkpointing": "full"}
    sizes = {"tp_size": TP, "dp_shard_size": world // TP}
    found = explain(config, sizes | options, sequence=SEQUENCE, optimizer="sgd", clip=False, every_layer=True)
    counted = figures((row["kind"], row["count"], row["sent_bytes"]) for row in found.collectives)
    return {**counted, "parameters": found.memory["parameters"], "peak": found.memory["peak"]}
