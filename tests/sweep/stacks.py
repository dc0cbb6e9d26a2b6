"""``python -m sweep.stacks`` (from tests/): other stacks by the oracle of ``verify``, written to docs/stacks.md.

Each cell is a ``verify --stack``; ``stacks.json`` has the outcomes, and the page is made of it.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.models import MODELS
from rich.progress import track
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_automodel_parallel.cli import app

ROOT = Path(__file__).resolve().parents[2]
DATA, PAGE = Path(__file__).with_name("stacks.json"), ROOT / "docs" / "stacks.md"
TYPES = ("llama", "qwen3", "gemma3", "phi3", "cohere", "gpt2", "mixtral", "qwen3_moe")
MESHES = {
    "tp 2": ["--tp", "2"],
    "FSDP2 2": ["--dp-shard", "2"],
    "tp 2 x FSDP2 2": ["--tp", "2", "--dp-shard", "2"],
}
STACKS = {"this package": [], "transformers": ["--stack", "transformers"], "Accelerate": ["--stack", "accelerate"]}
TUNING = {"full": [], "LoRA": ["--lora", "r=4"]}
#: (mesh, stack); Accelerate has FSDP2 alone.
COLUMNS = [(mesh, stack) for mesh in MESHES for stack in STACKS if stack != "Accelerate" or mesh == "FSDP2 2"]
PACKAGES = ("torch", "transformers", "accelerate", "peft")

HEAD = """# Other stacks, by the same oracle

Loss and every gradient of a small model on gloo ranks against one process in float32, by `verify --stack`, in a plain
training loop: transformers' `DistributedConfig` (models sharded by `from_pretrained`, with PEFT on top) and
Accelerate's FSDP2. The stacks run in interpreters that never import this package. LoRA has rank 4, on
all linear layers. {date}, {versions}.

✓: loss within 1e-5 and each gradient within 1e-4 of one process. A number: what happens instead, below. `--script`
writes a cell as a script of torch, transformers, accelerate and peft alone:

```bash
hf-automodel-parallel verify path/to/model --tp 2 --lora r=4 --stack transformers --script reproduction
```

Made by `make stacks`. Not here: DeepSpeed, Megatron, GPUs, and speed
([benchmarks](benchmarks.md)).
"""


def measure() -> dict[str, Any]:
    """All cells: outcomes by "tuning/type/mesh/stack", None where it is right, else what happened."""
    outcomes: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in TYPES:
            model_type, values = MODELS[kind]
            AutoConfig.for_model(model_type, **values).save_pretrained(Path(name, kind))
        cells = [(t, kind, mesh, stack) for t in TUNING for kind in TYPES for mesh, stack in COLUMNS]
        for tuning, kind, mesh, stack in track(cells, description="stacks"):
            options = [*MESHES[mesh], *STACKS[stack], *TUNING[tuning], "--json"]
            done = CliRunner().invoke(app, ["verify", str(Path(name, kind)), *options])
            outcomes[f"{tuning}/{kind}/{mesh}/{stack}"] = outcome(json.loads(done.stdout))
    versions = {package: version(package).split("+")[0] for package in PACKAGES}
    return {"date": datetime.date.today().isoformat(), "versions": versions, "outcomes": outcomes}


def outcome(result: dict[str, Any]) -> str | None:
    """What happened in a cell, of the JSON that ``verify`` prints; None if it is right."""
    if result["ok"]:
        return None
    if "error" in result:
        return result["error"]
    name, error = result["where"], result["errors"].get(result["where"], 0.0)
    if result["one_side"]:
        return name
    size = "another shape than the parameter's" if error is None else f"off by {error:.0e} of its norm"
    return f"gradients are wrong without an error; the worst, of {name}, is {size}"


def page(data: dict[str, Any]) -> str:
    """The Markdown of docs/stacks.md."""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    reasons = list(dict.fromkeys(why for why in data["outcomes"].values() if why is not None))
    lines = [HEAD.format(date=data["date"], versions=versions)]
    for tuning in TUNING:
        lines += [f"## {tuning}", "", "| | " + " | ".join(f"{mesh}: {stack}" for mesh, stack in COLUMNS) + " |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for kind in TYPES:
            whys = [data["outcomes"][f"{tuning}/{kind}/{mesh}/{stack}"] for mesh, stack in COLUMNS]
            cells = ["✓" if why is None else f"({reasons.index(why) + 1})" for why in whys]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines.append("")
    if reasons:
        lines += ["## What happens instead", ""]
        lines += [f"{number}. `` {why} ``" for number, why in enumerate(reasons, start=1)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    data = measure()
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
