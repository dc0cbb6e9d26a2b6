"""Quantised weights that tensor parallelism cannot slice are refused with the method's name."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from hf_automodel_parallel.errors import UnsupportedError
from hf_automodel_parallel.fsdp.quantized import check_quantized


def torchao_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="torchao"))
    return model


def test_a_layout_that_is_not_known_is_refused_under_tensor_parallelism():
    with pytest.raises(UnsupportedError, match="quantised with torchao; .*layout .* is not known.*load_in_4bit=True"):
        check_quantized(torchao_model(), None, tensor_parallel=True, load_on_rank_zero=False)
    check_quantized(torchao_model(), None, tensor_parallel=False, load_on_rank_zero=False)


def test_other_quantised_weights_beside_4_bit_layers_are_refused_by_name():
    model = nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"), nn.Module())
    check_quantized(model, None, tensor_parallel=True, load_on_rank_zero=False)
    model[1].register_parameter("table", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(UnsupportedError, match="1.table is a Parameter of torch.int8 .*4-bit weights of linear layers"):
        check_quantized(model, None, tensor_parallel=True, load_on_rank_zero=False)
    check_quantized(model, None, tensor_parallel=False, load_on_rank_zero=False)
