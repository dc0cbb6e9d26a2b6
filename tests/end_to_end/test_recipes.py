"""The recipes of `examples/` with `--tiny`, behind the launcher on two CPU processes; several in one process each."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: recipe -> what it saves
WRITES = {
    "sft_lora": "adapter_model.safetensors",
    "dpo": "adapter_model.safetensors",
    "grpo": "adapter_model.safetensors",
    "reward": "adapter_model.safetensors",
    "classification": "model.safetensors",
    "seq2seq": "model.safetensors",
    "custom_model": "model.safetensors",
    "accelerate_loop": "model.safetensors",
    "qlora": "adapter_model.safetensors",
    "pretraining": "done",
    "vision_language": "adapter_model.safetensors",
    "long_context": "model.safetensors",
}

ONE_AFTER_THE_OTHER = """
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState

examples, out, *recipes = sys.argv[1:]
sys.path.insert(0, examples)
for recipe in recipes:
    sys.argv = [f"{examples}/{recipe}.py", "--tiny", "--output_dir", f"{out}/{recipe}"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if PartialState().is_main_process:
        print("RAN", recipe, AcceleratorState().parallelism_config.tp_size, flush=True)
"""


def run(out: Path, config: str, *recipes: str) -> None:
    script = out / "one_after_the_other.py"
    script.write_text(ONE_AFTER_THE_OTHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "hf_automodel_parallel.launch", "--auto_parallel", config, script, ROOT / "examples"]
    done = subprocess.run(
        [*map(str, command), str(out), *recipes], cwd=out, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    size = "2" if config == "tp=2" else "1"
    assert [line for line in done.stdout.splitlines() if line.startswith("RAN")] == [f"RAN {r} {size}" for r in recipes]
    assert all((out / recipe / WRITES[recipe]).is_file() for recipe in recipes)


@pytest.mark.timeout(600)
def test_recipes_under_tensor_parallelism(tmp_path):
    recipes = [name for name in WRITES if name not in ("qlora", "pretraining", "long_context", "accelerate_loop")]
    run(tmp_path, "tp=2", *recipes, "accelerate_loop")  # last: it ends the process group


@pytest.mark.timeout(600)
def test_recipes_under_fsdp2(tmp_path):
    run(tmp_path, "dp_shard=2", "qlora", "pretraining")


@pytest.mark.timeout(600)
def test_recipes_under_context_parallelism(tmp_path):
    run(tmp_path, "cp=2", "long_context")


def test_recipes_are_short_and_tested():
    others = {"finetune_text", "demo", "gemma_gguf", "custom_strategy", "custom_model_class", "tiny"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == others | set(WRITES)
    for name in WRITES:
        text = (ROOT / f"examples/{name}.py").read_text()
        assert len(text.splitlines()) < 60
        assert all(line in text for line in ("1 GPU ", "8 GPUs ", "16 GPUs ", "CPU ", "Expect: "))
