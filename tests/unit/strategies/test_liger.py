"""Liger's fused loss beside a sharded head: refused by name. Liger itself needs a GPU; its mark on a model does not."""

import types
from types import SimpleNamespace

import pytest
from harness.models import build_model, lora

from hf_automodel_parallel import UnsupportedError
from hf_automodel_parallel.fsdp.options import ShardingOptions
from hf_automodel_parallel.strategies.default import DefaultParallelizationStrategy


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["plain", "lora"])
def test_fused_loss_is_refused_under_tensor_parallelism_only(wrap):
    model = build_model("llama")

    def lce_forward(self, *args, **kwargs):
        raise AssertionError("not called")

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = types.MethodType(lce_forward, model)
    job = SimpleNamespace(
        model=wrap(model),
        tp_mesh=object(),
        load_on_rank_zero=False,
        pending=None,
        fsdp=ShardingOptions(),
        sums_after_backward=False,
    )
    with pytest.raises(UnsupportedError, match="use_liger_kernel=True .*use_liger_kernel=False"):
        DefaultParallelizationStrategy().check_model(job)
    job.tp_mesh = None
    DefaultParallelizationStrategy().check_model(job)


def test_a_plain_model_passes():
    DefaultParallelizationStrategy().check_model(
        SimpleNamespace(
            model=build_model("llama"),
            tp_mesh=object(),
            load_on_rank_zero=False,
            pending=None,
            fsdp=ShardingOptions(),
            sums_after_backward=False,
        )
    )
