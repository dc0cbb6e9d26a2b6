"""The config: every form it can be written in, what is refused and with which words, sizes, round trips, arguments."""

import copy
import dataclasses
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import TorchTensorParallelConfig
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers import HfArgumentParser, TrainingArguments

from hf_automodel_parallel import (
    AutoParallelArgumentsMixin,
    AutoParallelismConfig,
    AutoParallelTrainingArguments,
    ConfigError,
    UnsupportedError,
)
from hf_automodel_parallel import config as config_module
from hf_automodel_parallel.accelerate_plugin import config_text
from hf_automodel_parallel.core.mesh import AXES
from hf_automodel_parallel.core.option_fields import compared_values, options_of

PLAN = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}


def plan_function(model):
    """A plan that pickle can name."""
    return PLAN


class PlanObject:
    """A callable without a name of its own."""

    def __call__(self):
        return PLAN


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Each test as in a process of its own: no sizes in the environment, no Accelerator that another test made."""
    for axis in AXES:
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def sizes(config, world_size):
    """(dp_replicate, dp_shard, tp) at `world_size`."""
    config.resolve_sizes(world_size)
    return config.dp_replicate_size, config.dp_shard_size, config.tp_size


# ---- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "tp=2,dp_shard=4",
        "tp_size=2,dp_shard_size=4",
        "dp_shard_size=4,tp=2",
        " tp = 2 , dp_shard = 4 ,",
        '{"tp": 2, "dp_shard": 4}',
        '{"tp_size": 2, "dp_shard_size": 4}',
        "{tp: 2, dp_shard: 4}",
    ],
)
def test_text_forms_mean_the_same(text):
    """Short and long names, pairs and JSON text are one language."""
    assert AutoParallelismConfig.parse(text) == AutoParallelismConfig(tp_size=2, dp_shard_size=4)


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "tp", "cp", "sp"])
def test_every_axis_has_a_short_and_a_long_name(axis):
    short, long = AutoParallelismConfig.parse(f"{axis}=1"), AutoParallelismConfig.parse(f"{axis}_size=1")
    assert short.to_dict() == long.to_dict() == {f"{axis}_size": 1}


FILE_CONTENT = {"tp": 2, "dp_shard_size": 4, "plan_order": ["registry", "hf"], "tp_plan": PLAN, "forward_prefetch": 0}


@pytest.mark.parametrize(
    "name, dump",
    [("a.yaml", yaml.safe_dump), ("a.yml", yaml.safe_dump), ("a.json", json.dumps), ("plain_name", yaml.safe_dump)],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_files(tmp_path, name, dump, kind):
    """A file is recognised by its suffix, or because it exists, whether a string or a Path names it."""
    path = tmp_path / name
    path.write_text(dump(FILE_CONTENT))
    assert AutoParallelismConfig.parse(kind(path)) == AutoParallelismConfig(
        tp_size=2, dp_shard_size=4, plan_order=("registry", "hf"), tp_plan=PLAN, forward_prefetch=0
    )


def test_dict_and_config_object():
    config = AutoParallelismConfig(tp_size=2)
    assert AutoParallelismConfig.parse(config) is config
    assert AutoParallelismConfig.parse({"tp": 2, "reshard_after_forward": False}) == AutoParallelismConfig(
        tp_size=2, reshard_after_forward=False
    )


def test_pairs_read_yaml_values():
    """Values of pairs have types, a bare name means true, and a list of sources is written with plus signs."""
    config = AutoParallelismConfig.parse(
        "reshard_after_forward,forward_prefetch=0,plan_order=registry+hf,tp_plan=my_package.plans:llama"
    )
    assert config.reshard_after_forward is True
    assert config.forward_prefetch == 0
    assert config.plan_order == ("registry", "hf")
    assert config.tp_plan == "my_package.plans:llama"
    assert AutoParallelismConfig.parse("reshard_after_forward=false").reshard_after_forward is False


def test_json_text_may_be_longer_than_a_file_name():
    """The text is not first tried as a path, which the operating system refuses with an error of its own."""
    plan = {f"model.layers.{index}.self_attn.q_proj": "colwise" for index in range(100)}
    assert AutoParallelismConfig.parse(json.dumps({"tp": 2, "tp_plan": plan})).tp_plan == plan
    pairs = ",".join(["tp=2", "tp_plan=" + "a" * 5000])
    assert AutoParallelismConfig.parse(pairs).tp_plan == "a" * 5000


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, nearest",
    [
        ("tp_sise", "tp_size"),
        ("tq", "tp"),
        ("dp_shards", "dp_shard"),
        ("dp_replicat", "dp_replicate"),
        ("forward_prefech", "forward_prefetch"),
        ("plan_oder", "plan_order"),
        ("reshard_after_foward", "reshard_after_forward"),
    ],
)
@pytest.mark.parametrize("form", ["pairs", "dict"])
def test_unknown_field_names_the_nearest_one(written, nearest, form):
    value = f"{written}=2" if form == "pairs" else {written: 2}
    with pytest.raises(ConfigError, match=f"unknown field '{written}'.*did you mean '{nearest}'") as caught:
        AutoParallelismConfig.parse(value)
    assert "Known fields: " in str(caught.value)


def test_constructor_names_the_nearest_field():
    """As the text forms do. "dp" means an axis of data parallelism, though "tp" is the nearer word."""
    for written, nearest in {
        "dp": "dp_shard_size",
        "dp_size": "dp_shard_size",
        "tp": "tp_size",
        "dp_shard": "dp_shard_size",
        "plan_oder": "plan_order",
        "reshard": "reshard_after_forward",
    }.items():
        with pytest.raises(ConfigError, match=f"no field '{written}'; did you mean '{nearest}'"):
            AutoParallelismConfig(**{written: 2})
    with pytest.raises(ConfigError, match="no field 'zzzzzz'.*nown fields: .*tp_size"):
        AutoParallelismConfig(zzzzzz=1)
    for text in ("dp=2", "dp_size=2"):
        with pytest.raises(ConfigError, match="did you mean 'dp_shard'"):
            AutoParallelismConfig.parse(text)


def test_config_file_of_accelerate_is_unwrapped(caplog):
    """Given to the flag instead of to `accelerate launch --config_file`."""
    config_text._warn_of_rest.cache_clear()  # another test may have read the file
    file = Path(__file__).resolve().parents[2] / "accelerate_configs" / "cpu_fsdp2_tp2.yaml"
    config = AutoParallelismConfig.parse(str(file))
    assert (config.tp_size, config.dp_shard_size) == (2, 2)
    assert "only the section parallelism_config is read here. The rest (compute_environment, " in caplog.text
    section = {"parallelism_config_cp_size": 2, "parallelism_config_cp_comm_strategy": "allgather"}
    assert AutoParallelismConfig.from_dict({"parallelism_config": section}).cp_handler.cp_comm_strategy == "allgather"
    with pytest.raises(ConfigError, match="config file of Accelerate without a section parallelism_config"):
        AutoParallelismConfig.from_dict({"compute_environment": "LOCAL_MACHINE", "num_processes": 2})


# ---- who uses it --------------------------------------------------------------------------------------------------


def test_second_accelerator_with_another_config_is_refused():
    """Accelerate shares the first one's state and would drop it; an equal one is the same request."""
    first, equal, other = (
        AutoParallelismConfig(**values) for values in ({"tp_size": 1}, {"tp_size": 1}, {"cp_size": 1})
    )
    Accelerator(cpu=True, parallelism_config=first)
    Accelerator(cpu=True)
    Accelerator(cpu=True, parallelism_config=equal)
    other.activation_checkpointing = "full"
    for given in (other, ParallelismConfig()):
        with pytest.raises(ConfigError, match=r"(?s)another Accelerator was given .*share the config of the first"):
            Accelerator(cpu=True, parallelism_config=given)


TOO_LATE = """
from accelerate import Accelerator
from hf_automodel_parallel import AutoParallelismConfig
config = AutoParallelismConfig(tp_size=1)
Accelerator(cpu=True)
Accelerator(cpu=True, parallelism_config=config)
"""


def test_config_that_nobody_used_is_reported_at_the_end(monkeypatch, caplog):
    """The run was not parallel: a config that Accelerate dropped has no other chance to say so."""
    done = subprocess.run([sys.executable, "-c", TOO_LATE], stderr=subprocess.PIPE, text=True)
    assert "AutoParallelismConfig(tp_size=1) was never used: no model was parallelised by it." in done.stderr
    said = {}
    for case, environment in {
        "alone": {},
        "several": {"WORLD_SIZE": "2"},
        "rank 1": {"WORLD_SIZE": "2", "RANK": "1"},
    }.items():
        for used in (False, True):
            monkeypatch.setattr(config_module, "_used", False)
            config = AutoParallelismConfig(tp_size=1)
            if used:
                Accelerator(cpu=True, parallelism_config=config)
                AutoParallelismConfig(tp_size=1)
                AcceleratorState._reset_state(reset_partial_state=True)
            caplog.clear()
            with monkeypatch.context() as patch:
                for name in ("WORLD_SIZE", "RANK"):
                    patch.delenv(name, raising=False)
                for name, value in environment.items():
                    patch.setenv(name, value)
                config_module._report_unused()
            said[case, used] = "was never used" in caplog.text
    assert [case for case, reported in said.items() if reported] == [("several", False)]


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_unknown_field_without_a_near_one_lists_the_known_fields():
    for key in ("zzzzzzzz", 7):
        with pytest.raises(
            ConfigError, match=f"unknown field {key!r} in the parallelism config\\. Known fields: .*tp_size"
        ):
            AutoParallelismConfig.from_dict({key: 2})


@pytest.mark.parametrize("text", ["tp=2,tp=2", "tp=2,tp_size=4", '{"tp": 2, "tp_size": 2}', '{"tp": 2, "tp": 4}'])
def test_duplicates(text):
    """Also where the two names of one field meet, and inside JSON, whose parser would keep the last."""
    with pytest.raises(ConfigError, match="twice"):
        AutoParallelismConfig.parse(text)


def test_duplicates_in_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("tp: 2\ndp_shard: 2\ntp: 4\n")
    with pytest.raises(ConfigError, match=r"config\.yaml.*'tp' is given twice"):
        AutoParallelismConfig.parse(path)


@pytest.mark.parametrize("text", ["", "  ", ",", " , ,"])
def test_empty_text(text):
    with pytest.raises(ConfigError, match="empty"):
        AutoParallelismConfig.parse(text)


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "- tp\n- 2\n", "tp=2", "2"])
def test_file_without_a_mapping(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml.*must hold a mapping"):
        AutoParallelismConfig.parse(path)


@pytest.mark.parametrize(
    "name, content", [("a.yaml", "tp: [2\n"), ("a.yaml", "tp: 2\n\tdp_shard: 2"), ("a.json", '{"tp": ')]
)
def test_malformed_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{name}' is not valid YAML or JSON"):
        AutoParallelismConfig.parse(str(path))


def test_malformed_json_text():
    with pytest.raises(ConfigError, match="the given text is not valid YAML or JSON"):
        AutoParallelismConfig.parse('{"tp": 2')


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml'.*No such file"):
        AutoParallelismConfig.parse(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"tp: 2 # \xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        AutoParallelismConfig.parse(binary)


@pytest.mark.parametrize("text", ["tp 2", "tp:2", "=2", "tp=2,,4=2", "2", "--tp=2", "some/where/config"])
def test_text_that_is_no_list_of_pairs(text):
    with pytest.raises(ConfigError, match="write name=value pairs"):
        AutoParallelismConfig.parse(text)


@pytest.mark.parametrize("text", ["tp=", "tp=,dp_shard=2", "dp_shard=2,tp= "])
def test_pair_without_a_value(text):
    """An unset shell variable (tp=$TP) must not mean "infer it"."""
    with pytest.raises(ConfigError, match="'tp' has no value"):
        AutoParallelismConfig.parse(text)


@pytest.mark.parametrize("value", [None, 2, ["tp=2"], b"tp=2", ParallelismConfig(tp_size=2)])
def test_what_is_no_form_of_a_config(value):
    with pytest.raises(ConfigError, match=f"cannot read a parallelism config from {type(value).__name__}"):
        AutoParallelismConfig.parse(value)


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "tp"])
@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, False, [2]])
def test_size_of_a_wrong_type(axis, size):
    with pytest.raises(ConfigError, match=f"{axis}_size="):
        AutoParallelismConfig.from_dict({axis: size})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"forward_prefetch": -1}, "forward_prefetch=-1"),
        ({"backward_prefetch": 1.5}, r"backward_prefetch=1\.5"),
        ({"backward_prefetch": True}, "backward_prefetch=True"),
        ({"reshard_after_forward": "yes"}, "reshard_after_forward='yes'"),
        ({"reshard_after_forward": 8}, "reshard_after_forward=8"),
        ({"tp_plan": 3}, "tp_plan=3"),
        ({"tp_plan": ["colwise"]}, r"tp_plan=\['colwise'\]"),
        ({"tp_plan": True}, "tp_plan=True"),
        ({"sp_handler": {"a": 1}}, "sp_handler"),
        (
            {"activation_checkpointing": "selektive"},
            "activation_checkpointing='selektive'.*none, full, submodule, selective",
        ),
        ({"activation_checkpointing": 2}, "activation_checkpointing=2"),
        ({"compile": 2}, "compile=2"),
        ({"compile": ""}, "compile=''"),
    ],
)
def test_value_of_a_wrong_type_names_field_and_value(values, message):
    with pytest.raises(ConfigError, match=message):
        AutoParallelismConfig.from_dict(values)


@pytest.mark.parametrize("order", ["hf", "registry+default", "default+hf+registry", ("default",), ["registry", "hf"]])
def test_plan_order(order):
    wanted = tuple(order.split("+")) if isinstance(order, str) else tuple(order)
    assert AutoParallelismConfig(plan_order=order).plan_order == wanted


@pytest.mark.parametrize(
    "order", ["", (), "hf+hf", ("hf", "hf"), "huggingface", ("hf", "optimized"), None, 3, True, (["hf"],)]
)
def test_wrong_plan_order(order):
    with pytest.raises(ConfigError, match=r"plan_order=.*hf, registry, default"):
        AutoParallelismConfig(plan_order=order)


def test_sequence_parallel_needs_more_than_one_rank_of_tp():
    config = AutoParallelismConfig(sequence_parallel=True, tp_size=2)
    config.resolve_sizes(2)
    assert config.to_dict()["sequence_parallel"] is True
    assert AutoParallelismConfig.from_dict(config.to_dict()).sequence_parallel
    for sizes in ({"tp_size": 1}, {}):
        with pytest.raises(ConfigError, match=r"sequence_parallel=True with tp_size=1.*tp_size=2 or more"):
            AutoParallelismConfig(sequence_parallel=True, **sizes).resolve_sizes(2)
    with pytest.raises(ConfigError, match=r"sequence_parallel='yes': give true or false"):
        AutoParallelismConfig(sequence_parallel="yes", tp_size=2)


def test_gathering_again_needs_sequence_parallel():
    config = AutoParallelismConfig.parse("tp=2,sequence_parallel,sequence_parallel_regather")
    assert AutoParallelismConfig.from_dict(config.to_dict()).sequence_parallel_regather
    with pytest.raises(
        ConfigError, match=r"sequence_parallel_regather=True .*Set sequence_parallel=True, or leave it out"
    ):
        AutoParallelismConfig(sequence_parallel_regather=True, tp_size=2)
    with pytest.raises(ConfigError, match=r"sequence_parallel_regather=1: give true or false"):
        AutoParallelismConfig(sequence_parallel_regather=1, sequence_parallel=True, tp_size=2)


@pytest.mark.parametrize(
    "values",
    [
        {"sequence_parallel": False, "async_tensor_parallel": False, "compile": False},
        {"loss_parallel": False, "activation_checkpointing": False, "audit": False},
        {"loss_parallel": None, "activation_checkpointing": None, "audit": None, "compile": None, "backend": "fsdp2"},
        {"cp": 1, "sp": 1},
    ],
)
def test_switching_an_option_off_is_no_request_for_it(values):
    AutoParallelismConfig.parse(values)


def test_sp_size_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"sp_size=2: .*Ulysses.*FSDP2"):
        AutoParallelismConfig(sp_size=2)


def test_axes_from_the_environment_are_refused_too(monkeypatch):
    """`accelerate launch` hands the sizes of a config file on in the environment."""
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ConfigError, match="sp_size=2"):
        AutoParallelismConfig(tp_size=2)


def test_context_parallel_gathers_and_refuses_the_ring(monkeypatch):
    from accelerate.utils import TorchContextParallelConfig

    given = AutoParallelismConfig.parse({"cp": 2, "cp_handler": {"cp_comm_strategy": "allgather"}})
    assert AutoParallelismConfig.from_dict(given.to_dict()).to_dict() == given.to_dict()
    ring = TorchContextParallelConfig(cp_comm_strategy="alltoall")
    with pytest.raises(UnsupportedError, match="cp_comm_strategy='alltoall'.*Use cp_comm_strategy='allgather'"):
        AutoParallelismConfig(cp_size=2, cp_handler=ring)
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_COMM_STRATEGY", "alltoall")
    with pytest.raises(UnsupportedError, match="alltoall"):
        AutoParallelismConfig()


# ---- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, world, want",
    [
        # nothing given: the rest goes to dp_shard
        ({}, 1, (1, 1, 1)),
        ({}, 8, (1, 8, 1)),
        ({"tp": 1}, 8, (1, 8, 1)),
        ({"tp": 2}, 8, (1, 4, 2)),
        ({"tp": 8}, 8, (1, 1, 8)),
        ({"tp": 3}, 12, (1, 4, 3)),
        ({"dp_replicate": 2}, 8, (2, 4, 1)),
        ({"dp_replicate": 2, "tp": 2}, 8, (2, 2, 2)),
        ({"dp_replicate": 4, "tp": 2}, 8, (4, 1, 2)),
        ({"dp_replicate": 8}, 8, (8, 1, 1)),
        # dp_shard given: dp_replicate takes the rest
        ({"dp_shard": 8}, 8, (1, 8, 1)),
        ({"dp_shard": 4}, 8, (2, 4, 1)),
        ({"dp_shard": 1}, 8, (8, 1, 1)),
        ({"dp_shard": 2, "tp": 2}, 8, (2, 2, 2)),
        ({"dp_shard": 1, "tp": 4}, 8, (2, 1, 4)),
        # both given: tp takes it
        ({"dp_shard": 2, "dp_replicate": 2}, 8, (2, 2, 2)),
        ({"dp_shard": 4, "dp_replicate": 1}, 8, (1, 4, 2)),
        ({"dp_shard": 2, "dp_replicate": 4}, 8, (4, 2, 1)),
        # all given
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 8, (2, 2, 2)),
        ({"dp_replicate": 2, "dp_shard": 1, "tp": 2}, 4, (2, 1, 2)),
        ({"dp_replicate": 1, "dp_shard": 1, "tp": 1}, 1, (1, 1, 1)),
        ({"dp_shard": 4, "cp": 1, "sp": 1}, 8, (2, 4, 1)),
        # cp is never inferred, and what it takes is not there for the others
        ({"cp": 2}, 8, (1, 4, 1)),
        ({"cp": 2, "tp": 2}, 4, (1, 1, 2)),
    ],
)
def test_open_sizes_are_inferred(given, world, want):
    config = AutoParallelismConfig.from_dict(given)
    assert sizes(config, world) == want
    assert config.total_size == world
    assert (config.tp_handler is not None) == (config.tp_size > 1)


@pytest.mark.parametrize(
    "given, world, needed",
    [
        ({"tp": 3}, 8, "a multiple of 3"),
        ({"tp": 16}, 8, "16"),
        ({"dp_shard": 3}, 8, "a multiple of 3"),
        ({"tp": 2}, 1, "2"),
        ({"dp_replicate": 2, "dp_shard": 3}, 8, "a multiple of 6"),
        ({"dp_replicate": 1, "dp_shard": 1, "tp": 2}, 4, "2"),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 4, "8"),
    ],
)
def test_sizes_that_do_not_fit_say_how_many_processes_would(given, world, needed):
    config = AutoParallelismConfig.from_dict(given)
    with pytest.raises(ConfigError) as caught:
        config.resolve_sizes(world)
    message = str(caught.value)
    assert ("but there is 1 process." if world == 1 else f"but there are {world} processes.") in message
    assert f"Start {needed} processes" in message
    assert all(f"{axis}_size={size}" in message for axis, size in given.items())


@pytest.mark.parametrize(
    "environment, given, world, want",
    [
        ({"TP": 2}, {}, 8, (1, 4, 2)),
        ({"TP": 2, "DP_SHARD": 2}, {}, 8, (2, 2, 2)),
        ({"TP": 2, "DP_SHARD": 2, "DP_REPLICATE": 2, "CP": 1, "SP": 1}, {}, 8, (2, 2, 2)),
        ({"TP": 2, "DP_SHARD": 1, "DP_REPLICATE": 2}, {}, 4, (2, 1, 2)),
        ({"DP_SHARD": 2, "DP_REPLICATE": 2}, {}, 8, (2, 2, 2)),
        ({"TP": 4}, {"tp": 2}, 8, (1, 4, 2)),  # what is given in Python wins
        ({"TP": 4}, {"dp_shard": 1}, 8, (2, 1, 4)),
    ],
)
def test_sizes_from_the_environment_count_as_given(monkeypatch, environment, given, world, want):
    """Accelerate's launcher writes the parallelism_config section of its file there."""
    for axis, size in environment.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{axis}_SIZE", str(size))
    assert sizes(AutoParallelismConfig.from_dict(given), world) == want


def test_sizes_of_the_environment_that_do_not_fit(monkeypatch):
    for axis, size in {"TP": 2, "DP_SHARD": 2, "DP_REPLICATE": 1}.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{axis}_SIZE", str(size))
    with pytest.raises(ConfigError, match="multiply to 4, but there are 8"):
        AutoParallelismConfig().resolve_sizes(8)


@pytest.mark.parametrize(
    "value, message", [("two", "PARALLELISM_CONFIG_TP_SIZE='two'"), ("", "SIZE=''"), ("0", "tp_size=0")]
)
def test_wrong_size_in_the_environment(monkeypatch, value, message):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", value)
    with pytest.raises(ConfigError, match=message):
        AutoParallelismConfig()


def test_sizes_can_be_inferred_again_for_another_world():
    """What was inferred is not taken for given, for example after a copy into another run."""
    config = AutoParallelismConfig(tp_size=2)
    assert sizes(config, 8) == (1, 4, 2)
    assert sizes(pickle.loads(pickle.dumps(config)), 4) == (1, 2, 2)
    assert sizes(copy.deepcopy(config), 2) == (1, 1, 2)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"plan_order": ("registry", "hf")},
            r"plan_order=\('registry', 'hf'\) with tp_size=1.*or leave plan_order out",
        ),
        (
            {"tp_size": 2, "tp_handler": TorchTensorParallelConfig(enable_async_tp=True)},
            r"enable_async_tp=True.*async_tensor_parallel=True",
        ),
    ],
    ids=["plan_order", "tp_handler"],
)
@pytest.mark.filterwarnings("ignore:Async tensor parallelism")
def test_what_nobody_would_read_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        AutoParallelismConfig(**values).resolve_sizes(2)


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {}], ids=["tp2", "open"])
def test_processes_that_accelerate_has_not_connected(monkeypatch, sizes):
    """torchrun on a CPU without cpu=True: each process would be alone, and train the whole model on its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started.*Accelerator\(cpu=True\)"):
        AutoParallelismConfig(**sizes).get_device_mesh()


def test_one_process_where_several_were_meant():
    """`accelerate launch --cpu --num_processes 2` starts one."""
    with pytest.raises(
        ConfigError, match=r"there is 1 process\. Start 2 processes.*accelerate launch --cpu starts one"
    ):
        AutoParallelismConfig(tp_size=2).get_device_mesh()


# ---- round trips --------------------------------------------------------------------------------------------------


CONFIGS = {
    "empty": lambda: AutoParallelismConfig(),
    "tp": lambda: AutoParallelismConfig(tp_size=2),
    "all_sizes": lambda: AutoParallelismConfig(tp_size=2, dp_shard_size=2, dp_replicate_size=2, cp_size=1, sp_size=1),
    "replicas_and_tp": lambda: AutoParallelismConfig(tp_size=2, dp_shard_size=1, dp_replicate_size=2),
    "plan": lambda: AutoParallelismConfig(tp_size=2, tp_plan=PLAN),
    "path": lambda: AutoParallelismConfig(tp_size=2, tp_plan="my_package.plans:llama"),
    "order": lambda: AutoParallelismConfig(tp_size=2, plan_order=("registry", "hf")),
    "fsdp": lambda: AutoParallelismConfig(reshard_after_forward=False, forward_prefetch=0, backward_prefetch=3),
    "handler": lambda: AutoParallelismConfig(tp_size=4, tp_handler=TorchTensorParallelConfig()),
}


TRIPS: dict[str, Callable[[AutoParallelismConfig], AutoParallelismConfig]] = {
    "dict": lambda c: AutoParallelismConfig.from_dict(c.to_dict()),
    "json_text": lambda c: AutoParallelismConfig.parse(json.dumps(c.to_dict())),
    "to_json": lambda c: AutoParallelismConfig.from_dict(json.loads(json.dumps(c.to_json()))),
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def problem_of_round_trip(name: str, resolved: bool, trip: Callable[..., Any]) -> str | None:
    world = 4 if name == "replicas_and_tp" else 8
    config = CONFIGS[name]()
    if resolved:
        config.resolve_sizes(world)
    before = copy.deepcopy(config.__dict__)
    result = trip(config)
    if config.__dict__ != before:
        return f"the config changed from {before} to {config.__dict__}"
    if type(result) is not AutoParallelismConfig or (not resolved and result != config):
        return f"{result!r} came back for {config!r}"
    config.resolve_sizes(world)
    result.resolve_sizes(world)
    if result != config or result.total_size != world:
        return f"sizes were inferred as {result!r} instead of {config!r}"
    return None


def test_round_trips():
    """An equal config comes back, also when sizes were inferred before, and it infers the same sizes."""
    problems = []
    for trip in TRIPS:
        for resolved in (False, True):
            for name in CONFIGS:
                try:
                    problem = problem_of_round_trip(name, resolved, TRIPS[trip])
                except Exception as error:
                    problem = repr(error)
                if problem is not None:
                    problems.append(f"{name}, {'resolved' if resolved else 'open'}, {trip}: {problem}")
    assert not problems, "\n".join(problems)


def test_each_field_is_compared_between_ranks_or_left_alone_on_purpose():
    own = {option.name for option in options_of(AutoParallelismConfig)}
    assert own - set(compared_values(AutoParallelismConfig())) == {
        "tp_plan",
        "plan_order",
        "loss_chunk_size",
        "verbose",
    }
    assert len(own) == 21


def test_choices_are_compared_as_what_they_mean():
    written = [
        AutoParallelismConfig(audit=True, activation_checkpointing=True, towers="root"),
        AutoParallelismConfig(activation_checkpointing="full", audit="first_step"),
    ]
    assert compared_values(written[0]) == compared_values(written[1])


def test_dict_holds_only_what_differs_from_the_defaults():
    """Open sizes stay open: written as 1 they would no longer be inferred."""
    assert AutoParallelismConfig().to_dict() == {}
    assert AutoParallelismConfig(dp_shard_size=2).to_dict() == {"dp_shard_size": 2}
    result = AutoParallelismConfig(tp_size=2, forward_prefetch=3).to_dict()
    assert result.pop("tp_handler") == dataclasses.asdict(TorchTensorParallelConfig())
    assert result == {"tp_size": 2, "forward_prefetch": 3}


def test_plans_that_json_cannot_hold_become_text():
    """A function becomes its import path, with which the loaded config finds it again; a style object its repr."""
    from hf_automodel_parallel.plan.select import select_plan

    result = AutoParallelismConfig(tp_plan=plan_function).to_dict()
    assert result == {"tp_plan": f"{__name__}:plan_function"}
    loaded = AutoParallelismConfig.from_dict(json.loads(json.dumps(result)))
    assert select_plan(torch.nn.Module(), loaded.tp_plan).entries.keys() == PLAN.keys()
    styles = AutoParallelismConfig(tp_plan={"lm_head": ColwiseParallel()}).to_dict()
    assert json.loads(json.dumps(styles))["tp_plan"]["lm_head"].startswith("ColwiseParallel(")
    json.dumps(AutoParallelismConfig(tp_plan=PlanObject()).to_dict())


def test_copies_keep_a_plan_function_and_pickle_names_it():
    """The Trainer pickles its arguments with every checkpoint: a lambda there must not end the training."""
    for function in (plan_function, lambda model: PLAN, PlanObject()):
        config = AutoParallelismConfig(tp_size=2, tp_plan=function)
        assert callable(copy.deepcopy(config).tp_plan)
        loaded = pickle.loads(pickle.dumps(config))
        assert loaded.tp_size == 2
    assert pickle.loads(pickle.dumps(AutoParallelismConfig(tp_plan=plan_function))).tp_plan is plan_function
    assert "lambda" in pickle.loads(pickle.dumps(AutoParallelismConfig(tp_plan=lambda: PLAN))).tp_plan


def test_a_device_mesh_is_never_copied():
    """It holds process groups, which neither a file nor another process can have."""
    config = AutoParallelismConfig(tp_size=2)
    config.device_mesh = lambda: "not to be copied"
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert copied.device_mesh is None
    assert config.device_mesh is not None


def test_equality():
    config = AutoParallelismConfig(tp_size=2, tp_plan=PLAN)
    assert config == AutoParallelismConfig(tp_size=2, tp_plan=dict(PLAN))
    for other in (
        AutoParallelismConfig(tp_size=4, tp_plan=PLAN),
        AutoParallelismConfig(tp_size=2),
        AutoParallelismConfig(tp_size=2, tp_plan=PLAN, forward_prefetch=2),
        AutoParallelismConfig(tp_size=2, tp_plan=PLAN, plan_order="hf"),
        ParallelismConfig(tp_size=2),
        "tp=2",
    ):
        assert config != other


def test_repr_is_the_dict():
    """One line that shows what was given, so that a log says it."""
    shown = repr(AutoParallelismConfig(tp_size=2, tp_plan="llama", plan_order="hf"))
    assert shown.startswith("AutoParallelismConfig(tp_size=2, ") and shown.endswith(")")
    assert "tp_plan='llama'" in shown and "plan_order=['hf']" in shown
    assert "\n" not in shown and "dp_shard" not in shown


def test_config_goes_wherever_accelerates_own_goes():
    assert isinstance(AutoParallelismConfig(), ParallelismConfig)


# ---- training arguments -------------------------------------------------------------------------------------------


@pytest.fixture
def common(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "parallel.yaml"
    path.write_text("tp: 2\ndp_shard: 2\n")
    return path


WANTED = {"tp_size": 2, "dp_shard_size": 2}


def assert_wanted(arguments):
    assert isinstance(arguments.parallelism_config, AutoParallelismConfig)
    assert arguments.parallelism_config == AutoParallelismConfig(**WANTED)


@pytest.mark.parametrize(
    "value",
    ["tp=2,dp_shard=2", {"tp": 2, "dp_shard_size": 2}, '{"tp": 2, "dp_shard": 2}', AutoParallelismConfig(**WANTED)],
    ids=["pairs", "dict", "json", "config"],
)
def test_arguments_from_python(common, value):
    assert_wanted(AutoParallelTrainingArguments(**common, auto_parallel=value))


@pytest.mark.parametrize("kind", [str, Path])
def test_arguments_from_a_file(common, config_file, kind):
    assert_wanted(AutoParallelTrainingArguments(**common, auto_parallel=kind(config_file)))


@pytest.mark.parametrize("value", ["tp=2,dp_shard=2", "FILE", '{"tp": 2, "dp_shard": 2}'])
@pytest.mark.parametrize("flag", ["--auto_parallel", "--auto-parallel"])
def test_arguments_from_the_command_line(common, config_file, value, flag):
    """The stock parser of the examples, with the flag in both spellings that it offers."""
    value = str(config_file) if value == "FILE" else value
    parser = HfArgumentParser(AutoParallelTrainingArguments)
    line = ["--output_dir", common["output_dir"], "--use_cpu", flag, value]
    (arguments,) = parser.parse_args_into_dataclasses(line)
    assert_wanted(arguments)
    assert "--auto_parallel tp=2" in parser.format_help().replace("\n", " ")


def test_arguments_from_a_yaml_file_of_arguments(common, tmp_path):
    """`HfArgumentParser.parse_yaml_file`: the field is a mapping there."""
    path = tmp_path / "arguments.yaml"
    path.write_text(yaml.safe_dump({**common, "auto_parallel": {"tp": 2, "dp_shard": 2}}))
    (arguments,) = HfArgumentParser(AutoParallelTrainingArguments).parse_yaml_file(str(path))
    assert_wanted(arguments)


def test_without_the_flag_nothing_happens(common):
    arguments = AutoParallelTrainingArguments(**common)
    assert arguments.auto_parallel is None and arguments.parallelism_config is None


def test_mistake_in_the_flag(common):
    with pytest.raises(ConfigError, match=r"unknown field 'tq'.*did you mean 'tp'"):
        AutoParallelTrainingArguments(**common, auto_parallel="tq=2")


FORMS_OF_FLAG = {
    "text": lambda file: "tp=2,dp_shard=2",
    "dict": lambda file: {"tp": 2, "dp_shard": 2},
    "config": lambda file: AutoParallelismConfig(**WANTED),
    "file": str,
    "path": Path,
    "with_plan": lambda file: {"tp": 2, "dp_shard": 2, "tp_plan": PLAN, "plan_order": ["hf"]},
    "open_size": lambda file: "tp=2",
}


@pytest.mark.parametrize("form", FORMS_OF_FLAG)
def test_arguments_survive_json(common, config_file, form):
    """`to_dict` is what the Trainer logs and what other trainers build their arguments from."""
    arguments = AutoParallelTrainingArguments(**common, auto_parallel=FORMS_OF_FLAG[form](config_file))
    values = json.loads(json.dumps(arguments.to_dict()))
    again = AutoParallelTrainingArguments(**values)
    assert again.parallelism_config == arguments.parallelism_config
    assert again.parallelism_config.to_dict() == arguments.parallelism_config.to_dict()
    assert json.loads(json.dumps(again.to_dict())) == values


def test_config_given_as_such_survives_json(common):
    arguments = AutoParallelTrainingArguments(**common, parallelism_config=AutoParallelismConfig(**WANTED))
    values = json.loads(json.dumps(arguments.to_dict()))
    assert values["auto_parallel"] is None
    assert_wanted(AutoParallelTrainingArguments(**values))


def test_arguments_survive_json_after_sizes_were_inferred(common):
    """The flag's open size and the config's inferred one do not contradict each other."""
    arguments = AutoParallelTrainingArguments(**common, auto_parallel="tp=2")
    arguments.parallelism_config.resolve_sizes(8)
    values = json.loads(json.dumps(arguments.to_dict()))
    assert AutoParallelTrainingArguments(**values).parallelism_config.tp_size == 2


@pytest.mark.parametrize("plan", [plan_function, lambda: PLAN, PlanObject(), {"lm_head": ColwiseParallel()}])
def test_arguments_with_a_plan_that_json_cannot_hold(common, plan):
    """Logging and saving the arguments must work with every plan that is accepted."""
    for values in (
        {"auto_parallel": {"tp": 2, "tp_plan": plan}},
        {"parallelism_config": AutoParallelismConfig(tp_plan=plan)},
    ):
        arguments = AutoParallelTrainingArguments(**common, **values)
        assert arguments.parallelism_config.tp_plan is plan
        json.loads(arguments.to_json_string())
        torch.save(arguments, io.BytesIO())
        dataclasses.replace(arguments, learning_rate=1.0)


def test_json_string_and_sanitized_dict_show_the_config(common):
    """What trackers such as TensorBoard log."""
    arguments = AutoParallelTrainingArguments(**common, auto_parallel="tp=2,dp_shard=2")
    shown = json.loads(arguments.to_json_string())
    assert shown["auto_parallel"] == "tp=2,dp_shard=2"
    assert shown["parallelism_config"] == AutoParallelismConfig(**WANTED).to_dict()
    assert "tp_size" in str(arguments.to_sanitized_dict()["parallelism_config"])


@pytest.mark.parametrize("value", ["tp=2,dp_shard=2", {"tp": 2, "dp_shard": 2}], ids=["text", "dict"])
def test_arguments_survive_torch_save(common, value):
    """The Trainer writes training_args.bin with each checkpoint."""
    buffer = io.BytesIO()
    torch.save(AutoParallelTrainingArguments(**common, auto_parallel=value), buffer)
    buffer.seek(0)
    assert_wanted(torch.load(buffer, weights_only=False))


def test_stock_arguments_can_be_saved_with_our_config(common):
    """Door without the flag: the stock class, whose `to_dict` asks the config for its JSON."""
    arguments = TrainingArguments(**common, parallelism_config=AutoParallelismConfig(**WANTED))
    assert json.loads(arguments.to_json_string())["parallelism_config"]["tp_size"] == 2
    torch.save(arguments, io.BytesIO())


@pytest.mark.parametrize(
    "config",
    [
        AutoParallelismConfig(tp_size=4),
        AutoParallelismConfig(tp_size=2, dp_shard_size=4),
        ParallelismConfig(tp_size=2, dp_shard_size=2),
    ],
    ids=["tp", "dp_shard", "stock_class"],
)
def test_contradiction_of_the_two_fields(common, config):
    """Neither wins in silence; Accelerate's own class would not shard as ours does."""
    with pytest.raises(
        ConfigError, match=r"(?s)auto_parallel='tp=2,dp_shard=2' and parallelism_config=.*given and differ"
    ):
        AutoParallelTrainingArguments(**common, auto_parallel="tp=2,dp_shard=2", parallelism_config=config)


def test_the_two_fields_may_agree(common):
    config = AutoParallelismConfig(tp_size=2, dp_shard_size=2, forward_prefetch=3)
    arguments = AutoParallelTrainingArguments(**common, auto_parallel="tp=2,dp_shard=2", parallelism_config=config)
    assert arguments.parallelism_config is config


def test_mixin_may_stand_behind_the_arguments(common):
    """Whose __post_init__ calls no super(): the flag would be accepted, and the run not be parallel."""

    @dataclass
    class Behind(TrainingArguments, AutoParallelArgumentsMixin):
        pass

    @dataclass
    class Further(Behind):
        def __post_init__(self):
            super().__post_init__()

    line = ["--output_dir", common["output_dir"], "--use_cpu", "--auto_parallel", "tp=2,dp_shard=2"]
    for cls in (Behind, Further):
        (arguments,) = HfArgumentParser(cls).parse_args_into_dataclasses(line)
        assert_wanted(arguments)
        assert_wanted(cls(**json.loads(json.dumps(arguments.to_dict()))))
        assert cls(**common).parallelism_config is None
        with pytest.raises(ConfigError, match="given and differ"):
            cls(**common, auto_parallel="tp=2", parallelism_config=AutoParallelismConfig(tp_size=4))


def test_mixin_on_a_class_of_another_library(common, config_file):
    """TRL's arguments have a `__post_init__` of their own, which has to run too."""
    trl = pytest.importorskip("trl")

    @dataclass
    class ParallelSFTConfig(AutoParallelArgumentsMixin, trl.SFTConfig):
        pass

    common = {**common, "bf16": False}
    assert_wanted(ParallelSFTConfig(**common, auto_parallel="tp=2,dp_shard=2"))
    line = ["--output_dir", common["output_dir"], "--use_cpu", "--bf16", "false", "--auto_parallel", str(config_file)]
    (arguments,) = HfArgumentParser(ParallelSFTConfig).parse_args_into_dataclasses(line)
    assert_wanted(arguments)
    assert arguments.bf16 is False
    again = ParallelSFTConfig(**json.loads(json.dumps(arguments.to_dict())))
    assert_wanted(again)
    with pytest.raises(ConfigError, match="both given and differ"):
        ParallelSFTConfig(**common, auto_parallel="tp=2", parallelism_config=AutoParallelismConfig(tp_size=4))


def test_check_optimizer_takes_a_bool():
    with pytest.raises(ConfigError, match="check_optimizer='no'"):
        AutoParallelismConfig(check_optimizer="no")
