"""Strategies of installed packages, found by entry point or registered by name, and the example that ships one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.models import build_model
from harness.pool import expect_error, run_distributed
from harness.training import batches_for
from transformers import LlamaConfig, LlamaForCausalLM
from unit.strategies.test_registry import forget

from hf_automodel_parallel import (
    AutoParallelismConfig,
    register_parallel_strategy,
)
from hf_automodel_parallel.strategies.registry import (
    PARALLELIZATION_STRATEGIES,
    _targets,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tests" / "packages" / "other_strategies"


def test_families_of_this_package_are_loaded_when_they_are_needed():
    code = (
        "import sys; from hf_automodel_parallel.strategies.registry import PARALLELIZATION_STRATEGIES as r, BUILT_IN;"
        "early = [m for m in sys.modules if any(m == t.partition(':')[0] for t in BUILT_IN.values())];"
        "print(early, sorted(type(r[name]).__name__ for name in BUILT_IN) and 'loaded')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("[] "), result.stdout + result.stderr


class EntryPointForCausalLM(LlamaForCausalLM):
    """The strategy of an installed package is registered for this name."""


class BrokenForCausalLM(LlamaForCausalLM):
    """The strategy of an installed package for this name cannot be imported."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """A directory with the other package installed as pip does it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["cp", "-r", f"{PACKAGE}/.", str(source)], check=True)
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return str(target)


def with_package(site: str, class_name: str, register: bool = False) -> Any:
    """Two Trainer steps of a model whose strategy lies in the installed package."""
    from transformers import Trainer, TrainingArguments

    sys.path.insert(0, site)
    _targets.cache_clear()
    try:
        if register:
            from other_strategies.found import EntryPointStrategy

            register_parallel_strategy(name=class_name)(EntryPointStrategy)
        config = LlamaConfig(**build_model("llama").config.to_diff_dict())
        cls = {c.__name__: c for c in (EntryPointForCausalLM, BrokenForCausalLM, LlamaForCausalLM)}[class_name]
        model = cls(config)
        rows = [{k: v[0] for k, v in batches_for(model, 4)[0].items()} for _ in range(4)]
        arguments = TrainingArguments(
            output_dir=os.devnull + "-unused",
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            parallelism_config=AutoParallelismConfig(tp_size=2),
        )
        Trainer(model, arguments, train_dataset=rows).train()
        import other_strategies.found

        return other_strategies.found.used
    finally:
        sys.path.remove(site)
        for name in [name for name in sys.modules if name.startswith("other_strategies")]:
            del sys.modules[name]
        _targets.cache_clear()
        PARALLELIZATION_STRATEGIES._loaded.clear()
        forget()


def test_an_installed_package_is_found_by_entry_point_and_used_by_the_trainer(installed):
    assert run_distributed(2, with_package, installed, "EntryPointForCausalLM") == [["EntryPointForCausalLM"]] * 2


def test_a_package_registers_by_class_name_and_is_used_by_the_trainer(installed):
    assert run_distributed(2, with_package, installed, "LlamaForCausalLM", True) == [["LlamaForCausalLM"]] * 2


def test_an_entry_point_that_cannot_be_imported_is_named(installed):
    expect_error(
        2,
        with_package,
        installed,
        "BrokenForCausalLM",
        match="'other_strategies.broken:Strategy'.*no such accelerator",
    )


def test_the_example_behind_the_launcher():
    """The third door: the script registers, the launcher brings the config; four layers are gathered in pairs."""
    script = str(ROOT / "examples" / "custom_strategy.py")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher = ["--rdzv_endpoint", "127.0.0.1:0", "-m", "hf_automodel_parallel.launch", "--auto_parallel", "dp_shard=2"]
    result = subprocess.run(
        [sys.executable, *torchrun, *launcher, script, "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    # two pairs, the embedding, norm and head, and nothing for the root
    assert "collectives of one forward: {'c10d._allgather_base_': 4}" in output, output
