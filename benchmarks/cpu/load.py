"""Loading and sharding a model: memory of each rank, bytes and seconds; streamed, and as the stock stack does it.

Writes a Llama with random weights (bfloat16) to a temporary directory. Each way runs in fresh processes; a thread reads
RssAnon of /proc/self/status every 5 ms, from before the model is loaded until ``prepare`` has returned. The baseline is
RssAnon when everything is imported and the processes have met. Pages of mapped files do not count, the kernel can drop
them. The bound is the rank's shard, and the largest tensor, both in the dtype that is loaded, and the slack.

Ways:
  streamed        hf_automodel_parallel.from_pretrained, then prepare
  stock           AutoModelForCausalLM.from_pretrained on every rank, then prepare
  rank zero       the same with Accelerate's cpu_ram_efficient_loading: rank 0 loads and broadcasts
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..ranks import RanksFailed, on_ranks
from ..recorder import Recorder
from ..timing import Stopwatch

WAYS = ("streamed", "stock", "rank zero")
MB = 1_000_000


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """On tp2 x fsdp2: 1.5 GB as stored; to see that it runs, 240 MB cast to float32, streamed alone."""
    size, dtype, slack = (240 * MB, "float32", 100 * MB) if recorder.smoke else (1500 * MB, None, 300 * MB)
    rows, left_out = [], []
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory, size)
        files = [file.stat().st_size for file in Path(directory).glob("*.safetensors")]
        for way in WAYS[:1] if recorder.smoke else WAYS:
            recorder.progress(f"load: {way}")
            try:
                ranks = on_ranks(4, "benchmarks.cpu.load:measure", {"way": way, "directory": directory, "dtype": dtype})
            except RanksFailed as error:
                left_out.append({"what": f"loading, {way}", "why": str(error)})
                continue
            rows += [{"way": way, "rank": rank, **figures} for rank, figures in enumerate(ranks)]
    settings = {"bytes": sum(files), "files": len(files), "dtype": dtype or "stored (bfloat16)", "slack": slack}
    recorder.record("load", rows, {**settings, "mesh": "TP2 x FSDP2"}, left_out)


def write_checkpoint(directory: str, size: int) -> None:
    """A Llama of about ``size`` bytes in bfloat16, in five files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # 12 h^2 numbers in a layer: 4 h^2 of attention, 3 h (8/3 h) of the MLP; the two ends have 2 V h.
    hidden, layers = (2048, 12) if size > 600 * MB else (1024, 8)
    vocabulary = max(256, int((size / 2 - 12 * layers * hidden**2) / (2 * hidden)) // 64 * 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=f"{int(total / MB / 4.55)}MB")


class Peak(threading.Thread):
    """The highest RssAnon of this process since it was started, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.baseline = self.highest = anonymous_memory()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.highest = max(self.highest, anonymous_memory())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return max(self.highest, anonymous_memory()) - self.baseline


def anonymous_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("RssAnon is not in /proc/self/status; this needs Linux 4.5 or newer")


def measure(way: str, directory: str, dtype: str | None) -> dict[str, Any]:
    """One rank."""
    import gc

    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (the class is part of the baseline)

    import hf_automodel_parallel
    from hf_automodel_parallel import AutoParallelismConfig

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=way == "rank zero", state_dict_type="FULL_STATE_DICT"
    )
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2), fsdp_plugin=plugin)
    if way == "rank zero":  # what `accelerate launch` sets
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
    torch.ones(64, 64) @ torch.ones(64, 64)
    dist.all_reduce(torch.ones(8))
    gc.collect()
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    peak = Peak()
    peak.start()
    watch = Stopwatch()
    if way == "streamed":
        model = hf_automodel_parallel.from_pretrained(AutoModelForCausalLM, directory, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    model = accelerator.prepare(model)
    wall, cpu = watch.read()
    local = [p.to_local() for p in model.parameters()]
    return {
        "peak": peak.stop(),
        "shard": sum(t.numel() * t.element_size() for t in local),
        "largest": largest,
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "checksum": torch.stack([t.double().sum() for t in local]).sum().item(),
    }
