"""Meshes with what training on them costs, by arithmetic from one measured run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..plan.validate import config_with_heads, counted_heads
from .explanation import Explanation
from .interconnect import Interconnect
from .models import dtype_of

#: Share of the published FLOP/s that matrix products of a training reach.
_REACHED = 0.4
#: Share of the published bandwidths that collectives reach.
_REACHED_LINK = 0.75
#: Share of FSDP2's collectives that nothing hides: the first all-gather, the last reduce-scatter, ranks that wait.
_EXPOSED = 0.2
#: The estimate of seconds is not better than this: within it the simpler mesh is preferred, then the lighter one.
ALIKE = 1.1
#: Tokens of a row from which cp is worth what it asks of the data.
_LONG = 32768
#: Floating-point operations of the recomputation, as a share of those of a forward.
RECOMPUTED = {"none": 0.0, "selective": 0.5, "submodule": 1.0, "full": 1.0}
#: Collectives of a layer on tp in units of one all-gather of its activations: two all-reduces forward and two backward,
#: and what a recomputation adds.
_TP_PASSES = {"none": 8, "selective": 8, "submodule": 11, "full": 11}


@dataclass
class Candidate:
    """A mesh with what goes with it. Bytes are of one rank and of one optimizer step.

    Attributes:
        sizes: mesh axis -> ranks.
        checkpointing: mode of activation checkpointing.
        sequence_parallel: activations between blocks are sharded over tp.
        batch: rows of a data-parallel rank in a micro-batch.
        accumulation: micro-batches of an optimizer step.
        memory: the peak.
        within_node, between_nodes: bytes sent.
        seconds: estimate of a step, for the order only.
        measured: memory and bytes were counted on simulated ranks; else they are arithmetic.
        reason: why it is not the first choice; empty for the first one.
        computing: the seconds of the estimate in which a GPU computes.
    """

    sizes: dict[str, int]
    checkpointing: str
    sequence_parallel: bool
    batch: int
    accumulation: int
    memory: int = 0
    within_node: int = 0
    between_nodes: int = 0
    seconds: float = 0.0
    measured: bool = False
    reason: str = ""
    computing: float = 0.0

    @property
    def mesh(self) -> str:
        """Such as "dp_shard=8,tp=8"."""
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "dp_shard=1"

    @property
    def options(self) -> dict[str, Any]:
        """Fields of ``AutoParallelismConfig`` besides the sizes."""
        found: dict[str, Any] = {"sequence_parallel": True} if self.sequence_parallel else {}
        return found if self.checkpointing == "none" else {**found, "activation_checkpointing": self.checkpointing}

    @property
    def flag(self) -> str:
        """The value of ``--auto_parallel``."""
        options = ("sequence_parallel" if value is True else f"{name}={value}" for name, value in self.options.items())
        return ",".join([self.mesh, *options])

    @property
    def order(self) -> tuple[float, int, int]:
        """Sorts the best of a mesh first: seconds to two digits, then bytes between nodes, then memory."""
        return float(f"{self.seconds:.2g}"), self.between_nodes, self.memory

    @property
    def divided(self) -> int:
        """Ranks that share a row: each of its layers waits for their collectives."""
        return self.sizes.get("tp", 1) * self.sizes.get("cp", 1)

    def place(self, quickest: float) -> tuple[float, ...]:
        """Sorts meshes, the best first, of which the quickest takes ``quickest`` seconds.

        Those about as quick as it come first, and of these the ones with least tp and cp; then seconds in steps of a
        twentieth, memory in GiB, and bytes between nodes.
        """
        alike = self.seconds <= quickest * ALIKE
        step = int(math.log(self.seconds / quickest, 1.05) + 1e-9) if quickest > 0 else 0
        return (not alike, self.divided if alike else 0, step, self.memory >> 30, self.between_nodes, self.seconds)


class Arithmetic:
    """Memory and bytes of any mesh, scaled from one run of FSDP2 over all GPUs with one row.

    Args:
        base: that run, in the mode "full", with all modes of activation checkpointing.
        config: of transformers, for the heads and the width.
        link: the nodes and the bandwidths.
        gpus: number of GPUs.
        rows: of an optimizer step, of all ranks.
        batch: rows of a micro-batch, or None.
    """

    def __init__(
        self, base: Explanation, config: Any, link: Interconnect, gpus: int, rows: int, batch: int | None
    ) -> None:
        self.base, self.config, self.link, self.gpus, self.rows, self.batch = base, config, link, gpus, rows, batch
        measured_on = base.about["world_size"]
        memory = base.memory
        self._states = sum(memory[name] for name in ("parameters", "gradients", "optimizer"))
        # FSDP2 shards a tensor by its first dimension. Experts have few rows there, so that rank 0 may hold more than
        # its part of the model, and what is gathered is padded to that.
        element = dtype_of(base.about["dtype"]).itemsize
        mixed = base.about["mixed_precision"] != "no"
        whole = base.trainable * (4 if mixed else element) + (base.parameters - base.trainable) * element
        self._uneven = max(1.0, memory["parameters"] * measured_on / whole)
        self.even_shards = measured_on / self._uneven
        self._all_states = self._states * measured_on / self._uneven
        tensors = {row["kind"]: row["tensor_bytes"] for row in base.collectives if row["axis"].startswith("dp_shard")}
        # One rank alone gathers nothing; its parameters and gradients say what the others would.
        self._gathers = tensors.get("all_gather", 2 * memory["parameters"] * measured_on) / self._uneven
        self._reduces = tensors.get("reduce_scatter", memory["gradients"] * measured_on) / self._uneven
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._width = int(getattr(text, "hidden_size", 0) or 0)
        model: Any = SimpleNamespace(config=config)  # its config is all that is read
        self._heads = counted_heads(config_with_heads(model) or text)
        element = 2 if mixed else element
        # Of a row: the activations of a layer between blocks.
        self._between_blocks = base.about["sequence"] * self._width * element

    def with_gpus(self, gpus: int) -> Arithmetic:
        """The same for another number of GPUs, and as many rows for each."""
        return Arithmetic(self.base, self.config, self.link, gpus, self.rows * gpus // self.gpus, self.batch)

    def impossible(self) -> Iterator[tuple[str, str]]:
        """Sizes of tp that divide the GPUs and are out, each with the reason."""
        for tp in _divisors(self.gpus)[1:]:
            why = self._why_not(tp)
            if why and (tp <= 2 * self.link.gpus_per_node):
                yield f"tp={tp}", why

    def _why_not(self, tp: int) -> str:
        node = self.link.gpus_per_node
        if tp > node or min(node, self.gpus) % tp:
            return f"its groups span nodes of {node} GPUs: each layer waits for the network"
        heads = self._heads.get("num_attention_heads")
        if heads is None:
            return "" if tp == 1 else "the config does not say how many attention heads there are"
        if heads % tp:
            return f"does not divide {heads} attention heads"
        shared = self._heads.get("num_key_value_heads", heads)
        if shared % tp and tp % shared:
            return f"neither divides {shared} key/value heads nor is a multiple of them"
        return ""

    def candidates(self, sequence_parallel: bool) -> list[Candidate]:
        """All candidates, with memory, bytes and seconds.

        cp wants causal attention without packing, so it is considered only for long rows: where they are fewer than the
        data-parallel ranks without it, or their activations large.
        """
        return [
            self._estimated(Candidate(sizes, mode, sequence_parallel and sizes["tp"] > 1, batch, accumulation))
            for sizes in self._meshes()
            for mode in self.base.by_checkpointing
            for batch, accumulation in self._batches(sizes)
        ]

    def _meshes(self) -> Iterator[dict[str, int]]:
        node = min(self.link.gpus_per_node, self.gpus)
        for tp in _divisors(self.gpus):
            if self._why_not(tp):
                continue
            for cp in _divisors(node // tp):
                if self.base.about["sequence"] % (2 * cp) or (cp > 1 and not self._wants_cp(tp)):
                    continue
                for replicas in _divisors(self.gpus // (tp * cp)):
                    shard = self.gpus // (tp * cp * replicas)
                    # Replicas that share a node would only hold the same shards twice on it.
                    if replicas == 1 or shard * tp * cp >= node or shard == 1:
                        yield {"dp_replicate": replicas, "dp_shard": shard, "cp": cp, "tp": tp}

    def _wants_cp(self, tp: int) -> bool:
        few_rows = self.rows < self.gpus // tp
        activations = min(its["activations"] for its in self.base.by_checkpointing.values())
        return self.base.about["sequence"] >= _LONG and (few_rows or activations > 16 << 30)

    def _batches(self, sizes: Mapping[str, int]) -> Iterator[tuple[int, int]]:
        each, rest = divmod(self.rows, sizes["dp_replicate"] * sizes["dp_shard"])
        for batch in _divisors(each) if each and not rest else ():
            if self.batch is None or batch == self.batch:
                yield batch, each // batch

    def _estimated(self, found: Candidate) -> Candidate:
        found.memory = self._memory(found)
        return self._sending(found, self._rows_of(found))

    def counted(self, found: Candidate, measured: Explanation) -> Candidate:
        """``found`` with the memory and the bytes of a run."""
        result = dataclasses.replace(found, memory=measured.memory["peak"], measured=True)
        return self._sending(result, measured.collectives)

    def _memory(self, found: Candidate) -> int:
        """States over all shards; weights of unsharded units over tp; activations over tp and cp, times the rows."""
        tp, cp, shard = (found.sizes[axis] for axis in ("tp", "cp", "dp_shard"))
        modes = self.base.by_checkpointing
        kept = modes[found.checkpointing]["activations"]
        # While a layer is recomputed it has what it would have kept; the head has its logits some times.
        layers = max(self.base.about["layers"], 1)
        whole = max((its["activations"] for its in modes.values()), default=kept)
        logits = self.base.memory["logits"]
        kept += max(0 if found.checkpointing == "none" else whole // layers, 2 * logits)
        units = max(modes[found.checkpointing]["peak"] - self._states - kept, self.base.memory["gathered"])
        split = kept / tp
        if tp > 1 and not found.sequence_parallel:
            # Inputs of blocks, norms and residuals stay whole.
            split = kept * (1.0 if found.checkpointing in ("full", "submodule") else 1 / 3 + 2 / 3 / tp)
        padding = self._padding(cp * shard)
        states = self._all_states * padding / (tp * cp * shard)
        return int(states + units / self._uneven * padding / tp + split * found.batch / cp)

    def _padding(self, shards: int) -> float:
        return max(1.0, shards / self.even_shards)

    def _rows_of(self, found: Candidate) -> list[dict[str, Any]]:
        """The collectives of a micro-batch, by arithmetic."""
        tp, cp, shard, replicas = (found.sizes[axis] for axis in ("tp", "cp", "dp_shard", "dp_replicate"))
        shards = shard * cp
        padding = self._padding(shards)
        axis = "dp_shard_cp" if cp > 1 else "dp_shard"
        layers = self.base.about["layers"]
        rows = [
            (axis, (self._gathers + self._reduces) * padding / tp * (shards - 1) / shards),
            ("dp_replicate", 2 * self._reduces * padding / (tp * shards) * (replicas - 1) / replicas),
        ]
        blocks = self._between_blocks * found.batch / cp * layers
        rows.append(("tp", _TP_PASSES[found.checkpointing] * blocks * (tp - 1) / tp))
        heads = self._heads.get("num_attention_heads", 1)
        share = self._heads.get("num_key_value_heads", heads) / heads  # of the width: keys, and as many values
        rows.append(("cp", (3 if RECOMPUTED[found.checkpointing] == 1 else 2) * 2 * share * blocks * (cp - 1) / tp))
        return [{"axis": name, "sent_bytes": int(size)} for name, size in rows if size]

    def _sending(self, found: Candidate, collectives: Sequence[Mapping[str, Any]]) -> Candidate:
        """Set bytes and seconds of a step.

        Most of FSDP2's collectives overlap with computation; those of tp and cp do not.
        """
        rows = [{"axis": r["axis"], "sent_bytes": r["sent_bytes"] * found.accumulation} for r in collectives]
        found.within_node = sum(r["sent_bytes"] for r in rows if self.link.within_node(r["axis"], found.sizes))
        found.between_nodes = sum(r["sent_bytes"] for r in rows) - found.within_node
        times = {axis: size / _REACHED_LINK for axis, size in self.link.seconds(rows, found.sizes).items()}
        waiting = sum(seconds for axis, seconds in times.items() if axis in ("tp", "cp"))
        behind = sum(times.values()) - waiting
        found.computing = self._computing(found.checkpointing)
        found.seconds = found.computing + waiting + max(behind - found.computing, _EXPOSED * behind)
        return found

    def _computing(self, mode: str) -> float:
        per_token = self.base.about["flops_per_token"] or 6 * self.base.parameters
        forward = per_token / (3 if self.base.trainable > self.base.parameters // 2 else 2)
        tokens = self.rows * self.base.about["sequence"] / self.gpus
        return tokens * (per_token + RECOMPUTED[mode] * forward) / (self.link.tflops * 1e12 * _REACHED)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
