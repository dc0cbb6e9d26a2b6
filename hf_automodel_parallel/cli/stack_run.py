"""A small model under another parallelisation: loss and gradients of a forward and backward, beside one process.

    torchrun --nproc_per_node RANKS run.py

`hf-automodel-parallel verify MODEL --stack ... --script DIR` wrote this file, with the model, the batch and the result
of one process beside it. It needs torch, transformers, accelerate and peft, and imports nothing else; gloo, no GPU.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent


def transformers_native(what, reference):
    """Sharded while it is loaded; PEFT shards the adapters."""
    from transformers.distributed import DistributedConfig

    sizes = {name: what[name] for name in ("tp_size", "fsdp_size") if what[name] > 1}
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "model", dtype=torch.float32, distributed_config=DistributedConfig(**sizes)
    )
    return with_lora(model, what, reference), torch.Tensor.backward


def accelerate_fsdp2(what, reference):
    """``Accelerator.prepare`` with FSDP2. On CPU Accelerate leaves FSDP off, so its state is told that it is on."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    model = with_lora(model, what, reference)
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, _ = accelerator.prepare(model, optimizer)
    return model, accelerator.backward


STACKS = {"transformers": transformers_native, "accelerate": accelerate_fsdp2}


@torch.no_grad()
def with_lora(model, what, reference):
    """The model with PEFT's LoRA where it is asked for, with the values of one process."""
    if what["lora"] is None:
        return model
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **what["lora"]))
    for name, parameter in model.named_parameters():
        value = reference["adapters"].get(name)
        if value is not None and value.shape == parameter.shape:  # another shape shows in the forward or the gradient
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
    return model


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main():
    what = json.loads((HERE / "what.json").read_text())
    for name in what["imports"]:
        importlib.import_module(name)
    reference = torch.load(HERE / "reference.pt", weights_only=True)
    dist.init_process_group("gloo")
    model, backward = STACKS[what["stack"]](what, reference)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()

    rank = dist.get_rank() // what["tp_size"]
    batch = {name: x.chunk(dist.get_world_size() // what["tp_size"])[rank] for name, x in reference["batch"].items()}
    loss = model(**batch, use_cache=False).loss
    backward(loss)
    loss = full(loss.detach()).clone()
    dist.all_reduce(loss)
    loss /= dist.get_world_size()

    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": loss.item(), "gradients": gradients}, HERE / f"found-{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        show(loss.item(), gradients, reference)
    dist.barrier()
    dist.destroy_process_group()


def show(loss, gradients, reference):
    """Print what is not as in one process."""
    print(f"loss {loss:.6f}, in one process {reference['float32']['loss']:.6f}")
    right = reference["float32"]["gradients"]
    for name in sorted({*right, *gradients}):
        if name not in right or name not in gradients:
            print(f"{name}: a gradient on one side only")
        elif right[name].shape != gradients[name].shape:
            print(f"{name}: the gradient is {tuple(gradients[name].shape)}, not {tuple(right[name].shape)}")
        elif (error := float((gradients[name] - right[name]).norm() / right[name].norm())) > 1e-4:
            print(f"{name}: the gradient is off by {error:.0e} of its norm")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    try:
        main()
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        (HERE / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        raise
