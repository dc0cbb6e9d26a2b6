"""What is likely to be unwanted in a plan, each with what to do about it."""

from __future__ import annotations

from .explanation import Explanation
from .interconnect import span
from .sizes import gib

#: A share of the parameters that is worth a word.
_MUCH = 0.02


def warnings_for(found: Explanation, gpus_per_node: int, gpu_memory: int | None) -> list[str]:
    """Sentences, the gravest first.

    Args:
        found: everything else that is known.
        gpus_per_node: GPUs that fast links connect.
        gpu_memory: bytes of a GPU, or None.
    """
    tp = found.sizes["tp"]
    memory, result = found.memory, []
    peak = memory["peak"]
    if gpu_memory is not None and peak > gpu_memory:
        needed = [mode for mode, its in found.by_checkpointing.items() if its["peak"] <= gpu_memory]
        if needed:
            remedy = f"--checkpointing {needed[0]} needs {gib(found.by_checkpointing[needed[0]]['peak'])}."
        elif memory["activations"] > peak // 2:
            remedy = "Most are activations: shard them (--tp, --sequence-parallel, --cp), or use shorter sequences."
        else:
            remedy = "Most are weights, gradients and optimizer state: shard them over more ranks (--dp-shard, --tp)."
        result.append(f"the peak of {gib(peak)} is more than the {gib(gpu_memory)} of a GPU. {remedy}")
    if tp > 1 and span("tp", found.sizes) > gpus_per_node:
        result.append(
            f"tp={tp} spans nodes of {gpus_per_node} GPUs, so that each layer waits for the network. Use --tp "
            f"{gpus_per_node} or less."
        )
    elif found.sizes["cp"] > 1 and span("cp", found.sizes) > gpus_per_node:
        result.append(
            f"cp={found.sizes['cp']} and tp={tp} together span nodes of {gpus_per_node} GPUs: keys and values of each "
            "layer cross the network."
        )
    if tp > 1 and not found.rows:
        result.append(
            "no tensor-parallel plan shards anything: all tp ranks compute the same. Use --tp 1, or --tp-plan."
        )
    elif tp > 1 and found.parameters and found.replicated_over_tp > _MUCH * found.parameters:
        share = found.replicated_over_tp / found.parameters
        names = ", ".join(name for _, name in found.largest_replicated)
        result.append(
            f"tp does not shard {share:.0%} of the parameters ({names}, ...): each tp rank keeps and computes them. "
            "Name them in a --tp-plan, or use a smaller tp."
        )
    if found.sizes["dp_replicate"] > 1 and found.sizes["dp_shard"] == 1 and memory["optimizer"] > peak // 3:
        result.append(
            "the optimizer state is replicated over dp_replicate and is much of the peak: use --dp-shard instead."
        )
    if tp > 1 and found.about["sequence"] > 1 and not found.about.get("sequence_parallel") and _activations_lead(found):
        result.append(
            "activations are most of the peak, and norms and residuals are whole on each tp rank: --sequence-parallel "
            "shards them at the same communication."
        )
    if _activations_lead(found) and found.about["checkpointing"] == "none":
        full = found.by_checkpointing.get("full")
        saving = f" (a peak of {gib(full['peak'])})" if full else ""
        result.append(f"activations are most of the peak: --checkpointing full{saving} or selective recomputes them.")
    if memory["logits"] > peak // 5:
        result.append("logits take a fifth of the peak: a larger --tp shards them over the vocabulary.")
    return result


def _activations_lead(found: Explanation) -> bool:
    return found.memory["activations"] > found.memory["peak"] // 2
