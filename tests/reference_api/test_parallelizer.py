"""The reference API as a whole: every name with its signature, and the long functions without an Accelerator."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.models import build_model
from harness.oracle import loss_and_grads
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, trainable
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import parallelizer
from hf_automodel_parallel.core.mesh import MeshAxes
from hf_automodel_parallel.fsdp.recursive import apply_fsdp2_sharding_recursively
from hf_automodel_parallel.parallelizer import fsdp2_strategy_parallelize
from reference_api.names import NAMES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference_api.md"

NO_CAST = MixedPrecisionPolicy()


# ---- names ---------------------------------------------------------------------------------------------------------


def found(name: str) -> Any:
    value: Any = parallelizer
    for part in name.split("."):
        value = getattr(value, part)
    return value


def signature_problems(name: str) -> list[str]:
    kind, parameters = NAMES[name]
    value = found(name)
    if kind == "class":
        return [] if inspect.isclass(value) else [f"{name} is not a class"]
    if kind != "function":
        return []
    mine = {k: p for k, p in inspect.signature(value).parameters.items() if k != "self"}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    problems = []
    if [k for k in mine if k in parameters] != [k for k in parameters if k in mine]:
        problems.append(f"{name} has its parameters in the order {list(mine)}")
    for key, default in parameters.items():
        if key == "**kwargs":
            if not takes_any and len(mine) <= len(parameters) - 1:
                problems.append(f"{name} takes no further keywords")
        elif key not in mine:
            if not takes_any:
                problems.append(f"{name} does not take {key}")
        elif (
            mine[key].default is not inspect.Parameter.empty if default is None else repr(mine[key].default) != default
        ):
            problems.append(f"{name} has the default {mine[key].default!r} for {key}")
    extra = [k for k, p in mine.items() if k not in parameters and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return problems + ([f"{name} has further required parameters: {extra}"] if extra else [])


@pytest.mark.core
def test_every_name_has_its_signature():
    problems = [problem for name in NAMES for problem in signature_problems(name)]
    assert len(NAMES) > 40 and not problems, "\n".join(problems)


@pytest.mark.core
def test_every_name_has_a_row_in_the_documentation():
    rows = re.findall(r"^\| `([\w.]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in NAMES if name not in rows] == []
    assert len(rows) == len(set(rows))


@pytest.mark.core
def test_every_row_names_a_test_that_exists():
    root = Path(__file__).resolve().parents[2]
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert named
    for path, function in named:
        source = (root / path).read_text(encoding="utf-8")
        assert not function or f"def {function}" in source, f"{path}::{function}"


# ---- without an Accelerator ----------------------------------------------------------------------------------------


def raw_loop(adapter: Any, shape: dict[str, int], parts: int = 1, from_meta: bool = False, **arguments: Any) -> Any:
    """Loss, gradients, their norm: what a loop sees that knows nothing of tensor parallelism."""
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    model = build("llama", adapter)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if from_meta:
        buffers = dict(model.named_buffers())
        model = model.to("meta")
    assert fsdp2_strategy_parallelize(model, mesh, **{"mp_policy": NO_CAST, **arguments}) is model
    if from_meta:
        model.to_empty(device="cpu")
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        with torch.no_grad():
            for name, p in model.named_parameters():
                place = torch.distributed.tensor.distribute_tensor(weights[name], p.device_mesh, p.placements)
                p.copy_(place)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    names = mesh.mesh_dim_names
    data = [name for name in names if name not in (arguments.get("tp_mesh_name", "tp"), "cp", "pp")]
    sizes = [mesh[name].size() for name in data]
    place = 0
    for name, size in zip(data, sizes, strict=True):
        place = place * size + mesh[name].get_local_rank()
    ranks = torch.tensor(sizes).prod().item()
    batches = batches_for(model, parts * ranks)
    total = torch.zeros(())
    for part in range(parts):
        loss = model(**batches[part * ranks + place], use_cache=False).loss / parts
        loss.backward()
        total += loss.detach()
    gradients = full_grads(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    dist.all_reduce(total)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return total.item() / dist.get_world_size(), gradients, norm.item()


def check_raw_loop(world: int, adapter: Any, shape: dict[str, int], parts: int = 1, **arguments: Any) -> None:
    loss, gradients, norm = run_distributed(world, raw_loop, adapter, shape, parts, **arguments)[0]
    reference = build("llama", adapter)
    ranks = world // shape.get("tp", shape.get("model", 1))
    want_loss, want = loss_and_grads(reference, batches_for(reference, parts * ranks))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    want_norm = nn.utils.get_total_norm([g for g in want.values() if g is not None]).item()
    assert norm == pytest.approx(want_norm, rel=1e-5)


FULL_MESH = {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_loop_of_ones_own(adapter):
    """Two backwards a step, torch's own clipping: partial gradients are complete at the end of each backward."""
    check_raw_loop(4, adapter, FULL_MESH, parts=2, activation_checkpointing=True)


def test_axes_by_other_names():
    names = {"tp_mesh_name": "model", "dp_shard_cp_mesh_name": "data"}
    check_raw_loop(4, LORA, {"data": 2, "model": 2}, **names, activation_checkpointing="selective")


@pytest.mark.core
def test_tensor_parallel_alone():
    check_raw_loop(2, None, {"dp_shard": 1, "tp": 2}, enable_fsdp2_prefetch=False, reshard_after_forward=False)


def test_replicas():
    check_raw_loop(4, None, {"dp_replicate": 2, "dp_shard": 2, "tp": 1}, fsdp2_backward_prefetch_depth=1)


def test_a_model_from_the_meta_device():
    check_raw_loop(4, LORA, FULL_MESH, from_meta=True)


@pytest.mark.core_cases("tp", "plan")
@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"tp_mesh_name": "model"}, "tp_mesh_name='model': the device mesh has no such axis, only dp_shard, tp"),
        ({"dp_shard_cp_mesh_name": "data"}, "dp_shard_cp_mesh_name='data': the device mesh has no such axis"),
        ({"dp_replicate_mesh_name": "copies"}, "dp_replicate_mesh_name='copies': the device mesh has no such axis"),
        ({"activation_checkpointing": "sometimes"}, "activation_checkpointing='sometimes': give True, False or one of"),
        ({"tp_shard_plan": {"model.layers.*.mlp.up": "colwise"}}, "match no module or parameter"),
    ],
    ids=["tp", "shard", "replicate", "checkpointing", "plan"],
)
def test_what_cannot_be_honoured_is_refused(arguments, match):
    expect_error(2, raw_loop, None, {"dp_shard": 1, "tp": 2}, **arguments, match=match)


def test_an_axis_that_nothing_is_reduced_over_is_refused():
    """Replicas along it would drift apart without a word."""
    shape = {"replicate": 2, "dp_shard": 1, "model": 2}
    expect_error(
        4, raw_loop, None, shape, match=r"nothing would be reduced over: replicate \(2 ranks\), model \(2 ranks\)"
    )
    shape = {"dp_shard": 1, "cp": 2, "tp": 2}
    expect_error(4, raw_loop, None, shape, dp_shard_cp_mesh_name="dp_shard", match=r"reduced over: cp \(2 ranks\)")


class Plain(parallelizer.ParallelizationStrategy):
    """Takes two arguments alone."""

    def parallelize(self, model: Any, device_mesh: Any) -> Any:
        return model


@pytest.mark.core
def test_a_strategy_need_not_take_every_argument(monkeypatch):
    monkeypatch.setitem(parallelizer.PARALLELIZATION_STRATEGIES, "Linear", Plain())
    model = nn.Linear(2, 2)
    assert fsdp2_strategy_parallelize(model, object()) is model
    with pytest.raises(ValueError, match="sequence_parallel=True cannot be honoured: Plain.parallelize"):
        fsdp2_strategy_parallelize(model, object(), sequence_parallel=True)


@pytest.mark.core
@pytest.mark.parametrize("word", ["none", "off", "OFF", False, None])
def test_words_that_switch_checkpointing_off(word):
    from hf_automodel_parallel.activation_checkpointing import mode_of_argument

    assert mode_of_argument(word) == "none"
    assert [mode_of_argument(mode) for mode in ("Selective", "sub-module", "sub_module")] == [
        "selective",
        *["submodule"] * 2,
    ]
    assert mode_of_argument(True) == "full"


@pytest.mark.core
def test_every_argument_reaches_the_strategy(monkeypatch):
    """With stand-ins: no process group, no mesh, no model."""
    seen: dict[str, Any] = {}

    class Recording(parallelizer.ParallelizationStrategy):
        def parallelize(self, **arguments: Any) -> Any:
            seen.update(arguments)
            return "the model"

    monkeypatch.setitem(parallelizer.PARALLELIZATION_STRATEGIES, "Linear", Recording())
    arguments = {name: object() for name in inspect.signature(fsdp2_strategy_parallelize).parameters if name != "model"}
    model = nn.Linear(2, 2)
    assert fsdp2_strategy_parallelize(model, **arguments) == "the model"
    assert seen == {"model": model, **arguments}


# ---- pipeline parallelism ------------------------------------------------------------------------------------------


def stages(reshard: Any = None) -> Any:
    """Two stages with different models; what the units do after forward, and the gradients of each stage's own part."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp_shard", "tp"))
    stage = mesh["pp"].get_local_rank()
    model = build("llama", num_hidden_layers=2 + stage)
    fsdp2_strategy_parallelize(model, mesh, mp_policy=NO_CAST, reshard_after_forward=reshard)
    loss = model(**batches_for(model, 1)[0], use_cache=False).loss
    loss.backward()
    return stage, loss.item(), full_grads(model)


def test_stages_of_a_pipeline_hold_different_models():
    for stage, loss, gradients in run_distributed(4, stages):
        reference = build("llama", num_hidden_layers=2 + stage)
        want_loss, want = loss_and_grads(reference, batches_for(reference, 1))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


def resharding(shape: dict[str, int], reshard: Any, recursive: bool) -> list[bool]:
    """Whether each layer is freed after forward."""
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    model = build("llama", num_hidden_layers=3)
    if recursive:
        apply_fsdp2_sharding_recursively(model, mesh["dp_shard"], NO_CAST, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh["dp_shard"])
    else:
        fsdp2_strategy_parallelize(model, mesh, mp_policy=NO_CAST, reshard_after_forward=reshard)
    model(**batches_for(model, 1)[0], use_cache=False)
    return [not isinstance(layer.self_attn.q_proj.weight, DTensor) for layer in model.model.layers]


@pytest.mark.parametrize("recursive", [False, True], ids=["strategy", "recursive"])
def test_no_resharding_under_pipeline_parallelism(recursive):
    """The pipeline axis is one of the root mesh; the reference looks for it in the data-parallel part, where it never
    is.
    """
    pipeline = {"pp": 2, "dp_shard": 2}
    assert run_distributed(4, resharding, pipeline, None, recursive)[0] == [True, True, True]
    assert run_distributed(4, resharding, pipeline, True, recursive)[0][:2] == [False, False]
    assert run_distributed(2, resharding, {"dp_shard": 2}, None, recursive)[0] == [False, False, True]


# ---- recursively ---------------------------------------------------------------------------------------------------


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))


class Tree(nn.Module):
    """Lists in lists, a dict, and a tower that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList(
            [nn.ModuleList([Layer(), Layer()]), nn.ModuleDict({"0": Layer(), "1": Layer()}), Layer()]
        )
        self.vision = Tower(2)
        self.audio_tower = Tower(2)
        self.audio_tower.requires_grad_(False)


def recorded(module: nn.Module, mesh: Any, **arguments: Any) -> list[tuple[str, bool]]:
    names = {child: name for name, child in module.named_modules()}
    calls: list[tuple[str, bool]] = []

    def fake(unit: nn.Module, *, mesh: Any, mp_policy: Any, offload_policy: Any, reshard_after_forward: bool) -> None:
        calls.append((names[unit], reshard_after_forward))

    apply_fsdp2_sharding_recursively(module, mesh, None, fully_shard_fn=fake, **arguments)
    return calls


@pytest.mark.core
def test_units_are_made_in_every_list_and_inner_lists_first():
    """A stand-in of a mesh is enough. The reference hands a dict inside of a list to fully_shard, which fails."""
    tree, mesh = Tree(), SimpleNamespace(mesh_dim_names=("dp",))
    expected = [
        ("groups.0.0", True),
        ("groups.0.1", False),
        ("groups.1.0", True),
        ("groups.1.1", False),
        ("groups.2", False),
        ("vision.layers.0", True),
        ("vision.layers.1", False),
    ]
    assert recorded(tree, mesh) == expected
    assert recorded(tree, mesh, reshard_after_forward=True) == [(name, True) for name, _ in expected]
    tree.audio_tower.layers[0].requires_grad_(True)  # a tower that learns is sharded like the others
    assert [name for name, _ in recorded(tree, mesh)][-2:] == ["audio_tower.layers.0", "audio_tower.layers.1"]
    assert recorded(tree, SimpleNamespace(mesh_dim_names=None)) != []


def recursive_step() -> Any:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    model = build("llama")
    model.model.layers[0].input_layernorm.to(torch.float64)  # a dtype of its own, owned by the layer's own child
    model.model.layers[0].extra = nn.Parameter(torch.ones(3, dtype=torch.float64))  # and one owned by the layer itself
    model.model.layers[0].input_layernorm.to(torch.float32)
    apply_fsdp2_sharding_recursively(model, mesh, NO_CAST)
    fully_shard(model, mesh=mesh, mp_policy=NO_CAST)
    loss = model(**batches_for(model, 2)[dist.get_rank()], use_cache=False).loss
    loss.backward()
    gradients = full_grads(model)
    return {name: g for name, g in gradients.items() if not name.endswith("extra")}


def test_a_parameter_of_another_dtype_owned_by_the_layer_itself():
    gradients = run_distributed(2, recursive_step)[0]
    reference = build_model("llama")
    _, want = loss_and_grads(reference, batches_for(reference, 2))
    assert_gradients_equal(gradients, want)


def test_the_axis_of_data_and_context_parallelism():
    """By its joined name, by its parts, and over replicas."""
    assert run_distributed(4, joined_axes) == [[("dp_shard",), ("dp_shard_cp",), ("dp_replicate", "dp_shard_cp")]] * 4


def joined_axes() -> list[Any]:
    def axes(shape: dict[str, int]) -> Any:
        return (
            MeshAxes()
            .data_parallel(init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape)))
            .mesh_dim_names
        )

    return [
        axes({"dp_shard": 4, "cp": 1}),
        axes({"dp_shard": 2, "cp": 2}),
        axes({"dp_replicate": 2, "dp_shard": 1, "cp": 2}),
    ]
