"""The pages say what is true: the layers are those of the contract, links lead somewhere."""

import builtins
import configparser
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import transformers

import hf_automodel_parallel
from hf_automodel_parallel import parallelizer
from hf_automodel_parallel.accelerate_plugin import full_parameter
from hf_automodel_parallel.export import merged, streaming
from hf_automodel_parallel.strategies.base import ParallelizationStrategy
from hf_automodel_parallel.strategies.context import ParallelizeContext
from hf_automodel_parallel.strategies.default import DefaultParallelizationStrategy
from hf_automodel_parallel.strategies.registry import PARALLELIZATION_STRATEGIES

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_architecture_lists_the_layers_of_the_contract():
    text = (ROOT / "docs/architecture.md").read_text()
    shown = re.search(r"<!-- layers: begin.*?-->\n```\n(.*?)\n```\n<!-- layers: end -->", text, re.S)
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    assert shown is not None
    assert shown[1].split("\n") == contract["importlinter:contract:layers"]["layers"].strip().split("\n")


def test_every_module_and_room_has_a_layer():
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    known = set(re.findall(r"\w+", contract["importlinter:contract:layers"]["layers"]))
    package = ROOT / "hf_automodel_parallel"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert there - {"__init__"} == known


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
]


class Anything:
    """Stands for the reader's model, loader and so on: whatever is asked of it, it gives more of itself."""

    def __getattr__(self, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: object, **kwargs: object) -> "Anything":
        return Anything()

    def __iter__(self) -> Iterator["Anything"]:
        return iter(())


class AnyAccelerator(Anything):
    """Of the reader's script: what goes through ``prepare`` comes back."""

    def prepare(self, *objects: object) -> tuple[object, ...]:
        return objects


def checked(function, result=None):
    """A function that takes the arguments of ``function`` alone, and returns a model or ``result``."""

    def stand_in(*args, **kwargs):
        inspect.signature(function).bind(*args, **kwargs)
        return torch.nn.Linear(2, 2) if result is None else result

    return stand_in


class Names(dict):
    """The reader's names in a block, and the public names of the libraries, which the text leaves out."""

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name):
            raise KeyError(name)
        for module in (hf_automodel_parallel, transformers, peft):
            if not isinstance(found := getattr(module, name, module), ModuleType):
                return found
        return importlib.import_module(name) if name in ("torch", "hf_automodel_parallel") else Anything()


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, monkeypatch, tmp_path):
    """As they stand, in one process: what needs a launcher or files of a model (the Accelerator, loading, sharding) is
    replaced; every import, every class and argument of ours is the real one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--output_dir", "out", "--use_cpu", "--auto_parallel", "tp=2"])
    accelerator = AnyAccelerator()
    monkeypatch.setattr("accelerate.Accelerator", lambda parallelism_config: accelerator)
    monkeypatch.setattr("hf_automodel_parallel.loading.from_pretrained", Anything())
    monkeypatch.setattr("peft.get_peft_model", Anything())
    monkeypatch.setattr("peft.PeftModel.from_pretrained", Anything())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", Anything())
    monkeypatch.setattr("transformers.Trainer", Anything())
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("hf_automodel_parallel.export.merged.save_merged", checked(merged.save_merged))
    stream = checked(streaming.stream_weights, [("lm_head.weight", torch.zeros(2, 2))])
    monkeypatch.setattr("hf_automodel_parallel.export.streaming.stream_weights", stream)
    monkeypatch.setattr(
        "hf_automodel_parallel.accelerate_plugin.full_parameter.full_parameter", checked(full_parameter.full_parameter)
    )
    for name in ("fsdp2_strategy_parallelize",):
        monkeypatch.setattr(parallelizer, name, checked(getattr(parallelizer, name)))
    registered = dict.fromkeys(PARALLELIZATION_STRATEGIES)
    code = compile(block.replace(", ...}", "}").replace("(...)", "()"), "block", "exec")
    try:
        exec(code, Names(__name__="block", accelerator=accelerator))
    finally:
        for name in [name for name in PARALLELIZATION_STRATEGIES if name not in registered]:
            del PARALLELIZATION_STRATEGIES[name]


def test_functions_named_in_prose_exist():
    """A dotted name of the package in the text is reached by importing the package alone."""
    for page in PAGES:
        for name in re.findall(r"`hf_automodel_parallel\.(\w+)\(", page.read_text()):
            assert hasattr(hf_automodel_parallel, name), f"{page.name}: hf_automodel_parallel.{name}"


def test_strategies_page_has_all_steps_and_attributes():
    page = (ROOT / "docs/strategies.md").read_text()
    steps, attributes = page.split("## The steps")[1].split("## What a context holds")
    default = DefaultParallelizationStrategy
    own = {name for cls in (ParallelizationStrategy, default) for name in vars(cls) if not name.startswith("_")}
    assert set(re.findall(r"^\| `(\w+)`", steps, re.M)) == {name for name in own if callable(getattr(default, name))}
    rows = re.findall(r"^\| (`.*?) \|", attributes, re.M)
    fields = {field.name for field in dataclasses.fields(ParallelizeContext)}
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == fields | {
        name for name in vars(ParallelizeContext) if not name.startswith("_")
    }
