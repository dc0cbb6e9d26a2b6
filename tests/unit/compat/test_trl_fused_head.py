"""The forward of TRL's fused head with another kernel: TRL's module and other models stay as they are."""

from __future__ import annotations

import inspect
import logging
import types
from typing import Any

import pytest
import torch
from harness.training import batches_for, build

from hf_automodel_parallel import compat
from hf_automodel_parallel.tensor_parallel.vocab_parallel.fused_head import keep_fused_head_sharded

trl_utils = pytest.importorskip("trl.trainer.utils")


def fused_model() -> Any:
    model = build("llama")
    trl_utils.add_fused_lm_head(model)
    return model


class Refusing:
    """A kernel that remembers what it was given."""

    def apply(self, *args: Any) -> Any:
        self.args = args
        raise RuntimeError("no statistics here")


@pytest.mark.both_ends
def test_another_kernel_is_called_for_one_model_alone():
    model, other, kernel = fused_model(), fused_model(), Refusing()
    head = compat.TRLFusedHead.of(model)
    assert head is not None
    model.forward = head.with_kernel(kernel)
    batch = batches_for(model, 1)[0]
    with pytest.raises(RuntimeError, match="no statistics here"):
        model(**batch, fused_lm_head=True)
    assert kernel.args[1] is model.lm_head.weight
    assert other(**batch, fused_lm_head=True).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    # generate() checks its arguments against it
    assert inspect.signature(model.forward) == inspect.signature(build("llama").forward)


@pytest.mark.both_ends
def test_the_kernel_has_the_arguments_that_are_known(caplog):
    model = fused_model()
    with caplog.at_level(logging.WARNING):
        keep_fused_head_sharded(model, None, None)  # type: ignore[arg-type]
    assert not caplog.records
    assert compat.TRLFusedHead.of(model) is None, "it has our kernel, and a second call would change nothing"


def test_other_forwards_are_left_alone_and_unknown_arguments_said(monkeypatch, caplog):
    model = build("llama")
    assert compat.TRLFusedHead.of(model) is None
    model.forward = types.MethodType(lambda self, **given: given, model)
    assert compat.TRLFusedHead.of(model) is None

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, something_new: Any) -> Any: ...

    model = fused_model()
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Kernel)
    forward = model.forward
    keep_fused_head_sharded(model, None, None)  # type: ignore[arg-type]
    assert model.forward == forward
    assert "takes hidden, weight, something_new here" in caplog.text
