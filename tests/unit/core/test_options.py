"""An option is declared once: its validation, text form, comparison, refusals and documentation follow from that."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_automodel_parallel
from hf_automodel_parallel import AutoParallelismConfig, ConfigError, ParallelizationStrategy, UnsupportedError
from hf_automodel_parallel.core.option_fields import (
    BACKENDS,
    check_tp_axis,
    compared_values,
    markdown_table,
    options_of,
    refuse_for_backend,
)
from hf_automodel_parallel.core.options import OptionFields, ParallelOptions

PACKAGE = Path(hf_automodel_parallel.__file__).parent
OPTIONS = list(options_of(OptionFields))

#: A value of each option that asks for something, and the options that it needs beside it.
ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "tp_plan": ("my_package.plans:llama", {}),
    "plan_order": (("registry", "hf"), {}),
    "reshard_after_forward": (False, {}),
    "forward_prefetch": (3, {}),
    "backward_prefetch": (3, {}),
    "sequence_parallel": (True, {}),
    "sequence_parallel_regather": (True, {"sequence_parallel": True}),
    "async_tensor_parallel": (True, {}),
    "loss_parallel": (True, {}),
    "loss_chunk_size": (8, {}),
    "activation_checkpointing": ("selective", {}),
    "compile": ("aot_eager", {}),
    "check_optimizer": (False, {}),
    "async_save": (True, {}),
    "audit": ("off", {}),
    "audit_steps": (5, {"audit": "every_n_steps"}),
    "backend": ("megatron_fsdp", {}),
    "megatron_fsdp": ({"zero_dp_strategy": 2}, {"backend": "megatron_fsdp"}),
    "towers": ("layers", {}),
    "adapters_over_dp": ("replicated", {}),
    "verbose": (2, {}),
}


class OwnFlow(ParallelizationStrategy):
    """Implements ``parallelize`` alone, and takes nothing."""

    def parallelize(self, model: Any, device_mesh: Any) -> Any:  # type: ignore[override]
        return model


def context_with(options: ParallelOptions) -> Any:
    from hf_automodel_parallel.strategies.context import ParallelizeContext

    return ParallelizeContext(torch.nn.Linear(2, 2), None, torch.device("cpu"), options)  # type: ignore[arg-type]


def test_every_option_is_declared_as_one():
    """No field of the config besides Accelerate's own and the declared ones, and a value for the tests of each."""
    from accelerate import ParallelismConfig

    own = {f.name for f in dataclasses.fields(AutoParallelismConfig)} - {
        f.name for f in dataclasses.fields(ParallelismConfig)
    }
    assert own == {option.name for option in OPTIONS} == set(ASKED)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_everything_follows_from_the_declaration(option):
    value, beside = ASKED[option.name]
    config = AutoParallelismConfig(tp_size=2, **{option.name: value, **beside})
    # documentation
    assert option.help.endswith(".") and f"| `{option.name}` |" in markdown_table(OptionFields)
    assert f"        {option.name}: " in (AutoParallelismConfig.__doc__ or "")
    # text form
    assert getattr(AutoParallelismConfig.from_dict(config.to_dict()), option.name) == value
    assert option.name in config.to_dict() and option.name not in AutoParallelismConfig(tp_size=2).to_dict()
    # validation
    with pytest.raises(ConfigError, match=f"{option.name}=.*: give .*"):
        AutoParallelismConfig(tp_size=2, **{option.name: object(), **beside})
    if option.needs is not None:
        with pytest.raises(ConfigError, match=f"{option.name}=.* has an effect with {option.needs.name}="):
            AutoParallelismConfig(tp_size=2, **{option.name: value})
    if option.tp_axis:
        with pytest.raises(ConfigError, match=f"{option.name}=.* with tp_size=1 has no effect"):
            check_tp_axis(config, 1)
    # comparison
    options = ParallelOptions.of(config)
    plain = compared_values(ParallelOptions())
    assert (option.name in plain) == option.collective
    if option.collective:
        assert compared_values(options)[option.name] != plain[option.name]
        assert option.name in context_with(options).choices
    # refusals
    for backend in BACKENDS:
        if option.belongs_to is None and backend not in option.backends:
            with pytest.raises(UnsupportedError, match=f"{option.name} cannot be combined with backend='{backend}'"):
                refuse_for_backend(ParallelOptions(**{option.name: value}), backend)
        elif option.belongs_to not in (None, backend):
            with pytest.raises(ConfigError, match=f"{option.name}=.* is an option of backend='{option.belongs_to}'"):
                AutoParallelismConfig(**{option.name: value, **beside, "backend": backend})
    if option.by_strategy:
        with pytest.raises(UnsupportedError, match=f"{option.argument or option.name}.* cannot be honoured"):
            OwnFlow().plan(context_with(ParallelOptions(**{option.name: value})))


def test_the_options_of_a_run_are_frozen_and_independent_of_the_config():
    config = AutoParallelismConfig(tp_size=2, sequence_parallel=True)
    options = ParallelOptions.of(config)
    config.sequence_parallel = False
    assert options.sequence_parallel and repr(options) == "ParallelOptions(sequence_parallel=True)"
    for change in (lambda: setattr(options, "sequence_parallel", False), lambda: delattr(options, "audit")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    for copied in (pickle.loads(pickle.dumps(options)), copy.deepcopy(options), dataclasses.replace(options)):
        assert copied == options != ParallelOptions()
    assert dataclasses.replace(options, audit="off").audit == "off"


NEW = """    throw_away: bool = option(False, Flag(), "Does nothing.", backends=("fsdp2",))
    tp_plan: """

SCRIPT = """
import dataclasses
import torch
from hf_automodel_parallel import AutoParallelismConfig, ConfigError, ParallelizationStrategy, UnsupportedError
from hf_automodel_parallel.core.option_fields import compared_values, markdown_table, refuse_for_backend
from hf_automodel_parallel.core.options import OptionFields, ParallelOptions
from hf_automodel_parallel.strategies.context import ParallelizeContext

class OwnFlow(ParallelizationStrategy):
    def parallelize(self, model, device_mesh):
        return model

def refused(call, error):
    try:
        call()
    except error as caught:
        assert "throw_away" in str(caught), caught
        return True

config = AutoParallelismConfig.parse("tp=2,throw_away")
assert config.throw_away is True and config.to_dict()["throw_away"] is True and "throw_away=True" in repr(config)
assert not AutoParallelismConfig().throw_away
assert refused(lambda: AutoParallelismConfig(throw_away="yes"), ConfigError)
options = ParallelOptions.of(config)
assert options.throw_away and compared_values(options)["throw_away"] is True
assert "`throw_away`" in markdown_table(OptionFields) and "throw_away: Does nothing." in AutoParallelismConfig.__doc__
assert refused(lambda: refuse_for_backend(options, "megatron_fsdp"), UnsupportedError)
context = ParallelizeContext(torch.nn.Linear(2, 2), None, torch.device("cpu"), options)
assert context.options.throw_away and context.choices["throw_away"] is True
assert refused(lambda: OwnFlow().plan(context), UnsupportedError)
"""


def test_a_new_option_takes_one_declaration(tmp_path):
    """In a copy of the package, one line is added to the declarations; everything but what acts on it is there."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    declarations = tmp_path / PACKAGE.name / "core" / "options.py"
    text = declarations.read_text()
    assert text.count("    tp_plan: ") == 1
    declarations.write_text(text.replace("    tp_plan: ", NEW))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, check=True, timeout=240)


def test_the_documented_table_is_up_to_date():
    """``hf-automodel-parallel options`` prints it."""
    path = PACKAGE.parent / "docs" / "options.md"
    shown = path.read_text().partition("| option |")
    assert shown[1] + shown[2] == markdown_table(OptionFields), (
        f"write it again: hf-automodel-parallel options > {path}"
    )
