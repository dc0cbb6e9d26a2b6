"""Functions that exist for users of NeMo AutoModel's parallelizer, and that this package's own steps are built on."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from harness.models import build_model, make_batches
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from hf_automodel_parallel import UnsupportedError, compat
from hf_automodel_parallel.activation_checkpointing import checkpoint_module, is_checkpoint_wrapped
from hf_automodel_parallel.compile import apply_per_layer_compile
from hf_automodel_parallel.core.model_structure import all_frozen, largest_container, model_layers, submodule
from hf_automodel_parallel.parallelizer.import_paths import import_class_from_path, import_classes_from_paths
from hf_automodel_parallel.parallelizer.torch_plans import NamedStyle
from hf_automodel_parallel.parallelizer.tp_mesh import validate_tp_mesh, validate_tp_mesh_for_nemotron_nas
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.selective_checkpointing import apply_selective_activation_checkpointing
from hf_automodel_parallel.tensor_parallel.head_counts import (
    attention_is_head_sharded,
    update_attention_head_counts_for_tp,
)

pytestmark = pytest.mark.core


def mesh(size):
    return SimpleNamespace(size=lambda: size)


def model_with(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


# ---- head counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, field",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_key_value_heads=2"),  # checked first
        ({"num_attention_heads": 6, "num_key_value_heads": None}, "num_attention_heads=6"),
        ({"num_attention_heads": 6}, "num_attention_heads=6"),
        ({"text_config": SimpleNamespace(num_attention_heads=6)}, "num_attention_heads=6"),
    ],
)
def test_heads_that_do_not_divide(config, field):
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match=field):
            validate_tp_mesh(model_with(**config), mesh(4))
    validate_tp_mesh(model_with(**config), mesh(2))
    validate_tp_mesh(model_with(**config), mesh(1))


def test_a_model_that_counts_no_heads_passes():
    validate_tp_mesh(model_with(num_layers=3), mesh(4))
    validate_tp_mesh(nn.Linear(2, 2), mesh(4))


def block(**attention):
    return SimpleNamespace(attention=SimpleNamespace(**attention))


@pytest.mark.parametrize(
    "blocks, message",
    [
        ([block(n_heads_in_group=4, no_op=False)] * 2, None),
        ([block(replace_with_linear=True), block(n_heads_in_group=None, no_op=True)], None),
        ([block(n_heads_in_group=16, no_op=False)] * 2, "=1 does not divide"),
        ([block(n_heads_in_group=None, no_op=False)] * 2, "neither n_heads_in_group nor no_op"),
        ([block(n_heads_in_group=4)], "describes 1 layers"),
    ],
)
def test_nemotron_nas(blocks, message, capsys):
    model = model_with(model_type="nemotron-nas", num_attention_heads=16, num_hidden_layers=2, block_configs=blocks)
    if message is None:
        validate_tp_mesh(model, mesh(2))
    else:
        with pytest.raises(AssertionError, match=message):
            validate_tp_mesh_for_nemotron_nas(model, 2)
    with pytest.raises(AssertionError, match="num_attention_heads=16"):
        validate_tp_mesh(model, mesh(3))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "plan, sharded",
    [
        ({"model.layers.*.self_attn.q_proj": ColwiseParallel()}, True),
        ({"model.layers.*.self_attn.qkv_proj": "packed_colwise"}, True),
        ({"transformer.h.*.attn.q_proj": "colwise"}, True),
        ({"model.layers.*.self_attn.q_proj": ColwiseParallel(use_local_output=False)}, True),
        ({"model.layers.*.self_attn.q_proj": "colwise_gather_output"}, False),
        ({"model.layers.*.self_attn.qkv_proj": RowwiseParallel()}, False),
        ({"model.layers.*.self_attn.q_norm": NamedStyle("replicated_with_grad_allreduce")}, False),
        ({"model.layers.*.mlp.up_proj": ColwiseParallel(), "lm_head": "colwise"}, False),
    ],
)
def test_attention_is_head_sharded(plan, sharded):
    assert attention_is_head_sharded(plan) is sharded


def test_local_head_counts():
    """Those that an attention has, once, and nothing in the config."""
    model = build_model("gptj")
    config = copy.deepcopy(model.config.to_dict())
    update_attention_head_counts_for_tp(model, 1)
    assert {layer.attn.num_attention_heads for layer in model.transformer.h} == {4}
    for _ in range(2):
        update_attention_head_counts_for_tp(model, 2)
        assert {layer.attn.num_attention_heads for layer in model.transformer.h} == {2}
    assert model.config.to_dict() == config
    model = build_model("llama")
    for layer in model.model.layers:
        layer.self_attn.num_heads, layer.self_attn.num_key_value_heads = 4, 2
    update_attention_head_counts_for_tp(model, 2)
    attention = model.model.layers[1].self_attn
    assert (attention.num_heads, attention.num_key_value_heads) == (2, 1)
    with pytest.raises(ValueError, match="num_heads=4 does not divide"):
        update_attention_head_counts_for_tp(build_with_heads(), 3)


def build_with_heads():
    model = build_model("llama")
    model.model.layers[0].self_attn.num_heads = 4
    return model


# ---- layers -------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = VISION | {"vocab_size": 64, "num_key_value_heads": 1, "num_hidden_layers": 3}


def vision_language_model(kind, **values):
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


VLMS = {
    "gemma3": ({"text_config": TEXT, "vision_config": VISION}, {"SiglipEncoderLayer": 2, "Gemma3DecoderLayer": 3}),
    "qwen2_5_vl": (
        {
            "text_config": TEXT,
            "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64},
        },
        {"Qwen2_5_VLVisionBlock": 2, "Qwen2_5_VLDecoderLayer": 3},
    ),
    # lists only the attentions of its vision tower as not to be split
    "smolvlm": (
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION},
        {"SmolVLMEncoderLayer": 2, "LlamaDecoderLayer": 3},
    ),
    # lists nothing of its vision tower
    "got_ocr2": (
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"output_channels": 16, "mlp_dim": 64, "global_attn_indexes": [1]},
        },
        {"GotOcr2VisionLayer": 2, "Qwen2DecoderLayer": 3},
    ),
}


@pytest.mark.parametrize("kind", VLMS)
def test_layers_of_both_towers(kind):
    values, want = VLMS[kind]
    layers = model_layers(vision_language_model(kind, **values))
    counts = {}
    for layer in layers:
        counts[type(layer).__name__] = counts.get(type(layer).__name__, 0) + 1
    assert counts == want


def stage(model, kept):
    """What pipeline splitting leaves: layers in a ModuleDict, by their old numbers."""
    model.model.layers = nn.ModuleDict({str(index): model.model.layers[index] for index in kept})
    return model


def test_layers_of_a_pipeline_stage():
    model = build_model("llama", num_hidden_layers=4)
    want = list(model.model.layers)[2:]
    assert model_layers(stage(model, [2, 3])) == want


class Plain(nn.Module):
    def __init__(self, **containers):
        super().__init__()
        for name, container in containers.items():
            setattr(self, name, container)


def linears(count):
    return [nn.Linear(2, 2) for _ in range(count)]


def test_layers_of_a_model_that_says_nothing():
    layers, experts = linears(2), linears(5)
    inner = Plain(layers=nn.ModuleList(layers), experts=nn.ModuleList(experts))
    assert model_layers(Plain(model=inner)) == layers  # where they usually are, whatever is larger
    assert model_layers(inner) == layers
    assert model_layers(Plain(blocks=nn.ModuleDict({"0": layers[0], "7": layers[1]}))) == layers
    assert model_layers(Plain(blocks=nn.ModuleList(layers), more=nn.ModuleList(experts))) == experts


def test_largest_container():
    small, large = nn.ModuleList(linears(2)), nn.ModuleDict({str(i): m for i, m in enumerate(linears(3))})
    named = nn.ModuleDict({f"head{i}": m for i, m in enumerate(linears(9))})
    assert largest_container(Plain(small=small, large=large, named=named)) is large
    assert largest_container(Plain(named=named, empty=nn.ModuleList())) is None


def test_a_model_without_layers(capsys):
    with pytest.raises(ValueError, match="Linear has no repeated layers"):
        model_layers(nn.Linear(2, 2))
    assert capsys.readouterr().out == ""


def test_small_helpers():
    model = build_model("llama")
    assert submodule(model, "model.layers.1") is model.model.layers[1]
    assert submodule(model, "") is model
    for path in ("model.layers.9", "nothing.here", "config", "model.norm.weight"):
        assert submodule(model, path) is None
    assert not all_frozen(model) and not all_frozen(nn.ReLU())
    assert all_frozen(model.model.norm.requires_grad_(False))
    assert compat.is_transformers_v5_or_higher()
    layer = model.model.layers[0]
    assert not is_checkpoint_wrapped(layer)
    assert is_checkpoint_wrapped(checkpoint_wrapper(layer))
    checkpoint_module(layer)
    assert is_checkpoint_wrapped(layer)


def test_gemma4_is_one_class():
    assert compat.gemma4_class() is compat.gemma4_class()
    assert compat.gemma4_class() is getattr(transformers, "Gemma4ForConditionalGeneration", compat.gemma4_class())
    assert isinstance(compat.gemma4_class(), type)


# ---- imports ------------------------------------------------------------------------------------------------------


def test_import_by_path():
    assert import_class_from_path("torch.optim.AdamW") is torch.optim.AdamW
    assert import_class_from_path("torch.nn:Linear") is nn.Linear
    assert import_class_from_path("collections.OrderedDict.fromkeys")
    assert import_classes_from_paths(["torch.nn.Linear", "torch.nn.ReLU"]) == [nn.Linear, nn.ReLU]
    assert import_classes_from_paths([]) == []
    for path, error in (
        ("torch.nn.Nothing", AttributeError),
        ("no_such_package.X", ImportError),
        ("Linear", ValueError),
    ):
        with pytest.raises(error):
            import_class_from_path(path)


@pytest.mark.parametrize(
    "paths, message", [(None, "class_paths=None"), (["torch.nn.Linear", "torch.nn.Linaer"], "Linaer")]
)
def test_imports_that_fail(paths, message, capsys):
    with pytest.raises(ValueError, match=message):
        import_classes_from_paths(paths)
    assert capsys.readouterr().out == ""


# ---- compilation --------------------------------------------------------------------------------------------------


def test_hash_guard_can_be_taken_back():
    original = DTensorSpec._hash_impl
    spec = SimpleNamespace(mesh="mesh", placements=("p",), _hash_key=lambda: ([],))  # like a SymInt, a list has no hash
    try:
        compat.hash_specs_of_symbolic_shapes()
        compat.hash_specs_of_symbolic_shapes()
        assert DTensorSpec._hash_impl(spec) == hash(("mesh", ("p",)))
    finally:
        compat.restore_spec_hash()
    assert DTensorSpec._hash_impl is original
    compat.restore_spec_hash()
    with pytest.raises(TypeError):
        hash(([],))


def reentrant(layer):
    return checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)


def with_wrappers(model, wrap):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)


def parts(model):
    for layer in model.model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)


CHECKPOINTS = {
    "none": lambda model: None,
    "ours": lambda model: [checkpoint_module(layer) for layer in model.model.layers],
    "ours, selective": apply_selective_activation_checkpointing,
    "torch's": lambda model: with_wrappers(model, checkpoint_wrapper),
    "parts": parts,
    "torch's, reentrant around": lambda model: with_wrappers(model, reentrant),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_per_layer_compile(kind):
    """Every layer is compiled once, whatever is around it; names, checkpoints and gradients stay."""
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph

    model, reference = build_model("llama"), build_model("llama")
    CHECKPOINTS[kind](model)
    names = [name for name, _ in model.named_parameters()]
    wrapped = [is_checkpoint_wrapped(layer) for layer in model_layers(model)]
    try:
        apply_per_layer_compile(model, backend=backend)
        apply_per_layer_compile(model, backend=backend)
    finally:
        compat.restore_spec_hash()
    assert [name for name, _ in model.named_parameters()] == names
    if kind != "ours, selective":  # which is inside of what is compiled
        assert [is_checkpoint_wrapped(layer) for layer in model_layers(model)] == wrapped
    batch = make_batches(1, 2, 8, 128, 3)[0]
    for m in (model, reference):
        m(**batch, use_cache=False).loss.backward()
    assert counted
    for p, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, want.grad, atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


def test_reentrant_checkpoints_inside_of_a_layer_are_refused():
    model = build_model("llama")
    for layer in model.model.layers:
        layer.mlp = reentrant(layer.mlp)
    try:
        with pytest.raises(UnsupportedError, match="reentrant"):
            apply_per_layer_compile(model)
    finally:
        compat.restore_spec_hash()


def test_nothing_to_compile():
    try:
        with pytest.raises(UnsupportedError, match="no repeated layers"):
            apply_per_layer_compile(nn.Linear(2, 2))
    finally:
        compat.restore_spec_hash()


def test_heads_are_counted_locally_where_the_plan_shards_them():
    """By the resolved plan: the attention whose projections are sharded, not the one whose output is gathered."""
    model = build_model("llama")
    for layer in model.model.layers:
        layer.self_attn.num_heads = 4
    plan = {
        "model.layers.0.self_attn.q_proj": ColwiseParallel(),
        "model.layers.1.self_attn.q_proj": "colwise_gather_output",
        "model.layers.1.mlp.up_proj": "colwise",
    }
    counts = resolve(model, select_plan(model, plan), 2).head_counts
    assert {name: values["num_heads"] for name, values in counts.items()} == {"model.layers.0.self_attn": 2}
