"""Importing the package is cheap and changes nothing: whoever does not use it pays nothing for having it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import hf_automodel_parallel

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]

ALLOWED_SECONDS = 0.3

#: Everything that a user imports at the top of a script.
NAMES = "from hf_automodel_parallel import " + ", ".join(hf_automodel_parallel.__all__)


def in_fresh_interpreter(code: str) -> Any:
    """The JSON that `code` prints last, in an interpreter of its own."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_", "HF_AUTO_PARALLEL", "PYTHONPROFILE"))
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_import_adds_little_to_that_of_accelerate():
    """CPU seconds within one interpreter: unlike those on the clock, they do not depend on who else uses the
    machine.
    """
    seconds = in_fresh_interpreter(
        """
        import json, time
        import accelerate
        start = time.process_time()
        import hf_automodel_parallel
        print(json.dumps(time.process_time() - start))
        """
    )
    assert seconds <= ALLOWED_SECONDS


def loaded_modules(statement: str) -> list[str]:
    return in_fresh_interpreter(f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))")


def heavy(modules: list[str]) -> set[str]:
    """Classes of models, and the libraries that belong to those who use them."""
    models = {name for name in modules if name.startswith("transformers.models.") and ".modeling_" in name}
    return models | {name.split(".")[0] for name in modules} & {"peft", "trl", "datasets"}


@pytest.mark.core_cases("hf_automodel_parallel")
@pytest.mark.both_ends
@pytest.mark.parametrize("module", ["hf_automodel_parallel", "hf_automodel_parallel.launch"])
def test_import_loads_no_model_and_no_peft(module):
    """A model's class is seconds of import; PEFT belongs to those who use adapters."""
    modules = loaded_modules(f"import {module}")
    assert "hf_automodel_parallel.config" in modules
    assert not heavy(modules)
    assert not {"transformers", "rich", "typer"} & set(modules), "the config alone needs Accelerate only"


def test_the_arguments_load_what_those_of_transformers_load():
    """They derive from `TrainingArguments`, which loads PEFT by itself; nothing comes on top."""
    theirs, all_of_it = in_fresh_interpreter(
        f"""
        import json, sys
        from transformers import TrainingArguments
        theirs = sorted(sys.modules)
        {NAMES}
        print(json.dumps([theirs, sorted(sys.modules)]))
        """
    )
    assert "hf_automodel_parallel.config" in all_of_it and heavy(all_of_it) == heavy(theirs)


def test_heavy_modules_are_recognised():
    assert heavy(
        ["transformers.models.llama.modeling_llama", "peft.tuners", "torch", "transformers.modeling_utils"]
    ) == {
        "transformers.models.llama.modeling_llama",
        "peft",
    }


STATE = """
import json, logging, os, random, sys, threading, warnings
import numpy
import torch
import accelerate
import accelerate.accelerator
import transformers
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader


def state():
    def code(cls):
        return {name: id(value) for name, value in vars(cls).items() if callable(value)}

    return json.dumps({
        "default_dtype": str(torch.get_default_dtype()),
        "default_device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()],
        "matmul": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "mkldnn": [torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic],
        "sdp": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()],
        "distributed": torch.distributed.is_initialized(),
        "random": [int(torch.get_rng_state().sum()), hash(random.getstate()), int(numpy.random.get_state()[1].sum())],
        "environment": sorted(os.environ.items()),
        "path": sys.path,
        "warnings": [str(entry) for entry in warnings.filters],
        "excepthook": id(sys.excepthook),
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "torch_logging": [logging.getLogger(n).level for n in ("torch", "accelerate", "transformers")],
        "log_filters": len(logging.getLogger("torch.distributed.tensor._redistribute").filters),
        "serializable": len(torch.serialization.get_safe_globals()),
        "accelerate_state": [dict(AcceleratorState._shared_state), dict(PartialState._shared_state)],
        "parallelism_config": accelerate.accelerator.ParallelismConfig.__module__,
        "threads_alive": threading.active_count(),
        "classes": [code(cls) for cls in (
            torch.nn.Module, torch.nn.Linear, torch.optim.Optimizer, torch.Tensor, DTensor, DataLoader,
            accelerate.Accelerator, accelerate.ParallelismConfig, transformers.Trainer, transformers.PreTrainedModel,
        )],
    }, default=str)


state()  # loads what is lazy in the libraries themselves
before = state()
"""


def test_import_changes_no_global_state():
    """No flag of torch, no patched class, no environment, no random number, no log handler."""
    code = f"""{STATE}
import hf_automodel_parallel
package = state()
{NAMES}
import hf_automodel_parallel.strategies.default
everything = state()
torch.set_float32_matmul_precision("high")
print(json.dumps([json.loads(s) for s in (before, package, everything, state())]))
"""
    before, package, everything, changed = in_fresh_interpreter(code)
    for after in (package, everything):
        assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
    assert len(before["classes"]) == 10 and before["default_dtype"] == "torch.float32"
    assert [key for key in before if before[key] != changed[key]] == ["matmul"], "a change would be seen"


@pytest.mark.core
def test_all_names_exist():
    for name in hf_automodel_parallel.__all__:
        assert getattr(hf_automodel_parallel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        hf_automodel_parallel.missing  # noqa: B018
