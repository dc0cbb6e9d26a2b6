"""Anonymous memory of each rank while a model is loaded and sharded: streamed, and as the stock stack does it.

  python benchmarks/load_memory.py                      # 1.5 GB in 5 files, tp2 x fsdp2, 4 gloo processes
  python benchmarks/load_memory.py --dtype float32      # cast while it is loaded
  python benchmarks/load_memory.py --size 250MB --slack 60MB --ways streamed

Writes a Llama with random weights (bfloat16) to a temporary directory. Each way runs in fresh processes; a thread reads
RssAnon of /proc/self/status every 5 ms, from before the model is loaded until `prepare` has returned. The baseline is
RssAnon when everything is imported and the processes have met. Pages of mapped files do not count, the kernel can drop
them.

The bound is the rank's shard, and the largest tensor, both in the dtype that is loaded, and the slack.

Ways:
  streamed        hf_automodel_parallel.from_pretrained, then prepare
  stock           AutoModelForCausalLM.from_pretrained on every rank, then prepare
  rank zero       the same with Accelerate's cpu_ram_efficient_loading: rank 0 loads and broadcasts
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS = ("streamed", "stock", "rank zero")
MB = 1_000_000
UNITS = {"KB": 1_000, "MB": MB, "GB": 1_000 * MB}


def bytes_of(text: str) -> int:
    """``"1.5GB"`` as a number of bytes."""
    match = re.fullmatch(r"([\d.]+)\s*(KB|MB|GB)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number and KB, MB or GB, as in 250MB")
    return int(float(match[1]) * UNITS[match[2]])


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


def rank(way: str, directory: str, dtype_name: str | None, tp: int, out: str) -> None:
    """What one process does."""
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
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=tp), fsdp_plugin=plugin)
    if way == "rank zero":  # what `accelerate launch` sets
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
    torch.ones(64, 64) @ torch.ones(64, 64)
    dist.all_reduce(torch.ones(8))
    gc.collect()
    dtype = {} if dtype_name is None else {"dtype": getattr(torch, dtype_name)}
    peak = Peak()
    peak.start()
    begin = time.monotonic()
    if way == "streamed":
        model = hf_automodel_parallel.from_pretrained(AutoModelForCausalLM, directory, **dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, **dtype)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    model = accelerator.prepare(model)
    seconds = time.monotonic() - begin
    highest = peak.stop()
    local = [p.to_local() for p in model.parameters()]
    shard = sum(t.numel() * t.element_size() for t in local)
    checksum = torch.stack([t.double().sum() for t in local]).sum().item()
    result = {"peak": highest, "shard": shard, "largest": largest, "seconds": seconds, "checksum": checksum}
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(result))
    accelerator.end_training()


@contextmanager
def launched(world: int, arguments: list[str]) -> Any:
    """The results of ``world`` ranks."""
    with tempfile.TemporaryDirectory() as out:
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        done = subprocess.run(
            [*command, __file__, *arguments, "--out", out], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
        yield [json.loads(Path(out, f"{index}.json").read_text()) for index in range(world)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=bytes_of, default=bytes_of("1.5GB"), help="of the files (default 1.5GB)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="load in this dtype (default: the files')"
    )
    parser.add_argument("--slack", type=bytes_of, default=bytes_of("300MB"), help="part of the bound (default 300MB)")
    parser.add_argument("--tp", type=int, default=2, help="ranks of tensor parallelism (default 2)")
    parser.add_argument("--world", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}, with commas between them")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        rank(options.way, options.directory, options.dtype, options.tp, options.out)
        return 0
    ways = options.ways.split(",")
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        parser.error(f"--ways {unknown[0]!r}: choose from {', '.join(WAYS)}")
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory, options.size)
        files = [file.stat().st_size for file in Path(directory).glob("*.safetensors")]
        for way in ways:
            arguments = ["--way", way, "--directory", directory, "--tp", str(options.tp)]
            arguments += ["--dtype", options.dtype] if options.dtype else []
            with launched(options.world, arguments) as found:
                results[way] = found
    passed = show(results, files, options)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0 if passed else 1


def show(results: dict[str, list[dict[str, float]]], files: list[int], options: argparse.Namespace) -> bool:
    """Print the table; False if the streamed way is over the bound or loads other values."""
    from rich.console import Console
    from rich.table import Table

    sharded = f"tp{options.tp} x fsdp{options.world // options.tp}"
    dtype = options.dtype or "stored (bfloat16)"
    title = f"{sum(files) / MB:,.0f} MB in {len(files)} files, loaded as {dtype} on {sharded}"
    table = Table(title=f"{title}: peak RssAnon over the baseline, MB")
    for column in ("way", "rank", "peak", "shard", "largest tensor", "bound", "", "seconds"):
        table.add_column(column, justify="left" if column in ("way", "") else "right")
    passed = True
    reference = next(iter(results.values()))
    for way, ranks in results.items():
        for index, found in enumerate(ranks):
            bound = found["shard"] + found["largest"] + options.slack
            verdict = "within" if found["peak"] <= bound else "OVER"
            if found["checksum"] != reference[index]["checksum"]:
                verdict = "OTHER VALUES"
            passed &= way != "streamed" or verdict == "within"
            numbers = [f"{value / MB:,.0f}" for value in (found["peak"], found["shard"], found["largest"], bound)]
            table.add_row(way if index == 0 else "", str(index), *numbers, verdict, f"{found['seconds']:.1f}")
    console = Console(width=110)
    console.print(table)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "safetensors"))
    console.print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, {versions}")
    return passed


if __name__ == "__main__":
    raise SystemExit(main())
