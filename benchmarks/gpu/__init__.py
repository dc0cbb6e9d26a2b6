"""The GPU suite: does the package compute the same on this GPU, and how fast does it fine-tune large models?

One command, without network, within a time budget. Each stage runs in processes of its own; one that fails is recorded
with its message, and the others go on. ``docs/gpu.md`` says how to read the result and where to send it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from ..children import Outcome, environment_of_ranks, run_cases
from ..recorder import Recorder
from . import device as machine
from . import models, validation

#: tokens/s/GPU of NeMo AutoModel's published table for LoRA of Llama 3.1 70B on eight H100 (sequence 4,096, global
#: batch 32).
PUBLISHED_70B = 1092.0

SEQUENCE = 4096
GLOBAL_BATCH = 32

#: Share of a GPU's peak that the plan of a run reckons with, and seconds until a process trains.
_EXPECTED_SHARE, _START = 0.35, 25.0

PEERS = ("stock", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="processes, one on each GPU; 2 or more run the 70B setting (default: 1)")
    add("--minutes", type=float, default=9.0, help="time budget; what would exceed it is skipped (default: 9)")
    add("--match", default="", help="only the cases whose name contains this text")
    add("--peak-tflops", type=float, help="dense bf16 TFLOP/s of one GPU (default: by its name)")
    add("--steps", type=int, help="of the optimizer; from 2 on the first warms up (default: 1 on one GPU, else 2)")
    add("--micro-batch", type=int, default=1, help="sequences of a GPU at a time (default: 1)")
    add("--optimizer", choices=("adamw", "sgd"), help="of full fine-tuning (default: AdamW if it fits, else SGD)")
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations (default: if they would not fit)",
    )


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Validation, then throughput; writes a result file for each.

    Raises:
        SystemExit: there is no GPU, an argument cannot be used, or (with status 1) a validation failed.
    """
    Run(arguments, recorder).everything()


class Run:
    """One run of the suite."""

    def __init__(self, arguments: argparse.Namespace, recorder: Recorder) -> None:
        self.arguments, self.recorder = arguments, recorder
        self.device = arguments.device or "cuda"
        self.gpus = arguments.gpus
        self.steps = arguments.steps or (1 if self.gpus == 1 else 2)
        self.tiny = self.device == "cpu"
        self.hardware = check(arguments, self.device)
        self.peak = arguments.peak_tflops or self.hardware["peak_tflops"]
        self.deadline = time.monotonic() + 60.0 * arguments.minutes
        visible = machine.visible_devices(os.environ, self.gpus)
        self.environment = environment_of_ranks(self.device, visible)
        self.rows: dict[str, list[dict[str, Any]]] = {"validation": [], "throughput": []}

    def everything(self) -> None:
        """All workloads that were asked for, in an order in which the most telling ones come first."""
        wanted = self.arguments.only or list(self.rows)
        try:
            checks = validation.cases(self.gpus, self.device, self.recorder.smoke) if "validation" in wanted else []
            trainings = self.trainings() if "throughput" in wanted else []
            checks, trainings = ([c for c in some if self.arguments.match in c["name"]] for some in (checks, trainings))
            compiled = [case for case in checks if case.get("options", {}).get("compile")]
            if self.recorder.smoke:  # in the same processes
                compiled = []
            self.validate([case for case in checks if case not in compiled])
            first = 2 * len(self.peers)
            trainings = self.train(trainings[:first]) + trainings[first:]
            self.validate(compiled)
            while trainings:
                trainings = self.train(trainings)
        finally:
            for workload in wanted:
                self.write(workload)
        self.summary()

    # ---- validation ------------------------------------------------------------------------------------------------

    def validate(self, cases: list[dict[str, Any]]) -> None:
        """Run cases one after the other in the same processes, as long as none fails."""

        def told(name: str, outcome: Outcome) -> None:
            self.note("validation", {"case": name}, outcome)

        run_cases(
            "benchmarks.gpu.validation:run_case",
            cases,
            world=self.gpus,
            environment=self.environment,
            limit=300.0 if self.tiny else 120.0,  # a shared CPU may be slow
            deadline=self.deadline,
            settings={"device": self.device},
            told=told,
        )

    # ---- throughput ------------------------------------------------------------------------------------------------

    @property
    def peers(self) -> list[str]:
        """Those of ``--peers``."""
        return [peer for peer in PEERS if peer in (self.arguments.peers or PEERS)]

    def trainings(self) -> list[dict[str, Any]]:
        """Each training of the plan: both peers in turn, then compiled ones."""
        if self.gpus > 1:
            return self.large_trainings()
        found: list[dict[str, Any]] = []
        settings = [("llama-3.1-8b", "lora"), ("qwen2.5-7b", "lora"), ("llama-3.1-8b", "full"), ("qwen2.5-7b", "full")]
        if self.recorder.smoke:
            settings = settings[:1]
        for model, method in settings:
            found += [self.training(model, method, peer) for peer in self.peers]
        if not self.recorder.smoke:
            for peer in self.peers[::-1]:
                found.append(self.training("llama-3.1-8b", "lora", peer, compile=not self.tiny, name="compiled"))
        return found

    def large_trainings(self) -> list[dict[str, Any]]:
        """LoRA of 70B on tp 2 x FSDP2, with and without overlapped collectives."""
        common = {"tp_size": 2, "sequence_parallel": True}
        options: dict[str, Any] = {"checkpointing": True, "data_ranks": self.gpus // 2, "streamed": True}
        overlapped = {**common, "async_tensor_parallel": True}
        found = []
        if "ours" in self.peers and self.gpus % 2 == 0:
            for name, config, compiled in (("async tp", overlapped, True), ("no async tp", common, not self.tiny)):
                training = self.training("llama-3.1-70b", "lora", "ours", compile=compiled, name=name, **options)
                found.append({**training, "config": config, "may_be_refused": True})
        return found

    def training(self, model: str, method: str, peer: str, name: str = "", **changes: Any) -> dict[str, Any]:
        """What :func:`benchmarks.gpu.training.run_case` gets."""
        arguments = self.arguments
        values = models.geometry(model, self.tiny)[1]
        sequence, batch = (32, 4) if self.tiny else (SEQUENCE, GLOBAL_BATCH)
        optimizer, checkpointing = models.training_that_fits(
            values, method, arguments.micro_batch, sequence, self.hardware["memory"]
        )
        ranks = changes.get("data_ranks", 1)
        accumulation = max(3, batch // (arguments.micro_batch * ranks))
        case: dict[str, Any] = {
            "name": ", ".join(part for part in (model, method, peer, name) if part),
            "model": model,
            "tiny": self.tiny,
            "method": method,
            "peer": peer,
            "config": {},
            "optimizer": arguments.optimizer or optimizer,
            "checkpointing": checkpointing if arguments.checkpointing is None else arguments.checkpointing,
            "compile": False,
            "micro_batch": arguments.micro_batch,
            "accumulation": accumulation,
            "sequence": sequence,
            "steps": self.steps,
            "warm_up": max(1, min(4, accumulation // 4)),
            "data_ranks": ranks,
            "streamed": False,
            "peak_tflops": self.peak,
        }
        case |= changes
        tokens = case["micro_batch"] * accumulation * ranks * sequence * self.steps
        flops = tokens * models.estimated_flops_per_token(values, method, sequence) / self.gpus
        seconds = flops * (4 / 3 if case["checkpointing"] else 1) / (_EXPECTED_SHARE * 1e12 * (self.peak or 300.0))
        start = 10.0 if self.tiny else _START + 60.0 * case["compile"] + 60.0 * case["streamed"]
        return {**case, "expected_seconds": round(start + seconds, 1)}

    def train(self, trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each training in its own processes. Returns those to be repeated with checkpointing, for want of memory."""
        again: list[dict[str, Any]] = []
        for case in trainings:
            left = self.deadline - time.monotonic()
            if case["expected_seconds"] > left:
                why = f"it takes about {case['expected_seconds']:.0f} s, {max(left, 0):.0f} s of the time are left"
                self.note("throughput", case, Outcome("skipped", message=why))
                continue
            outcomes = run_cases(
                "benchmarks.gpu.training:run_case",
                [case],
                world=self.gpus if case["peer"] == "ours" else None,
                environment=self.environment,
                limit=max(300.0 if self.tiny else 120.0, 5 * case["expected_seconds"]),
                deadline=self.deadline,
                settings={"device": self.device},
                told=lambda name, outcome, case=case: self.note("throughput", case, outcome),
            )
            message = outcomes[case["name"]].message
            given = self.arguments.checkpointing is not None
            if machine.is_out_of_memory(message) and not case["checkpointing"] and not given:
                for peer in self.peers:
                    name = case["name"].replace(f", {case['peer']}", f", {peer}") + ", checkpointing"
                    if all(other["name"] != name for other in again):
                        again.append({**case, "peer": peer, "name": name, "checkpointing": True})
        return again

    # ---- results ---------------------------------------------------------------------------------------------------

    def note(self, workload: str, case: dict[str, Any], outcome: Outcome) -> None:
        """Keep one outcome, and tell it."""
        status = outcome.status
        if "not_run" in outcome.values:
            status, outcome = "skipped", Outcome("skipped", message=outcome.values["not_run"])
        name = case.get("case") or case["name"]
        self.rows[workload] = [row for row in self.rows[workload] if row.get("case") != name]
        row = {"case": name, "status": status, "seconds": outcome.seconds, **outcome.values}
        row |= {"message": outcome.message} if outcome.message else {}
        row |= {key: value for key, value in case.items() if key in _SHOWN}
        self.rows[workload].append(row)
        figures = f", {row['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU" if "tokens_per_s_per_gpu" in row else ""
        message = f": {outcome.message[:300]}" if outcome.message else ""
        self.recorder.progress(f"{workload}: {name}: {status}{figures}{message}")

    def write(self, workload: str) -> None:
        """The result file of a workload."""
        rows = [row for row in self.rows[workload] if row["status"] != "skipped"]
        left_out = [row for row in self.rows[workload] if row["status"] == "skipped"]
        name = workload + (f"-{self.gpus}gpus" if self.gpus > 1 else "") + ("-without-gpu" if self.tiny else "")
        self.recorder.record(
            name,
            rows,
            {
                "device": self.hardware,
                "gpus": self.gpus,
                "minutes": self.arguments.minutes,
                "peak_tflops": self.peak,
                "sequence": SEQUENCE,
                "global_batch": GLOBAL_BATCH,
                "lora_rank": models.LORA_RANK,
                "dtype": "bfloat16",
                "published_tokens_per_s_per_gpu_70b": PUBLISHED_70B,
                "flops": "forward and backward without recomputation; causal attention at half of the square",
            }
            | ({"bounds": validation.__doc__} if workload == "validation" else {}),
            [{"what": row["case"], "why": row["message"]} for row in left_out],
            **machine.versions(),
        )

    def summary(self) -> None:
        """What happened, on stdout.

        Raises:
            SystemExit: with status 1 if a validation failed.
        """
        for workload, rows in self.rows.items():
            if rows:
                count = {s: sum(row["status"] == s for row in rows) for s in ("passed", "failed", "refused", "skipped")}
                print(f"{workload}: " + ", ".join(f"{number} {status}" for status, number in count.items() if number))
        for line in lines_of(self.rows["throughput"]):
            print(line)
        if self.tiny:
            print("These are tiny models on a CPU: they show that the suite runs, and nothing about speed.")
        failed = [row["case"] for row in self.rows["validation"] if row["status"] == "failed"]
        for name in failed:
            print(f"FAILED: {name}")
        sys.stdout.flush()
        if failed:
            raise SystemExit(1)


#: What of a training's case stands in its row.
_SHOWN = ("model", "method", "peer", "config", "optimizer", "checkpointing", "compile", "micro_batch", "accumulation")
_SHOWN += ("sequence", "steps", "data_ranks")


def check(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """The device, as JSON.

    Raises:
        SystemExit: it is not there, or an argument cannot be used.
    """
    known = {"only": ("validation", "throughput"), "peers": PEERS}
    for option, names in known.items():
        unknown = sorted(set(getattr(arguments, option) or ()) - set(names))
        if unknown:
            raise SystemExit(f"--{option} {','.join(unknown)}: --suite gpu has {', '.join(names)}")
    if min(arguments.gpus, arguments.micro_batch, 1 if arguments.steps is None else arguments.steps) < 1:
        raise SystemExit("--gpus, --steps and --micro-batch are at least 1")
    found = machine.described_elsewhere(device)
    if not found["count"]:
        raise SystemExit("--suite gpu: torch sees no CUDA device. Try it with --device cpu, on a tiny model.")
    if device == "cuda" and arguments.gpus > found["count"]:
        raise SystemExit(f"--gpus {arguments.gpus}: torch sees {found['count']}")
    return found


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the trainings that passed, with each speed as a ratio to the stock Trainer's."""
    done = [row for row in rows if row["status"] == "passed"]
    found = []
    for row in done:
        mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu']:.1f}%"
        memory = next((f", {value} GiB" for key, value in row.items() if key.startswith("peak_")), "")
        stock = next((r for r in done if r["peer"] == "stock" and same_training(r, row) and r is not row), None)
        ratio = f", {row['tokens_per_s_per_gpu'] / stock['tokens_per_s_per_gpu']:.3f} of stock" if stock else ""
        speed = f"{row['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU, {row['tflops_per_gpu']:.3g} TFLOP/s"
        found.append(f"{row['case']}: {speed}{mfu}{memory}{ratio}")
    return found


def same_training(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True if two rows differ in the peer alone."""
    return all(one[key] == other[key] for key in _SHOWN if key not in ("peer", "config"))
