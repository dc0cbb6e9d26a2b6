"""transformers' DistributedConfig is translated field by field, or refused with the field and what to do instead."""

import copy
import inspect
import pickle

import pytest
from harness.models import build_model
from transformers.distributed import DistributedConfig

from hf_automodel_parallel import AutoParallelismConfig, ConfigError

FIELDS = set(inspect.signature(DistributedConfig).parameters)


def test_sizes():
    config = AutoParallelismConfig.from_distributed_config(
        {"tp_size": 2, "fsdp_size": 4, "dp_replicate_size": 2, "enable_sequence_parallel": True, "tp_plan": "auto"}
    )
    assert (config.tp_size, config.dp_shard_size, config.dp_replicate_size) == (2, 4, 2)
    assert config.sequence_parallel and config.tp_plan is None


def test_sizes_that_are_not_given_are_not_inferred():
    config = AutoParallelismConfig.from_distributed_config({"tp_size": 2})
    with pytest.raises(ConfigError, match="multiply to 2, but there are 8 processes"):
        config.resolve_sizes(8)


def test_fields_of_ours_go_with_it():
    config = AutoParallelismConfig.from_distributed_config({"tp_size": 2}, dp_shard_size=4, compile=True)
    assert (config.tp_size, config.dp_shard_size, config.compile) == (2, 4, True)


def test_a_changed_plan_keeps_the_other_entries():
    model = build_model("llama")
    config = AutoParallelismConfig.from_distributed_config(
        {"tp_size": 2, "tp_plan": {"model.layers.*.mlp.up_proj": "replicate"}}
    )
    plan = config.tp_plan(model)
    assert plan == {**model.tp_plan, "model.layers.*.mlp.up_proj": "replicate"} and len(plan) > 6
    assert pickle.loads(pickle.dumps(config)).tp_plan(model) == plan == copy.deepcopy(config).tp_plan(model)


def test_an_object():
    """Of the installed release, whatever fields it has."""
    if "tp_size" not in FIELDS:  # before 5.23
        with pytest.raises(ConfigError, match="enable_expert_parallel=True: tp_size gives each rank a slice"):
            AutoParallelismConfig.from_distributed_config({"enable_expert_parallel": True})
        return
    config = AutoParallelismConfig.from_distributed_config(DistributedConfig(tp_size=2, fsdp_size=2))
    assert (config.tp_size, config.dp_shard_size, config.dp_replicate_size) == (2, 2, 1)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("pp_size", 2, "no pipeline parallelism"),
        ("ep_size", 2, "slice of every expert"),
        ("enable_expert_parallel", True, "slice of every expert"),
        ("fsdp_cpu_offload", True, "cpu_offload=True"),
        ("fsdp_mixed_precision", True, "mixed_precision='bf16'"),
        ("fsdp_plan", {"model.layers.*": "fsdp"}, "transformer_cls_names_to_wrap"),
        ("ep_implementation", "all_to_all", "slice of every expert"),
        ("tp_plan", {}, "tp_size=1"),
        ("fdsp_size", 2, "not a field of it"),
    ],
)
def test_what_has_no_equal_is_refused(field, value, remedy):
    with pytest.raises(ConfigError, match=f"{field}=.*: .*{remedy}"):
        AutoParallelismConfig.from_distributed_config({"tp_size": 2, field: value})


def test_something_else():
    with pytest.raises(ConfigError, match="not int: 3"):
        AutoParallelismConfig.from_distributed_config(3)


def test_every_field_of_the_installed_release_is_known():
    from hf_automodel_parallel.accelerate_plugin import distributed_config

    assert FIELDS <= set(distributed_config._known())
