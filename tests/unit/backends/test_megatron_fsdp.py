"""megatron-fsdp: units, options, versions and configs."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from harness.training import LORA, build

from hf_automodel_parallel import AutoParallelismConfig, ConfigError, UnsupportedError
from hf_automodel_parallel.backends import megatron_fsdp as megatron
from hf_automodel_parallel.backends.megatron_fsdp import engine
from hf_automodel_parallel.backends.megatron_fsdp.accelerate import check_elementwise
from hf_automodel_parallel.backends.megatron_fsdp.options import MegatronOptions
from hf_automodel_parallel.backends.megatron_fsdp.strategy import unit_classes


def test_default_units_are_the_layers_and_misspelt_ones_are_refused():
    model = build("llama", LORA)
    assert [cls.__name__ for cls in unit_classes(model, None)] == ["LlamaDecoderLayer"]
    path = "transformers.models.llama.modeling_llama.LlamaDecoderLayer"
    for given in (path, "LlamaDecoderLayer", type(model.base_model.model.model.layers[0])):
        assert unit_classes(model, (given,)) == unit_classes(model, None)
    assert unit_classes(torch.nn.Linear(2, 2), None) == [torch.nn.Linear]
    with pytest.raises(ConfigError, match="LlamaDecoderLayr.*did you mean LlamaDecoderLayer"):
        unit_classes(model, (path.removesuffix("er") + "r",))


def test_every_option_reaches_an_argument_of_the_installed_version():
    import inspect

    import megatron_fsdp

    known = inspect.signature(megatron_fsdp.fully_shard_model).parameters
    plain = engine.translate(MegatronOptions(), [torch.nn.Linear], True)
    assert plain.keys() <= known.keys()
    assert plain["mixed_precision_policy"] == megatron_fsdp.MixedPrecisionPolicy(main_params_dtype=None)
    changed: dict[str, Any] = {
        "megatron_fsdp_unit_modules": (torch.nn.Embedding,),
        "zero_dp_strategy": "optim",
        **{f.name: not f.default for f in dataclasses.fields(MegatronOptions) if isinstance(f.default, bool)},
        "average_in_collective": False,
    }
    effects = {}
    for name, value in changed.items():
        options = MegatronOptions(
            **({"zero_dp_strategy": 1, name: value} if name != "zero_dp_strategy" else {name: value})
        )
        units = list(options.megatron_fsdp_unit_modules or [torch.nn.Linear])
        base = engine.translate(
            MegatronOptions(zero_dp_strategy=1 if name != "zero_dp_strategy" else 3), [torch.nn.Linear], False
        )
        result = engine.translate(options, units, False)
        effects[name] = [key for key in base if base[key] != result[key]]
    assert [len(keys) for name, keys in effects.items() if name != "average_in_collective"] == [1] * (len(changed) - 1)
    assert effects["preserve_fp32_weights"] == effects["grad_reduce_in_fp32"] == ["mixed_precision_policy"]
    assert effects["check_for_nan_in_grad"] == ["report_nan_in_param_grad"]
    assert effects["init_fsdp_with_meta_device"] == ["init_model_with_meta_device"]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_fsdp", None)
    assert megatron.HAVE_MEGATRON_FSDP is False
    with pytest.raises(ConfigError, match=r"megatron-fsdp.*pip install 'hf-automodel-parallel\[megatron\]'"):
        engine.load()


def test_other_versions_are_refused(monkeypatch):
    import megatron_fsdp

    for version in ("0.4.0", "0.7.0"):
        monkeypatch.setattr(megatron_fsdp, "__version__", version)
        with pytest.raises(UnsupportedError, match=f"megatron-fsdp {version} is installed"):
            engine.load()


def test_config():
    config = AutoParallelismConfig.parse({"backend": "megatron_fsdp", "megatron_fsdp": {"zero_dp_strategy": 2}})
    assert AutoParallelismConfig.from_dict(config.to_dict()).megatron_fsdp == {"zero_dp_strategy": 2}
    with pytest.raises(ConfigError, match="'zero_dp_strategie'.*did you mean 'zero_dp_strategy'"):
        AutoParallelismConfig(backend="megatron_fsdp", megatron_fsdp={"zero_dp_strategie": 2})
    with pytest.raises(ConfigError, match="did you mean 'megatron_fsdp'"):
        AutoParallelismConfig(backend="megatron-fsdp")
    with pytest.raises(ConfigError, match="is an option of backend='megatron_fsdp' alone"):
        AutoParallelismConfig(megatron_fsdp={})
    with pytest.raises(ConfigError, match="forward_prefetch=3 is an option of backend='fsdp2'"):
        AutoParallelismConfig(backend="megatron_fsdp", forward_prefetch=3)


def test_optimizers_that_are_not_elementwise_are_refused():
    names, shapes = [[["a", "b"]]], {"a": torch.Size((8, 8)), "b": torch.Size((8,))}
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes.values()]
    for optimizer in (torch.optim.AdamW(parameters), torch.optim.SGD(parameters, momentum=0.9)):
        check_elementwise([optimizer], names, shapes)
    with pytest.raises(UnsupportedError, match="Muon needs a statistic over whole parameters"):
        check_elementwise([torch.optim.Muon(parameters[:1])], [[["a"]]], shapes)
