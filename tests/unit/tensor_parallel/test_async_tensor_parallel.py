"""Async tensor parallelism: what it needs is asked for by name; inductor does it for our group and in our layers
alone.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.fake_ranks import fake_world, sharded
from harness.models import build_model, make_batches
from torch.distributed.device_mesh import init_device_mesh

from hf_automodel_parallel import ConfigError, UnsupportedError, compat
from hf_automodel_parallel.compile import compile_layers
from hf_automodel_parallel.core.forward_stack import ForwardSlot, ForwardStack
from hf_automodel_parallel.core.model_structure import find_layers, find_structure
from hf_automodel_parallel.core.model_view import ModelView
from hf_automodel_parallel.core.options import ParallelOptions
from hf_automodel_parallel.fsdp.options import ShardingOptions
from hf_automodel_parallel.strategies import default
from hf_automodel_parallel.tensor_parallel.async_tp import check_async_tensor_parallel, with_async_tensor_parallel

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
COMPILED = {"backend": "inductor"}


@pytest.fixture
def tp_mesh():
    """A tp axis of two ranks in a world of four that does not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))["tp"]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "sequence_parallel, options, device, error, message",
    [
        (False, COMPILED, CUDA, ConfigError, "needs sequence_parallel=True"),
        (True, None, CUDA, ConfigError, "needs compile=True"),
        (True, {"backend": "aot_eager"}, CUDA, ConfigError, "compile='aot_eager': only inductor"),
        (True, {**COMPILED, "mode": "max-autotune"}, CUDA, ConfigError, "mode='max-autotune'.*Leave out the mode"),
        (True, COMPILED, CPU, UnsupportedError, "on cpu: it needs the symmetric memory of CUDA"),
    ],
)
def test_what_it_needs(tp_mesh, sequence_parallel, options, device, error, message):
    with pytest.raises(error, match=f"async_tensor_parallel=True.*{message}"):
        check_async_tensor_parallel(tp_mesh, sequence_parallel, options, device)


def test_without_tensor_parallelism_there_is_nothing_to_overlap():
    with pytest.raises(ConfigError, match="async_tensor_parallel=True with tp_size=1"):
        check_async_tensor_parallel(None, True, COMPILED, CUDA)


def test_symmetric_memory(tp_mesh, monkeypatch):
    def check():
        check_async_tensor_parallel(tp_mesh, True, COMPILED, CUDA)

    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UnsupportedError, match="no NCCL"):
        check()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UnsupportedError, match="ranks 0 and 1 of one group are on different machines"):
        check()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    with pytest.raises(UnsupportedError, match="GPU 0 cannot access the memory of GPU 1"):
        check()
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    check()


class Stop(Exception):
    """There is no kernel for the fused operators on the CPU: the graph is looked at, and not compiled further."""


def operators_of(function, inputs, options):
    """Names of the operators in the graph that inductor is about to generate code for."""
    found = []

    def look(graph):
        found.extend(str(node.target) for node in graph.nodes if node.op == "call_function")
        raise Stop

    options = {**options, "options": {**options.get("options", {}), "post_grad_custom_post_pass": look}}
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Stop"), torch.no_grad():
        torch.compile(function, fullgraph=True, **options)(*inputs)
    return " ".join(found)


def test_inductor_fuses_the_collectives_of_our_group_alone(tp_mesh, monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)  # inductor asks; nothing is run
    group, other = tp_mesh.get_group(), dist.new_group([0, 2])

    def layer(over):
        def forward(x, up, down):
            hidden = torch.relu(compat.all_gather_dim(x, 1, over) @ up)
            return compat.reduce_scatter_dim(hidden @ down, 1, over)

        return forward

    inputs = torch.randn(2, 64, 32), torch.randn(32, 128), torch.randn(128, 32)
    options = with_async_tensor_parallel(COMPILED, group)
    fused = operators_of(layer(group), inputs, options)
    assert "symm_mem.fused_all_gather_matmul" in fused and "symm_mem.fused_matmul_reduce_scatter" in fused
    assert "symm_mem" not in operators_of(layer(other), inputs, options)  # another group keeps its collectives
    assert "symm_mem" not in operators_of(layer(group), inputs, COMPILED)  # and so does code that is not ours


@pytest.mark.parametrize("adapter, scatters", [(None, 2), ({"target_modules": "all-linear"}, 0)], ids=["full", "lora"])
def test_inductor_fuses_the_collectives_of_a_real_layer(monkeypatch, adapter, scatters):
    """Both all-gathers and both reduce-scatters of a Llama layer, in forward. With LoRA on o_proj and down_proj a
    reduce-scatter stands behind the sum of two products, the base layer's and the adapter's, which inductor does not
    fuse."""
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    found: list[str] = []

    def look(graph):
        found.extend(str(node.target) for node in graph.nodes if node.op == "call_function")
        raise Stop

    with fake_world(2):
        model = sharded("llama", 2, 1, adapter, lambda model: None, sequence_parallel=True)
        (layer,) = find_layers(ModelView.of(model).inner)
        options = with_async_tensor_parallel(
            {"backend": "inductor"}, ForwardStack.of(layer).get(ForwardSlot.LOCAL_PARAMETERS).shared.group
        )
        options["options"]["post_grad_custom_post_pass"] = look
        torch._dynamo.reset()
        compile_layers([layer], **options)
        with pytest.raises(Exception, match="Stop"):
            model(**make_batches(1, 2, 64, 128, seed=3)[0], use_cache=False)
    counts = {name: sum(name in operator for operator in found) for name in FUSED}
    assert counts == {"fused_all_gather_matmul": 2, "fused_matmul_reduce_scatter": scatters}, (counts, found)


FUSED = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


def test_prepare_compiles_its_layers_with_the_option(monkeypatch):
    """And enables symmetric memory for the tp group alone."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        default, "compile_layers", lambda layers, policy, parts, **options: seen.update(options, layers=layers)
    )
    monkeypatch.setattr(compat, "enable_symmetric_memory", lambda group: seen.update(group=group))
    model = build_model("llama")
    job = SimpleNamespace(
        model=model,
        structure=find_structure(model),
        checkpointing="none",
        options=ParallelOptions(async_tensor_parallel=True),
        tensor_parallel=None,
        spec=None,
        compile_options={},
        tp_mesh=SimpleNamespace(get_group=lambda: "the tp group"),
        cp_mesh=None,
        suitable=None,
        offload_activations=False,
        fsdp=ShardingOptions(),
    )
    default.DefaultParallelizationStrategy().finish_layers(job)
    assert seen == {
        "options": {compat.ASYNC_TENSOR_PARALLEL_OPTION: True},
        "layers": list(model.model.layers),
        "group": "the tp group",
    }
