"""Optimizers: each trains as in one process, or is refused by name at prepare because it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_losses_equal, full_parameters
from harness.meshes import MESHES
from harness.pool import expect_error, run_distributed
from harness.training import LORA, _Rows, batches_for, build, data_rank, trainable
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError
from hf_automodel_parallel.core.sharding_spec import ParameterSpec
from hf_automodel_parallel.optim.sharding_check import ELEMENT_WISE, check_on_shards

Parameters = list[torch.nn.Parameter]


class Lion(torch.optim.Optimizer):
    """A user's element-wise optimizer."""

    def __init__(self, params: Any, lr: float = 1e-4, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                p.add_(
                    torch.tanh(100 * average), alpha=-group["lr"]
                )  # a sign without its jump, which amplifies rounding


class TrustRatio(torch.optim.Optimizer):
    """LARS, with operators that DTensor carries over all shards."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.add_(p.grad / (p.grad.norm() + 1e-12) * p.norm(), alpha=-group["lr"])


class TrustRatioOfShards(TrustRatio):
    """LARS as written for local tensors: the norms are those of the shards."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                sharded = hasattr(p, "to_local")
                weight, gradient = (p.to_local(), p.grad.to_local()) if sharded else (p, p.grad)
                weight.add_(gradient / (gradient.norm() + 1e-12) * weight.norm(), alpha=-group["lr"])


class QuantizedAdam(torch.optim.Optimizer):
    """As torchao's and bitsandbytes' 8-bit optimizers: the second moment of a large tensor, or shard, is kept in blocks
    of 256 bytes with one scale each; that of a small one in float32.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                sharded = hasattr(p, "to_local")
                weight, gradient = (p.to_local(), p.grad.to_local()) if sharded else (p, p.grad)
                state = self.state[p]
                state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * gradient
                state["square"] = 0.99 * state.get("square", 0.0) + 0.01 * gradient.square()
                if weight.numel() >= 4096 and weight.numel() % 256 == 0:
                    state["square"] = self.quantized(state["square"], sharded)
                weight.sub_(group["lr"] * state["mean"] / (state["square"].sqrt() + 1e-8))

    def quantized(self, square: torch.Tensor, sharded: bool) -> torch.Tensor:
        blocks = square.reshape(-1, 256)
        scale = blocks.amax(1, keepdim=True) / 255
        return (blocks / scale).round().clamp(min=1).mul(scale).view_as(square)


class QuantizedOnWholeTensorsAlone(QuantizedAdam):
    """As torchao's 4-bit AdamW, whose operators fail on the states of shards."""

    def quantized(self, square: torch.Tensor, sharded: bool) -> torch.Tensor:
        assert not sharded, "wrong number of dimensions"
        return super().quantized(square, sharded)


class Closed(TrustRatio):
    """Nobody can construct a second one from its groups and defaults."""

    def __init__(self, params: Any, key: object) -> None:
        assert key == "secret"
        super().__init__(params, lr=0.1)


def matrices_and_rest(params: Parameters) -> list[dict[str, Any]]:
    """Two groups of different settings, as for weight decay."""
    return [
        {"params": [p for p in params if p.ndim > 1], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "lr": 3e-3, "weight_decay": 0.0},
    ]


def schedule_free(params: Parameters) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr=1e-3, warmup_steps=2)
    optimizer.train()
    return optimizer


optim = torch.optim
ACCEPTED: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=1e-3, eps=1e-4, amsgrad=True),
    "adamw_fused": lambda p: optim.AdamW(p, lr=1e-3, eps=1e-4, fused=True),
    "adamw_foreach": lambda p: optim.AdamW(p, lr=1e-3, eps=1e-4, foreach=True),
    "adamw_tensor_lr": lambda p: optim.AdamW(p, lr=torch.tensor(1e-3), eps=1e-4),
    "adamw_groups": lambda p: optim.AdamW(matrices_and_rest(p), eps=1e-4),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2, eps=1e-4),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1, eps=1e-4),
    "adamax": lambda p: optim.Adamax(p, lr=1e-3, eps=1e-3),
    "nadam": lambda p: optim.NAdam(p, lr=1e-3, eps=1e-4),
    "radam": lambda p: optim.RAdam(p, lr=1e-3, eps=1e-4),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, eps=1e-3, momentum=0.9, centered=True),
    "asgd": lambda p: optim.ASGD(p, lr=0.05),
    "lion": lambda p: Lion(p, lr=1e-3),
    "trust_ratio": lambda p: TrustRatio(p, lr=1e-2),
    "schedule_free": schedule_free,
}

#: name -> (how it is made, what the error says)
REFUSED: dict[str, tuple[Callable[[Parameters], torch.optim.Optimizer], str]] = {
    "adafactor": (lambda p: optim.Adafactor(p), "Adafactor does not work on sharded parameters.*Use an element-wise"),
    "rprop": (lambda p: optim.Rprop(p), "Rprop does not work on sharded parameters"),
    "sgd_fused": (lambda p: optim.SGD(p, fused=True), "SGD does not work on sharded parameters"),
    "trust_ratio_of_shards": (lambda p: TrustRatioOfShards(p, lr=0.1), "TrustRatioOfShards computes something else"),
    "closed": (lambda p: Closed(p, "secret"), "Closed cannot be tried.*check_optimizer=False"),
}


def transformers_adafactor(params: Parameters) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params)


def eight_bit(params: Parameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params)


def paged(params: Parameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(params)


REFUSED["paged_adamw"] = (paged, "PagedAdamW32bit does not work on sharded parameters")
REFUSED["transformers_adafactor"] = (transformers_adafactor, "Adafactor does not work on sharded parameters")
REFUSED["adamw_8bit"] = (eight_bit, "AdamW8bit does not work on sharded parameters")


def five_steps(
    model: torch.nn.Module, optimizer: Any, steps: list[dict[str, torch.Tensor]], backward: Callable[..., Any]
) -> list[torch.Tensor]:
    losses = []
    for batch in steps:
        loss = model(**batch, use_cache=False).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def train_all(
    names: list[str], sizes: dict[str, int], adapter: dict[str, Any] | None, dp_size: int
) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and parameters of five steps with each of the optimizers; and their states keep the parameters' shapes."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    result = {}
    for name in names:
        model = build("llama", adapter, num_hidden_layers=1)
        steps = [batches_for(model, dp_size, rows=4, seed=10 + step)[data_rank(accelerator)] for step in range(5)]
        model, optimizer = accelerator.prepare(model, ACCEPTED[name](trainable(model)))
        losses = torch.stack(five_steps(model, optimizer, steps, accelerator.backward))
        dist.all_reduce(losses)
        shapes = {tuple(p.shape) for p in trainable(model)} | {()}
        for state in optimizer.state_dict()["state"].values():
            assert all(tuple(v.shape) in shapes for v in state.values() if isinstance(v, torch.Tensor)), name
        result[name] = ((losses / dist.get_world_size()).tolist(), full_parameters(model))
        accelerator.free_memory()
    return result


CELLS = [
    ("tp2_fsdp2", None, list(ACCEPTED)),
    ("tp2_fsdp2", LORA, ["nesterov", "adamw_groups", "trust_ratio", "schedule_free"]),
    ("tp2", None, ["nesterov", "trust_ratio", "lion"]),
    ("tp2", LORA, ["adagrad", "nadam"]),
    ("fsdp2", None, ["adamax", "trust_ratio"]),
    ("fsdp2", LORA, ["radam", "adamw_groups"]),
]


@pytest.mark.core_cases("tp2-lora", "fsdp2-full")
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c[0]}-{'full' if c[1] is None else 'lora'}")
def test_trains_as_in_one_process(cell):
    mesh, adapter, names = cell
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(world, train_all, names, sizes, adapter, dp_size)[0]
    for name in names:
        check_trained(got[name], ACCEPTED[name], adapter, name)


@pytest.mark.core
def test_each_class_that_is_not_tried_is_trained_here():
    """On tensor-parallel and FSDP2 shards: `test_trains_as_in_one_process[tp2_fsdp2-full]` takes all of ACCEPTED."""
    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    assert ELEMENT_WISE <= {type(make(parameters)) for make in ACCEPTED.values()}


def check_trained(
    got: tuple[list[float], dict[str, torch.Tensor]],
    make: Any,
    adapter: Any,
    name: str,
    loss: float = 1e-6,
    error: float = 1e-4,
) -> None:
    """Losses to `loss`; the change of each parameter to `error` of its size, where rounding reaches 4e-5."""
    model = build("llama", adapter, num_hidden_layers=1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = [batches_for(model, 1, rows=4, seed=10 + step)[0] for step in range(5)]
    losses = five_steps(model, make(trainable(model)), steps, lambda loss: loss.backward())
    assert_losses_equal(got[0], [value.item() for value in losses], loss)
    for parameter, value in model.named_parameters():
        update = (value.detach() - start[parameter]).norm()
        difference = (got[1][parameter] - value.detach()).norm()
        assert difference <= error * update + 1e-7 * value.detach().norm(), (name, parameter, difference / update)


ACCEPTED["muon"] = lambda p: optim.Muon(p, lr=1e-3)


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_muon_orthogonalises_whole_matrices(mesh):
    """torch's Muon on DTensors multiplies across the shards; it iterates in bfloat16, which rounds differently
    there.
    """
    world, sizes, dp_size = MESHES[mesh]
    adapter = {"target_modules": ["q_proj", "down_proj"]}
    got = run_distributed(world, train_all, ["muon"], sizes, adapter, dp_size)[0]
    check_trained(got["muon"], ACCEPTED["muon"], adapter, "muon", loss=1e-4, error=5e-2)


def prepare_with(name: str, sizes: dict[str, int], **options: Any) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **options))
    model = build("llama", num_hidden_layers=1)
    before = dict(model.named_parameters())
    try:
        accelerator.prepare(model, REFUSED[name][0](trainable(model)))
    finally:
        if not options:
            assert all(p is before[n] for n, p in model.named_parameters()), "the model was changed before the refusal"


@pytest.mark.core_cases("adafactor", "trust_ratio_of_shards")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_prepare(name):
    expect_error(2, prepare_with, name, {"dp_shard_size": 2}, match=REFUSED[name][1])


def test_statistics_over_shards_of_tensor_parallelism_are_seen():
    expect_error(2, prepare_with, "trust_ratio_of_shards", {"tp_size": 2}, match="computes something else")


def train_with_closure(name: str, mesh: str) -> tuple[float, int]:
    _, sizes, dp_size = MESHES[mesh]
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, num_hidden_layers=1)
    batch = batches_for(model, dp_size, rows=4)[data_rank(accelerator)]
    model, optimizer = accelerator.prepare(model, optim.LBFGS(trainable(model), lr=0.1, max_iter=4))
    return minimise(model, optimizer, batch, accelerator.backward)


def minimise(model: torch.nn.Module, optimizer: Any, batch: dict, backward: Callable[..., Any]) -> tuple[float, int]:
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        backward(loss)
        calls.append(loss.item())
        return loss

    optimizer.step(closure)
    return calls[-1], len(calls)


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_lbfgs_on_even_shards(mesh):
    """It keeps the list of its group's parameters; one that kept the old list would see no gradients and stop."""
    results = run_distributed(2, train_with_closure, "llama", mesh)
    model = build("llama", num_hidden_layers=1)
    batch = batches_for(model, 1, rows=4)[0]
    loss, calls = minimise(
        model, optim.LBFGS(trainable(model), lr=0.1, max_iter=4), batch, lambda loss: loss.backward()
    )
    assert (results[0][1], calls) == (4, 4)
    assert (results[0][0] + results[1][0]) / 2 == pytest.approx(loss, rel=1e-6)


def test_lbfgs_on_uneven_shards():
    """torch cannot flatten those."""
    expect_error(2, train_with_closure, "llama_odd_vocab", "fsdp2", match="LBFGS does not work on sharded parameters")


def test_the_check_can_be_switched_off():
    run_distributed(2, prepare_with, "closed", {"dp_shard_size": 2}, check_optimizer=False)


def optimizer_after_the_model() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = accelerator.prepare(build("llama", num_hidden_layers=1))
    accelerator.prepare(TrustRatioOfShards(trainable(model), lr=0.1))


def test_an_optimizer_that_comes_later_is_tried_too():
    expect_error(2, optimizer_after_the_model, match="computes something else")


def check_leaves_everything_alone() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build("llama", num_hidden_layers=1)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0)  # as a warm-up leaves it
    torch.manual_seed(5)
    state = torch.get_rng_state()
    accelerator.prepare(model, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.0


def test_the_check_leaves_random_state_and_optimizer_alone():
    run_distributed(2, check_leaves_everything_alone)


def different_rates() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build("llama", num_hidden_layers=1)
    accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1 * (1 + dist.get_rank())))


@pytest.mark.core
def test_ranks_with_different_optimizers_are_refused():
    expect_error(2, different_rates, match="optimizer of rank 1 is not that of rank 0")


class Empty(torch.optim.SGD):
    """Its kernel cannot do without rows, which one rank of a small parameter has not got."""

    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if isinstance(p, DTensor) and dist.get_rank() == 1:
                raise RuntimeError("no rows on this rank")
        super().step(closure)


def fails_on_one_rank() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build("llama", num_hidden_layers=1)
    accelerator.prepare(model, Empty(trainable(model), lr=0.1))


def test_an_optimizer_that_fails_on_one_rank_is_refused_on_all():
    expect_error(2, fails_on_one_rank, match="Empty does not work on sharded parameters.*no rows on this rank")


class Hoarder(torch.optim.SGD):
    """Keeps its parameters in a place of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.by_shape = {"all": [p for group in self.param_groups for p in group["params"]]}


def prepare_hoarder() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = build("llama", num_hidden_layers=1)
    accelerator.prepare(model, Hoarder(trainable(model)))


def test_parameters_kept_elsewhere_are_refused():
    """It would step on parameters that the model no longer has, without a word."""
    expect_error(2, prepare_hoarder, match="Hoarder keeps parameters outside of its param_groups .by_shape: model")


def prepare_with_hooks() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama", num_hidden_layers=1)
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)
    accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))


def test_layer_wise_optimizers_are_refused_by_their_hooks():
    expect_error(2, prepare_with_hooks, match=r"1 parameters have gradient hooks \(lm_head.weight")


def trainer_losses(output_dir: str, choice: str, sizes: dict[str, int] | None, **arguments: Any) -> list[float]:
    """Training and evaluation losses of the stock Trainer, which switches schedule-free optimizers between the two."""
    from transformers import Trainer, TrainingArguments

    model = build("llama", num_hidden_layers=1)
    data = _Rows([batches_for(model, 1, rows=4)[0]])
    args = TrainingArguments(
        output_dir,
        use_cpu=True,
        optim=choice,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4 // (sizes or {}).get("dp_shard_size", 1),
        per_device_eval_batch_size=4 // (sizes or {}).get("dp_shard_size", 1),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=AutoParallelismConfig(**sizes) if sizes is not None else None,
        **arguments,
    )
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def test_schedule_free_in_the_trainer(tmp_path):
    got = run_distributed(4, trainer_losses, str(tmp_path), "schedule_free_adamw", {"tp_size": 2, "dp_shard_size": 2})
    want = trainer_losses(str(tmp_path), "schedule_free_adamw", None)
    assert len(want) == 6
    assert got[0] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    "choice, name", [("adamw_bnb_8bit", "bitsandbytes.AdamW"), ("adafactor", "transformers.Adafactor")]
)
def test_optimizers_of_training_arguments_are_refused(choice, name, tmp_path):
    sizes = {"dp_shard_size": 2}
    expect_error(2, trainer_losses, str(tmp_path), choice, sizes, match=f"{name} does not work on sharded parameters")


def two_steps(sizes: dict[str, int], dp_size: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The change of each trainable parameter in two AdamW steps, all parameters in one group."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    adapter = {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["norm", "lm_head"]}
    model = build("llama", adapter)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batches = batches_for(model, dp_size)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2, **options))
    for _ in range(2):
        accelerator.backward(model(**batches[data_rank(accelerator)], use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p - before[n] for n, p in full_parameters(model).items() if n in before}


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_fused_and_foreach_adamw(mesh):
    """Stock: DTensors and plain tensors in one group crash both; here every parameter is a DTensor."""
    world, sizes, dp_size = MESHES[mesh]
    loop, fused, foreach = (
        run_distributed(world, two_steps, sizes, dp_size, options)[0]
        for options in ({"foreach": False}, {"fused": True}, {"foreach": True})
    )
    assert any("norm" in name for name in loop) and any("lora_A" in name for name in loop)
    for name, change in loop.items():
        assert change.abs().max() > 1e-3, f"{name} has not moved"
        torch.testing.assert_close(fused[name], change, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(foreach[name], change, rtol=1e-4, atol=1e-6)


LARGE = {"w": (128, 130), "b": (16384,), "e": (4, 64, 64)}
SMALL = {"w": (64, 96), "b": (4160,)}


def tried_on_shards(sizes: dict[str, int], cases: list[tuple[Any, dict[str, tuple[int, ...]]]]) -> list[str]:
    """What the check of each optimizer class says for parameters of these shapes; empty if it passes."""
    mesh = Accelerator(parallelism_config=AutoParallelismConfig(**sizes)).torch_device_mesh
    tp_mesh = mesh["tp"] if "tp" in mesh.mesh_dim_names else None
    messages = []
    for kind, shapes in cases:
        optimizer = kind([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes.values()], lr=0.1)
        full = {name: torch.Size(shape) for name, shape in shapes.items()}
        specs = {name: ParameterSpec(0) for name in shapes} if tp_mesh is not None else {}
        try:
            check_on_shards([optimizer], [[list(shapes)]], full, specs, mesh["dp_shard"], tp_mesh, torch.device("cpu"))
            messages.append("")
        except UnsupportedError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2"])
def test_optimizers_that_treat_large_tensors_differently(mesh):
    """A tensor at the threshold would be large as a whole and small as shards: then the trial, not the optimizer, is
    wrong. Small tensors are compared strictly; where shards are large, large ones are tried, too.
    """
    cases = [(QuantizedAdam, LARGE), (QuantizedAdam, SMALL), (QuantizedOnWholeTensorsAlone, SMALL)]
    cases += [(QuantizedOnWholeTensorsAlone, LARGE), (TrustRatioOfShards, SMALL)]
    *accepted, large, statistic = run_distributed(2, tried_on_shards, MESHES[mesh][1], cases)[0]
    assert accepted == [""] * 3
    assert "does not work on sharded parameters (DTensors): AssertionError: wrong number of dimensions" in large
    assert "TrustRatioOfShards computes something else" in statistic
