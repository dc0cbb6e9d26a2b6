"""What the ranks run in the tests of megatron-fsdp."""

from typing import Any

import torch
import torch.distributed as dist
from harness.cuda_standins import cuda_standins
from harness.training import batches_for, build, trainable
from torch.distributed.device_mesh import init_device_mesh

from hf_automodel_parallel.backends.megatron_fsdp.sharding import managed_by_megatron
from hf_automodel_parallel.parallelizer import megatron_fsdp_strategy_parallelize


def steps(
    name: str,
    sizes: tuple[int, ...] = (2, 1),
    names: tuple[str, ...] = ("dp", "tp"),
    adapter: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    count: int = 2,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    groups: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Losses, norms, first gradients and last values of `count` steps with AdamW."""
    with cuda_standins():
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        model = build(name, adapter, **(overrides or {}))
        data = dist.get_world_size() // (sizes[names.index("tp")] if "tp" in names else 1)
        mine = dist.get_rank() // (dist.get_world_size() // data)
        batches = [batches_for(model, data * accumulation, rows=8, seed=10 + step) for step in range(count)]
        optimizer = torch.optim.AdamW(parameter_groups(model, groups), lr=1e-3, weight_decay=0.1, eps=1e-3)
        wrapped, optimizer = megatron_fsdp_strategy_parallelize(model, mesh, optimizer, **options)
        managed = managed_by_megatron(wrapped)
        result: dict[str, Any] = {
            "losses": [],
            "norms": [],
            "classes": sorted({type(m).__name__ for m in wrapped.modules()}),
        }
        for step in range(count):
            total = torch.zeros(())
            for micro in range(accumulation):
                managed.set_gradient_sync(micro == accumulation - 1)
                loss = wrapped(**batches[step][micro * data + mine], use_cache=False).loss / accumulation
                loss.backward()
                total += loss.detach()
            managed.flush()
            dist.all_reduce(total)
            if step == 0:
                result["gradients"] = {
                    n: managed.row_shards.full_tensor(n, p.grad)
                    for n, p in managed.parameters.items()
                    if p.requires_grad
                }
            result["losses"].append(total.item() / dist.get_world_size())
            result["norms"].append(managed.clip_grad_norm_(max_grad_norm).item())
            optimizer.step()
            optimizer.zero_grad()
        result["values"] = {n: managed.row_shards.full_tensor(n, p) for n, p in managed.parameters.items()}
        return result


def parameter_groups(model: torch.nn.Module, several: bool) -> Any:
    if not several:
        return trainable(model)
    vectors = [p for p in trainable(model) if p.ndim == 1]
    return [
        {"params": [p for p in trainable(model) if p.ndim > 1]},
        {"params": vectors, "weight_decay": 0.0, "lr": 1e-2},
    ]


def unwrapped_steps(name: str) -> dict[str, Any]:
    """One data-parallel rank: tensor parallel, not wrapped."""
    from harness.compare import full_grads
    from harness.oracle import loss_and_grads

    with cuda_standins():
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        model = build(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = megatron_fsdp_strategy_parallelize(model, mesh, optimizer)
        batches = batches_for(model, 1)
        model(**batches[0], use_cache=False).loss.backward()
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.step()
        return {
            "gradients": full_grads(model),
            "wanted": loss_and_grads(build(name), batches)[1],
            "class": type(model).__name__,
        }


def accelerate_steps(
    name: str,
    sizes: dict[str, int],
    adapter: dict[str, Any] | None = None,
    data: int = 2,
    accumulation: int = 1,
    directory: str | None = None,
    mixed_precision: str = "no",
    **config: Any,
) -> dict[str, Any]:
    """Two steps of a plain Accelerate loop; with a directory, the second one once more from a saved state."""
    from accelerate import Accelerator

    from hf_automodel_parallel import AutoParallelismConfig

    with cuda_standins():
        accelerator = Accelerator(
            parallelism_config=AutoParallelismConfig(**sizes, backend="megatron_fsdp", **config),
            gradient_accumulation_steps=accumulation,
            mixed_precision=mixed_precision,
        )
        model = build(name, adapter)
        optimizer = torch.optim.AdamW(parameter_groups(model, True), lr=1e-3, weight_decay=0.1, eps=1e-3)
        calls = [0]
        for path, module in model.named_modules():
            if path.endswith("gate_proj"):
                module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        model, optimizer = accelerator.prepare(model, optimizer)
        mine = dist.get_rank() // accelerator.parallelism_config.tp_size
        result: dict[str, Any] = {"losses": [], "norms": [], "class": type(model).__name__}

        def step(number: int) -> None:
            batches = batches_for(model, data * accumulation, rows=8, seed=10 + number)
            total = torch.zeros(())
            for micro in range(accumulation):
                with accelerator.accumulate(model):
                    loss = model(**batches[micro * data + mine], use_cache=False).loss
                    accelerator.backward(loss)
                    total += loss.detach() / accumulation
                    if accelerator.sync_gradients:
                        result["norms"].append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
                    optimizer.step()
                    optimizer.zero_grad()
            dist.all_reduce(total)
            result["losses"].append(total.item() / dist.get_world_size())

        step(0)
        result["calls"] = calls[0]
        if directory is not None:
            accelerator.save_state(directory)
        model.eval()
        with torch.no_grad():
            result["evaluated"] = model(**batches_for(model, 1)[0]).loss.item()
        model.train()
        step(1)
        if directory is not None:
            first = accelerator.get_state_dict(model)
            accelerator.load_state(directory)
            step(1)
            second = accelerator.get_state_dict(model)
            result["again"] = all(torch.equal(first[key], second[key]) for key in first)
        result["values"] = accelerator.get_state_dict(model)
        return result


def trainer_steps(name: str, adapter: dict[str, Any] | None, directory: str, **arguments: Any) -> dict[str, Any]:
    """Five steps of the stock Trainer on tp2 x dp2, with a checkpoint at the end."""
    import os

    from harness.training import five_steps_trainer

    sizes: dict[str, Any] = {"tp_size": 2, "dp_shard_size": 2, "backend": "megatron_fsdp"}
    with cuda_standins():
        history = five_steps_trainer(name, sizes, adapter, dp_size=2, output_dir=directory, **arguments)
    dist.barrier()
    return {"history": history, "files": sorted(os.listdir(directory))}


def norms_of_mixed_gradients() -> dict[str, Any]:
    """On tp2: one gradient sharded over tp and one replicated, both bfloat16; norms and values around a clipping to
    1.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from hf_automodel_parallel.optim.gradient_norm import clip_, total_norm

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    parameters = []
    for placement in (Shard(0), Replicate()):
        value = DTensor.from_local(torch.zeros(2, 4, dtype=torch.bfloat16), mesh["tp"], [placement])
        parameter = torch.nn.Parameter(value)
        parameter.grad = DTensor.from_local(torch.ones(2, 4, dtype=torch.bfloat16), mesh["tp"], [placement])
        parameters.append(parameter)
    result = {
        "largest": total_norm(parameters, float("inf"), mesh).item(),
        "before": clip_(parameters, 1.0, mesh=mesh).item(),
    }
    result["after"] = total_norm(parameters, mesh=mesh).item()
    result["dtypes"] = {p.grad.dtype for p in parameters}
    return result


def bfloat16_clip(**options: Any) -> tuple[float, float, str]:
    """Norms before and after a clipping to 0.1 of the gradients of a bfloat16 model on dp2, and the dtype of the
    gradients.
    """
    from hf_automodel_parallel.optim.gradient_norm import total_norm

    with cuda_standins():
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        model = build("llama").to(torch.bfloat16)
        wrapped, _ = megatron_fsdp_strategy_parallelize(model, mesh, torch.optim.SGD(model.parameters()), **options)
        wrapped(**batches_for(model, 2)[dist.get_rank()], use_cache=False).loss.backward()
        managed = managed_by_megatron(wrapped)
        before = managed.clip_grad_norm_(0.1).item()
        dtypes = {str(p.grad.dtype) for p in managed.parameters.values() if p.grad is not None}
        return before, total_norm(managed.parameters.values(), mesh=mesh).item(), " ".join(sorted(dtypes))


def refusals() -> list[str]:
    """Messages of what the function refuses, on every rank alike, with a model that is then still as it was."""
    from torch.distributed.tensor.parallel import ColwiseParallel

    from hf_automodel_parallel.errors import AutoParallelError

    class Own(ColwiseParallel):
        pass

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = build("llama")
    before = {name: id(p) for name, p in model.named_parameters()}
    wrong: list[dict[str, Any]] = [
        {"megatron_fsdp_unit_modules": ["transformers.models.llama.modeling_llama.LlamaDecoderLayr"]},
        {"megatron_fsdp_unit_modules": []},
        {"megatron_fsdp_unit_modules": ["LlamaDecoderLayer", "LlamaMLP"]},
        {"zero_dp_strategy": 4},
        {"overlap_grad_reduce": False},
        {"overlap_param_gather": False},
        {"nccl_ub": "yes"},
        {"init_fsdp_with_meta_device": True, "zero_dp_strategy": 0},
        {"calculate_per_token_loss": True, "average_in_collective": True},
        {"dp_shard_dim": "data"},
        {"tp_dim": "tensor"},
        {"tp_dim": "dp"},
        {"tp_shard_plan": {"model.layers.*.mlp.up_proj": Own()}},
        {"tp_shard_plan": {"model.layers.*.mlp.up_prj": "colwise"}},
    ]
    messages = []
    for arguments in wrong:
        try:
            megatron_fsdp_strategy_parallelize(model, mesh, **arguments)
        except AutoParallelError as error:
            messages.append(str(error))
        else:
            messages.append(f"nothing for {arguments}")
    try:
        megatron_fsdp_strategy_parallelize(build("gpt2"), mesh)
    except AutoParallelError as error:
        messages.append(str(error))
    assert before == {name: id(p) for name, p in model.named_parameters()}, "something was changed"
    return messages
