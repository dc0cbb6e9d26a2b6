"""Equal layers are run on fake tensors once; layers that may differ are run one by one."""

import copy

import torch
from sweep.tiny import build
from torch import nn

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.core.sharding_spec import OutputHook
from hf_automodel_parallel.plan.analysis.sequence_parallel import derive
from hf_automodel_parallel.plan.analysis.varying_check import complete
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan

LAYERS = 4


class Counting(nn.SiLU):
    """An activation function that counts its calls in all layers."""

    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


class OfIndex(Counting):
    """In one layer it combines features, which are sharded."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x):
        return super().forward(x).softmax(-1) if self.layer_idx == 2 else super().forward(x)


class Changing(Counting):
    """It changes the layer."""

    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)


def changed(kind):
    model = build("llama", num_hidden_layers=LAYERS)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = kind(index) if kind is OfIndex else kind()
    return model


def planned(model):
    plan = select_plan(model, None)
    spec = resolve(model, plan, 2)
    layers = find_structure(model).layers
    Counting.calls = 0
    complete(model, spec, layers, 2, plan.strict)
    calls = [Counting.calls]
    derive(model, spec, layers)
    return spec, [*calls, Counting.calls - calls[0]]


def test_equal_layers_are_run_once_and_planned_alike():
    spec, calls = planned(changed(Counting))
    assert calls == [1, 1]
    for table in (spec.parameters, spec.modules, spec.varying, spec.sequence.blocks):
        of_layers = [
            {
                name.partition(f"layers.{index}.")[2]: value
                for name, value in table.items()
                if f"layers.{index}." in name
            }
            for index in range(LAYERS)
        ]
        assert of_layers[0] and of_layers.count(of_layers[0]) == LAYERS
    reduced = [name for name, hooks in spec.modules.items() if hooks.output is OutputHook.REDUCE_SCATTER_SEQUENCE]
    assert len(reduced) == 2 * LAYERS


def test_layer_that_reads_its_index_is_run_for_itself():
    model = changed(OfIndex)
    spec, calls = planned(model)
    assert calls[0] >= LAYERS
    assert [note.partition(" ")[0] for note in spec.notes if "is replicated" in note] == ["model.layers.2.mlp"]
    assert "model.layers.2.mlp.up_proj.weight" not in spec.parameters
    assert "model.layers.1.mlp.up_proj.weight" in spec.parameters


def test_layer_that_changes_itself_is_run_for_itself():
    assert planned(changed(Changing))[1] == [LAYERS, LAYERS]


def test_one_different_layer_is_run_for_itself():
    model = changed(Counting)
    model.model.layers[2].mlp.register_buffer("scale", torch.ones(1))
    _, calls = planned(model)
    assert calls == [2, 2]


def test_model_is_only_read():
    model = changed(Counting)
    model.gradient_checkpointing_enable()
    before = [(name, type(module), copy.copy(vars(module))) for name, module in model.named_modules()]
    planned(model)
    assert before == [(name, type(module), vars(module)) for name, module in model.named_modules()]
