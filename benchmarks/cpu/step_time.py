"""Seconds of one step, forward and backward with complete gradients, of every peer in one process group."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from typing import Any

from ..peers import PEERS, Case, NotPossible, build_peer, chosen
from ..ranks import RanksFailed, on_ranks
from ..recorder import Recorder
from ..timing import compared, in_turn, over_ranks

#: Overhead-bound, compute-bound.
SIZES = ({"hidden": 128, "tokens": 64}, {"hidden": 512, "tokens": 1024})
MESHES = ({"tp": 2, "dp": 1}, {"tp": 2, "dp": 1, "sequence_parallel": True}, {"tp": 1, "dp": 2}, {"tp": 2, "dp": 2})

#: Losses of three steps may differ by this much, relatively.
TOLERANCE = 1e-4


def cases(smoke: bool) -> list[Case]:
    """All of them: meshes x sizes x full, LoRA x eager, compiled, and the whole step."""
    if smoke:
        return [Case(hidden=64, tokens=16, layers=2, lora=True)]
    found = []
    for mesh, whole in [*((mesh, False) for mesh in MESHES), (MESHES[0], True), (MESHES[3], True)]:
        for size, lora, compiled in itertools.product(SIZES, (False, True), (False, True)):
            found.append(Case(**mesh, **size, lora=lora, compiled=compiled, whole=whole))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of the cases."""
    parser.add_argument("--mesh", help="of step_time: cases of this mesh, as in 'TP2', 'FSDP2', 'TP2 + SP'")
    parser.add_argument("--size", type=int, choices=[size["hidden"] for size in SIZES], help="of step_time: this width")
    parser.add_argument("--tuning", choices=("full", "lora"), help="of step_time: only this")
    parser.add_argument("--mode", choices=("eager", "compiled"), help="of step_time: only this")
    parser.add_argument("--scope", choices=("layers", "whole"), help="of step_time: layers only, or the whole step")


def wanted(case: Case, arguments: argparse.Namespace) -> bool:
    """Do the options leave the case in?"""
    return (
        arguments.mesh in (None, case.mesh_name)
        and arguments.size in (None, case.hidden)
        and arguments.tuning in (None, "lora" if case.lora else "full")
        and arguments.mode in (None, "compiled" if case.compiled else "eager")
        and arguments.scope in (None, "whole" if case.whole else "layers")
    )


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every case in a process group of its own."""
    names = chosen(arguments.peers)
    rounds = arguments.rounds or (3 if recorder.smoke else 21)
    for case in cases(recorder.smoke):
        if wanted(case, arguments):
            _record(case, names, rounds, recorder)


def _record(case: Case, names: list[str], rounds: int, recorder: Recorder) -> None:
    label = f"{case.mesh_name}, {', '.join(_words(case))}"
    recorder.progress(f"step_time: {label}")
    arguments = {"case": asdict(case), "names": names, "rounds": rounds}
    rows, left_out = [], []
    try:
        ranks = on_ranks(case.world, "benchmarks.cpu.step_time:measure", arguments)
    except RanksFailed as error:
        recorder.progress(error.output)
        left_out.append({"what": label, "why": str(error)})
    else:
        peers = compared(over_ranks([rank["times"] for rank in ranks]))
        for name, figures in peers.items():
            recorder.progress(f"  {name:16} {_line(figures)}")
        left_out += [{"what": f"{PEERS[name]} on {label}", "why": why} for name, why in ranks[0]["left_out"].items()]
        rows.append({**case.as_row(), "losses": ranks[0]["losses"], "peers": peers})
    settings = {"rounds": rounds, "dtype": "float32", "tolerance": TOLERANCE}
    recorder.record("step_time", rows, settings, left_out, case=case.slug)


def _words(case: Case) -> list[str]:
    scope = ["whole step"] if case.whole else []
    tuning, mode = "LoRA" if case.lora else "full", "compiled" if case.compiled else "eager"
    return [f"hidden {case.hidden}, {case.tokens} tokens", tuning, mode, *scope]


def _line(figures: dict[str, Any]) -> str:
    text = f"wall {1e3 * figures['wall_s'][1]:8.2f} ms, CPU {1e3 * figures['cpu_s'][1]:8.2f} ms"
    if "ours_over_it_wall" in figures:
        text += f"; ours / it {figures['ours_over_it_wall'][1]:.2f} wall, {figures['ours_over_it_cpu'][1]:.2f} CPU"
    return text


def measure(case: dict[str, Any], names: list[str], rounds: int) -> dict[str, Any]:
    """One rank: build the peers, compare their losses, time those whose losses are the first peer's."""
    from ..peers.case import batch

    what = Case(**case)
    data = batch(what)
    peers, losses, left_out = {}, {}, {}
    for name in names:
        try:
            peer = build_peer(name, what)
            peer.activate()
            losses[name] = _losses(peer, data)
        except NotPossible as error:
            left_out[name] = str(error)
            continue
        except Exception as error:  # of another library's code
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        expected = next(iter(losses.values()))
        if any(abs(found - value) > TOLERANCE * abs(value) for found, value in zip(losses[name], expected)):
            left_out[name] = f"other losses: {losses[name]}, not {expected}"
            continue
        peers[name] = peer
    steps = {name: _Step(peer, data) for name, peer in peers.items()}
    return {"times": in_turn(steps, rounds), "losses": losses, "left_out": left_out}


def _losses(peer: Any, data: Any) -> list[float]:
    """Of three steps with an optimizer, the mean over all ranks."""
    import torch.distributed as dist

    values = []
    for _ in range(3):
        loss = peer.train(data).detach().clone()
        dist.all_reduce(loss)
        values.append(round(loss.item() / dist.get_world_size(), 6))
    return values


class _Step:
    """A peer's step for :func:`benchmarks.timing.in_turn`."""

    def __init__(self, peer: Any, data: Any) -> None:
        self.prepare = peer.activate
        self._peer, self._data = peer, data

    def __call__(self) -> None:
        self._peer.step(self._data)
