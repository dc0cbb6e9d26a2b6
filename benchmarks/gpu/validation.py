"""Does the package compute on this machine what one plain process computes? One case per mode.

The reference is the same model in this process without the package, in plain eager: loss and every gradient, in float32
and in the case's own precision. Bounds:

* float32: loss 1e-5 of itself; each gradient 1e-4 of its norm and 1e-6 of the norm of all gradients;
* bf16 (mixed: float32 weights under autocast; weights: everything in bf16): the distance to float32, of all gradients
  together, is at most twice that of the plain run in the same precision, and of each gradient at most four times (and
  1e-3 of the norm of all); the loss twice, and 2**-8, a rounding of bf16, of itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import device as machine
from . import models

Batch = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor]

PRECISIONS = ("float32", "bf16 mixed", "bf16 weights")

#: Values of the small model, and the rows and tokens of a data-parallel rank's batch.
_SMALL = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
_SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
_TINY = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_SHAPES: dict[str, tuple[dict[str, int], int, int]] = {"cuda": (_SMALL, 2, 256), "cpu": (_TINY, 2, 16)}


class Wrong(Exception):
    """A result is outside of its bound."""


# ---- the cases ---------------------------------------------------------------------------------------------------


def cases(gpus: int, device: str, smoke: bool = False) -> list[dict[str, Any]]:
    """What is validated on ``gpus`` ranks, the cheap and basic cases first. ``smoke``: one of each kind."""
    found: list[dict[str, Any]] = []

    def add(name: str, kind: str = "step", **values: Any) -> None:
        found.append({"name": name, "kind": kind, "precision": "float32", "adapter": "full", **values})

    def mode(precision: str, adapter: str, **options: Any) -> None:
        shown = "".join(f", {key} {value}" for key, value in options.items())
        add(f"{precision}, {adapter}{shown}", precision=precision, adapter=adapter, options=options)

    compiled = "aot_eager" if device == "cpu" else True
    for precision in PRECISIONS:
        for adapter in ("full", "lora"):
            mode(precision, adapter)
    for checkpointing in ("full", "submodule", "selective"):
        mode("float32", "full", activation_checkpointing=checkpointing)
        mode("bf16 weights", "lora", activation_checkpointing=checkpointing)
    add("float32, full, the model's own checkpointing", own_checkpointing=True)
    mode("float32", "full", reshard_after_forward=False)
    for sizes in _meshes(gpus):
        for precision, adapter in (("float32", "full"), ("bf16 mixed", "full"), ("bf16 weights", "lora")):
            mode(precision, adapter, **sizes)
    add("audit of every step", "audit", options={"audit": "every_n_steps", "audit_steps": 1})
    add("an audit finds a lost gradient", "lost")
    for state_dict_type in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        add(f"checkpoint, {state_dict_type}", "checkpoint", state_dict_type=state_dict_type)
    add("checkpoint, written in the background", "checkpoint", options={"async_save": True})
    add("checkpoint, LoRA in bf16", "checkpoint", adapter="lora", precision="bf16 weights")
    add("weights saved and loaded shard by shard", "export")
    add("the stock Trainer", "trainer")
    add("QLoRA", "qlora")
    add("megatron-fsdp", "megatron", options={"backend": "megatron_fsdp"})
    for precision, adapter in (("float32", "full"), ("bf16 mixed", "full"), ("bf16 weights", "lora")):
        mode(precision, adapter, compile=compiled)
    for checkpointing in ("full", "submodule", "selective"):
        mode("bf16 weights", "lora", compile=compiled, activation_checkpointing=checkpointing)
    add(
        "float32, full, the model's own checkpointing, compiled",
        own_checkpointing=True,
        options={"compile": compiled},
    )
    if gpus > 1:
        sequence = {"tp_size": 2, "sequence_parallel": True}
        mode("bf16 weights", "lora", compile=compiled, activation_checkpointing="selective", **sequence)
        overlapped = {"async_tensor_parallel": True, "compile": True}
        add(
            "async tensor parallelism",
            precision="bf16 weights",
            options=sequence | overlapped,
            may_be_refused=True,
        )
    if not smoke:
        return found
    first = {case["kind"]: case["name"] for case in reversed(found)}
    chosen = {*first.values(), "bf16 weights, lora", "async tensor parallelism"}
    chosen |= {"bf16 mixed, full", f"bf16 weights, lora, compile {compiled}, activation_checkpointing selective"}
    chosen |= {"float32, full, tp_size 2"}
    return [case for case in found if case["name"] in chosen]


def _meshes(gpus: int) -> list[dict[str, Any]]:
    """Sizes of the mesh that need several GPUs; a size that is left out takes the rest."""
    if gpus < 2 or gpus % 2:
        return []
    found: list[dict[str, Any]] = [{"tp_size": 2}, {"tp_size": 2, "sequence_parallel": True}, {"cp_size": 2}]
    found.append({"dp_replicate_size": 2, "dp_shard_size": gpus // 2})
    if gpus % 4 == 0:
        found.append({"tp_size": 2, "dp_replicate_size": 2, "dp_shard_size": gpus // 4})
    return found


# ---- in the child ------------------------------------------------------------------------------------------------


def run_case(case: dict[str, Any], device: str) -> dict[str, Any]:
    """One case on this rank.

    Raises:
        Wrong: a result is outside of its bound.
        Exception: what the package, or a library, raises.
    """
    from accelerate.state import AcceleratorState, GradientState

    where = machine.this_device(device)
    torch.set_float32_matmul_precision("highest")
    environment = dict(os.environ)
    torch.compiler.reset()
    try:
        result: dict[str, Any] = _KINDS[case["kind"]](case, where)
    finally:
        # For the next case. The process group stays; what an Accelerator was told is in the environment, too.
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        machine.empty_cache(where)
    return result


def accelerator_of(case: dict[str, Any], where: torch.device) -> Any:
    """An Accelerator with the case's config, precision and plugin."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    from hf_automodel_parallel import AutoParallelismConfig

    plugin = {}
    if "state_dict_type" in case:
        plugin["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type=case["state_dict_type"]
        )
    return Accelerator(
        cpu=where.type == "cpu",
        mixed_precision="bf16" if case["precision"] == "bf16 mixed" else "no",
        parallelism_config=AutoParallelismConfig(**case.get("options", {})),
        **plugin,
    )


def small_model(case: dict[str, Any], where: torch.device, precision: str | None = None) -> nn.Module:
    """The model of a case on the device, equal on all ranks: random numbers of the CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    values = _SHAPES[where.type][0]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values, use_cache=False, pad_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 / math.sqrt(values["hidden_size"]))
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if case["adapter"] == "lora":
        # Random on both sides, and scaled by one: at 4 the activations grow so far that every bfloat16 residual stream,
        # that of a bare fully_shard too, is four times as far from float32 as autocast's.
        model = models.with_lora(model, r=8, lora_alpha=8, init_lora_weights=False)
    if (precision or case["precision"]) == "bf16 weights":
        model = model.to(torch.bfloat16)
    return model.to(where).train()


def batches_of(parts: int, where: torch.device, seed: int = 1) -> list[Batch]:
    """One batch for each data-parallel rank."""
    values, rows, length = _SHAPES[where.type]
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(values["vocab_size"], (rows, length), generator=generator).to(where) for _ in range(parts)]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def reference(case: dict[str, Any], precision: str, parts: int, where: torch.device) -> tuple[float, Gradients]:
    """Loss and gradients of the model alone, in ``precision``."""
    model = small_model(case, where, precision)
    total = 0.0
    for batch in batches_of(parts, where):
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16 mixed"):
            loss = model(**batch).loss / parts
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


_kept: dict[tuple[str, str, int, str], tuple[float, Gradients]] = {}


def kept_reference(case: dict[str, Any], precision: str, parts: int, where: torch.device) -> tuple[float, Gradients]:
    """:func:`reference`, computed once per process."""
    key = (case["adapter"], precision, parts, where.type)
    if key not in _kept:
        _kept[key] = reference(case, precision, parts, where)
    return _kept[key]


def step(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """Forward, backward, clipping and an optimizer step, with the first loss and all gradients compared."""
    accelerator = accelerator_of(case, where)
    model = small_model(case, where)
    if case.get("own_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
    parts, mine = data_parallel(accelerator)
    batch = batches_of(parts, where)[mine]
    got = mean_loss(accelerator, backward(accelerator, model, batch)), full_gradients(model)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    again = mean_loss(accelerator, backward(accelerator, model, batch))
    if not again < got[0]:
        raise Wrong(f"the loss went from {got[0]:.6f} to {again:.6f} in a step of AdamW")
    exact = kept_reference(case, "float32", parts, where)
    if case["precision"] == "float32":
        return compare_exact(got, exact)
    return compare_low(got, kept_reference(case, case["precision"], parts, where), exact)


def backward(accelerator: Any, model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a batch, and its gradients; under context parallelism too."""
    context: Any = contextlib.nullcontext()
    if accelerator.parallelism_config.cp_size > 1:
        shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        positions = torch.arange(shifted.shape[1], device=shifted.device).repeat(len(shifted), 1)
        batch = {**batch, "shift_labels": shifted, "position_ids": positions}
        held = list(batch.values())
        context = accelerator.maybe_context_parallel(buffers=held, buffer_seq_dims=[1] * len(held))
    with context:
        loss: torch.Tensor = model(**batch).loss
        accelerator.backward(loss)
    return loss


def audit(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """Three steps, each audited."""
    accelerator = accelerator_of(case, where)
    model = small_model(case, where)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
    parts, mine = data_parallel(accelerator)
    losses = train(accelerator, model, optimizer, [batches_of(parts, where)[mine]] * 3)
    return {"losses": losses}


def lost(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """A module whose weight gets no gradient, although one reaches its output: the audit has to raise."""
    from hf_automodel_parallel.audit import GradientAuditError

    accelerator = accelerator_of(case, where)
    model = small_model(case, where)
    norm = model.model.norm
    own = norm.forward
    norm.forward = lambda states: own(states.detach()).detach() + states
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
    parts, mine = data_parallel(accelerator)
    try:
        train(accelerator, model, optimizer, [batches_of(parts, where)[mine]])
    except GradientAuditError as error:
        return {"error": str(error)[:200]}
    raise Wrong("the audit of the first step did not find that model.norm.weight has no gradient")


def checkpoint(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """A state saved after one step and loaded after the second: the second step is the same again."""
    with shared_directory() as directory:
        accelerator = accelerator_of(case, where)
        model = small_model(case, where)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
        parts, mine = data_parallel(accelerator)
        batch = batches_of(parts, where)[mine]
        train(accelerator, model, optimizer, [batch])
        accelerator.save_state(str(directory / "state"))
        first = train(accelerator, model, optimizer, [batch] * 2)
        accelerator.load_state(str(directory / "state"))
        second = train(accelerator, model, optimizer, [batch] * 2)
    worst = max(abs(a - b) / abs(a) for a, b in zip(first, second))
    bound = 1e-5 if case["precision"] == "float32" else 2e-3  # some kernels add in any order
    if not worst <= bound:
        raise Wrong(f"losses after loading {second}, before {first}")
    return {"loss_error": worst, "bound": bound}


def export(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """``save_pretrained`` writes the weights that are trained; ``from_pretrained`` reads them shard by shard."""
    from transformers import AutoModelForCausalLM

    import hf_automodel_parallel

    with shared_directory() as directory:
        accelerator = accelerator_of(case, where)
        model = small_model(case, where)
        wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
        model.save_pretrained(str(directory / "model"))
        accelerator.wait_for_everyone()
        streamed = hf_automodel_parallel.from_pretrained(AutoModelForCausalLM, str(directory / "model")).train()
        streamed, _ = accelerator.prepare(streamed, torch.optim.AdamW(trained(streamed), lr=1e-3))
        for name, parameter in streamed.named_parameters():
            if not torch.equal(whole(parameter.detach()), wanted[name]):
                raise Wrong(f"{name} is another one after it was saved and loaded")
        if accelerator.is_main_process:
            loaded = AutoModelForCausalLM.from_pretrained(str(directory / "model"))
            for name, parameter in loaded.named_parameters():
                if not torch.equal(parameter.detach(), wanted[name].cpu()):
                    raise Wrong(f"{name} in the file is not that of the model")
        accelerator.wait_for_everyone()
    return {"tensors": len(wanted)}


def trainer(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """Three steps of the stock Trainer with our config, against a plain loop."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from hf_automodel_parallel import AutoParallelismConfig

    class InOrder(Trainer):
        """Only the order of the data is fixed."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    steps, lr, world = 3, 1e-3, int(os.environ["WORLD_SIZE"])
    wanted = []
    model = small_model(case, where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for number in range(steps):
        losses = [model(**batch).loss / world for batch in batches_of(world, where, seed=number)]
        total = torch.stack(losses).sum()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(total.item())
    rows = [
        {key: value[row].cpu() for key, value in batch.items()}
        for number in range(steps)
        for batch in batches_of(world, where, seed=number)
        for row in range(len(batch["input_ids"]))
    ]
    with shared_directory() as directory:
        arguments = TrainingArguments(
            str(directory),
            max_steps=steps,
            per_device_train_batch_size=_SHAPES[where.type][1],
            learning_rate=lr,
            **machine.quiet_trainer(where),
            parallelism_config=AutoParallelismConfig(**case.get("options", {})),
        )
        tried = InOrder(small_model(case, where), arguments, train_dataset=rows)
        tried.train()
        got = [entry["loss"] for entry in tried.state.log_history if "loss" in entry]
    worst = max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))
    if not worst <= 1e-3:
        raise Wrong(f"losses {got} instead of {wanted}")
    return {"loss_error": worst, "bound": 1e-3}


def qlora(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """bitsandbytes' 4-bit weights under LoRA, against the same model in one process."""
    missing = missing_package("bitsandbytes")
    if missing:
        return {"not_run": missing}
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    low = torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=low, bnb_4bit_quant_storage=low
    )

    def quantized() -> nn.Module:
        base = AutoModelForCausalLM.from_pretrained(
            str(directory), quantization_config=quantization, dtype=low, device_map={"": str(where)}
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        torch.manual_seed(1)
        return models.with_lora(base, r=8, init_lora_weights=False).train()

    with shared_directory() as directory:
        accelerator = accelerator_of(case, where)
        if accelerator.is_main_process:
            small_model(case, where).save_pretrained(str(directory))
        accelerator.wait_for_everyone()
        parts, mine = data_parallel(accelerator)
        plain = quantized()
        losses = [plain(**batch).loss / parts for batch in batches_of(parts, where)]
        torch.stack(losses).sum().backward()
        exact = (
            sum(loss.item() for loss in losses),
            {name: p.grad for name, p in plain.named_parameters() if p.grad is not None},
        )
        model = quantized()
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-3))
        loss = model(**batches_of(parts, where)[mine]).loss
        accelerator.backward(loss)
        return compare_exact((mean_loss(accelerator, loss), full_gradients(model)), exact)


def megatron(case: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """A step of SGD with megatron-fsdp: the weights after it, and so the gradients, against one process."""
    missing = missing_package("megatron-fsdp")
    if missing or where.type == "cpu":
        return {"not_run": missing or "megatron-fsdp needs CUDA streams"}
    lr = 0.5
    accelerator = accelerator_of(case, where)
    model = small_model(case, where)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained(model), lr=lr))
    parts, mine = data_parallel(accelerator)
    loss = model(**batches_of(parts, where)[mine], use_cache=False).loss
    accelerator.backward(loss)
    optimizer.step()
    after = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return {}
    gradients = {name: (value - after[name].to(where)) / lr for name, value in before.items()}
    # The gradients come out of differences of rounded weights.
    return compare_exact((mean_loss(accelerator, loss), gradients), kept_reference(case, "float32", parts, where), 10.0)


# ---- on all ranks ------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(accelerator: Any, model: nn.Module, optimizer: Any, batches: list[Batch]) -> list[float]:
    """One step on each batch. Returns the losses of all ranks."""
    losses = []
    for batch in batches:
        losses.append(mean_loss(accelerator, backward(accelerator, model, batch)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def data_parallel(accelerator: Any) -> tuple[int, int]:
    """Number of data-parallel ranks, and the place of this one among them."""
    config = accelerator.parallelism_config
    return config.data_parallel_size, accelerator.process_index // config.non_data_parallel_size


def mean_loss(accelerator: Any, loss: torch.Tensor) -> float:
    """The mean over all ranks; tp and cp ranks hold that of their data-parallel rank."""
    total = loss.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / accelerator.num_processes


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_gradients(model: nn.Module) -> Gradients:
    """All gradients by the names of a model that is not prepared. Collective."""
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def shared_directory() -> Iterator[Path]:
    """A directory that all ranks of this machine see. Collective if there is a process group."""
    if not dist.is_initialized():
        with tempfile.TemporaryDirectory() as one:
            yield Path(one)
        return
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    yield Path(names[0])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(names[0])


def missing_package(name: str) -> str:
    """A sentence if a package is not installed, else nothing."""
    try:
        version(name)
    except PackageNotFoundError:
        return f"{name} is not installed"
    return ""


# ---- bounds ------------------------------------------------------------------------------------------------------


def compare_exact(got: tuple[float, Gradients], want: tuple[float, Gradients], looser: float = 1.0) -> dict[str, Any]:
    """The bounds of float32, times ``looser``."""
    _same_names(got[1], want[1])
    norm = _distance(want[1], None)
    errors = {name: _distance_of(got[1][name], g) for name, g in want[1].items()}
    bounds = {name: looser * (1e-4 * _distance_of(g, None) + 1e-6 * norm) for name, g in want[1].items()}
    loss_error = abs(got[0] - want[0]) / abs(want[0])
    if not loss_error <= 1e-5 * looser:
        raise Wrong(f"loss {got[0]!r} instead of {want[0]!r}")
    _within(errors, bounds)
    total = math.sqrt(sum(error**2 for error in errors.values()))
    return {"loss_error": loss_error, "gradient_error": total / norm, "of_bound": _worst(errors, bounds)[0]}


def compare_low(
    got: tuple[float, Gradients], plain: tuple[float, Gradients], exact: tuple[float, Gradients]
) -> dict[str, Any]:
    """The bounds of bf16: how far ``got`` is from float32, beside how far the plain run in bf16 is."""
    for one in (got, plain):
        _same_names(one[1], exact[1])
    norm = _distance(exact[1], None)
    mine, theirs = _distance(got[1], exact[1]), _distance(plain[1], exact[1])
    loss_error, plain_loss_error = (abs(one[0] - exact[0]) / abs(exact[0]) for one in (got, plain))
    if not loss_error <= 2 * plain_loss_error + 2**-8:
        raise Wrong(f"loss {got[0]!r}, plain {plain[0]!r}, in float32 {exact[0]!r}")
    if not mine <= 2 * theirs:
        raise Wrong(f"gradients are {mine / norm:.2e} from float32, those of a plain run {theirs / norm:.2e}")
    errors = {name: _distance_of(got[1][name], g) for name, g in exact[1].items()}
    bounds = {name: 4 * _distance_of(plain[1][name], g) + 1e-3 * norm for name, g in exact[1].items()}
    _within(errors, bounds)
    return {
        "loss_error": loss_error,
        "plain_loss_error": plain_loss_error,
        "gradient_error": mine / norm,
        "plain_gradient_error": theirs / norm,
        "of_bound": mine / (2 * theirs),
    }


def _same_names(got: Gradients, want: Gradients) -> None:
    if got.keys() != want.keys():
        missing, more = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
        raise Wrong(f"{len(missing)} gradients are missing ({missing[:3]}), {len(more)} too many ({more[:3]})")


def _within(errors: dict[str, float], bounds: dict[str, float]) -> None:
    worst, name = _worst(errors, bounds)
    if not worst <= 1.0:
        raise Wrong(f"the gradient of {name} is off by {errors[name]:.2e}, {worst:.1f} times its bound")


def _worst(errors: dict[str, float], bounds: dict[str, float]) -> tuple[float, str]:
    ratios = {name: error / bounds[name] for name, error in errors.items()}
    # A gradient that is not a number is the worst one.
    name = max(ratios, key=lambda one: math.inf if math.isnan(ratios[one]) else ratios[one])
    return ratios[name], name


def _distance(one: Gradients, other: Gradients | None) -> float:
    """The norm of the difference of all gradients."""
    return math.sqrt(sum(_distance_of(g, None if other is None else other[n]) ** 2 for n, g in one.items()))


def _distance_of(one: torch.Tensor, other: torch.Tensor | None) -> float:
    difference = one.double() if other is None else one.double() - other.double()
    return difference.norm().item()


_KINDS = {
    "step": step,
    "audit": audit,
    "lost": lost,
    "checkpoint": checkpoint,
    "export": export,
    "trainer": trainer,
    "qlora": qlora,
    "megatron": megatron,
}
