"""A plan that forgets a parameter between sharded projections must not train on silently."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from peft import LoraConfig
from torch import nn

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin.prepared import prepared
from hf_automodel_parallel.audit import GradientAuditError
from hf_automodel_parallel.core.forward_stack import ForwardSlot, ForwardStack
from hf_automodel_parallel.strategies import default


class ScaledActivation(nn.Module):
    """An activation with a learnable scale per call, such as xIELU's.

    Args:
        looks: it reads a number, so that it cannot be run without values, and nobody sees before the first step what it
            does.
    """

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.1]))
        self.looks = looks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.looks and not bool(x.detach().isfinite().all()):
            raise FloatingPointError("not finite")
        return nn.functional.silu(x) * self.scale


def one_step(sizes: dict, plan_the_scale: bool, raw_loop: bool = False, looks: bool = True) -> float:
    """A Llama whose activation has a parameter that its ``_tp_plan`` does not know; returns the scale after a step."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = ScaledActivation(looks)
    plan = None
    if plan_the_scale:
        plan = {**model.tp_plan, "model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, tp_plan=plan))
    # The trial by values finds the scale too; without it the audit is what is left.
    with patch.object(default, "proven_plan", lambda inner, plan: plan):
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    dp = accelerator.parallelism_config.data_parallel_size
    loss = model(**batches_for(model, dp)[data_rank(accelerator)]).loss
    loss.backward() if raw_loop else accelerator.backward(loss)
    optimizer.step()
    return model.model.layers[0].mlp.act_fn.scale.full_tensor().item()


@pytest.mark.core
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_size": 2, "dp_shard_size": 2}], ids=["tp2", "tp2_fsdp2"])
def test_forgotten_partial_gradient_is_an_error_at_the_first_step(sizes):
    world = 2 if len(sizes) == 1 else 4
    messages = expect_error(world, one_step, sizes, False, match=r"mlp\.act_fn\.scale")
    assert all("replicated_with_grad_allreduce" in message for message in messages)


def test_raw_loop_is_audited_too():
    expect_error(2, one_step, {"tp_size": 2}, False, raw_loop=True, match="different gradients on the ranks")


def test_the_remedy_in_the_message_is_right():
    """With the plan entry that the message proposes, the step is the one of a single process."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = ScaledActivation()
    model(**batches_for(model, 1)[0]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    want = model.model.layers[0].mlp.act_fn.scale.item()
    got = run_distributed(2, one_step, {"tp_size": 2}, True)
    assert got == pytest.approx([want, want], rel=1e-6)
    # What can be run without values is understood before the first step.
    got = run_distributed(2, one_step, {"tp_size": 2}, False, looks=False)
    assert got == pytest.approx([want, want], rel=1e-6)


def silent_steps(name: str, adapter: dict | None) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build(name, adapter)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    for _ in range(2):
        accelerator.backward(model(**batches_for(model, 1)[0]).loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.core_cases("moe")
@pytest.mark.parametrize(
    "name, adapter",
    [("qwen3_moe", None), ("llama", {**LORA, "init_lora_weights": True}), ("gemma3", LORA)],
    ids=["moe", "default_init", "gemma3"],
)
def test_no_false_alarm(name, adapter):
    """Zero gradients of lora_A at the default initialisation, routers, head norms: all fine."""
    run_distributed(2, silent_steps, name, adapter)


# ---- faults that are planted ----------------------------------------------------------------------------------------


def compiled_without_gradients(model: nn.Module) -> None:
    """What reentrant checkpointing does to a part that is compiled: its first forward has no gradients, and stays
    so.
    """
    attention = model.get_submodule("base_model.model.model.layers.1.self_attn")
    forward = attention.forward

    def forward_only(*args, **kwargs):
        with torch.no_grad():
            return forward(*args, **kwargs)

    attention.forward = forward_only


def compiled_call_without_gradients(model: nn.Module) -> None:
    """The same with ``Module.compile``, which hides the module's own hooks too."""
    compiled_without_gradients(model)
    model.get_submodule("base_model.model.model.layers.1.self_attn").compile(backend="eager")


def detached_adapter(model: nn.Module) -> None:
    lora_b = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_B.default")
    lora_b.forward = lambda x: nn.functional.linear(x, lora_b.weight).detach()


def detached_weight(model: nn.Module) -> None:
    lora_a = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default")
    lora_a.forward = lambda x: nn.functional.linear(x, lora_a.weight.detach())


def drifted_replica(model: nn.Module) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            model.get_parameter("base_model.model.model.layers.1.input_layernorm.weight").to_local()[3] += 1e-4


def unfrozen_norm(model: nn.Module) -> None:
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)


def frozen_bias_of_nobody(model: nn.Module) -> None:
    """A part that was to be trained, frozen after prepare."""
    model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").requires_grad_(False)


def hooked_gradient(model: nn.Module) -> None:
    """FSDP2 sets the gradients of shards itself."""
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    model.get_parameter(name).register_hook(lambda gradient: gradient * 0)


def early_hook(model: nn.Module) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    model.get_parameter(name).register_post_accumulate_grad_hook(lambda parameter: None)


def summand_past_its_hook(model: nn.Module) -> None:
    """A use of a parameter of which nobody says that it yields a summand."""
    layer = model.get_submodule("base_model.model.model.layers.1")
    scope = ForwardStack.of(layer).get(ForwardSlot.LOCAL_PARAMETERS)
    scope.bindings[:] = [
        dataclasses.replace(e, on_gradient=None) if "up_proj.lora_A" in name_of(model, e.owner) else e
        for e in scope.bindings
    ]


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


FAULTS = {
    "early_hook": (early_hook, r"up_proj\.lora_B.*post_accumulate.*before gradients are complete"),
    "summand_past_its_hook": (summand_past_its_hook, r"1 replicated parameters .*up_proj\.lora_A.*different gradients"),
    "hooked": (
        hooked_gradient,
        r"1 parameters \(.*up_proj\.lora_B.*\) have hooks on their gradients.*are never called",
    ),
    "compiled": (compiled_without_gradients, r"layers\.1\.self_attn.*no gradient.*compiled while gradients were off"),
    "compiled_call": (compiled_call_without_gradients, r"layers\.1\.self_attn.*no gradient"),
    "detached_adapter": (detached_adapter, r"layers\.0\.mlp\.down_proj\.lora_A.*no gradient"),
    "detached_weight": (
        detached_weight,
        r"1 trainable parameters \(.*q_proj\.lora_A.default.weight\) have no gradient",
    ),
    "drift": (drifted_replica, r"1 replicated parameters .*layers\.1\.input_layernorm.*different values"),
    "unfrozen": (unfrozen_norm, r"1 parameters \(base_model\.model\.model\.norm\.weight\) were frozen"),
    "frozen": (frozen_bias_of_nobody, r"lm_head.* were trainable .* frozen now"),
}


def clipping_forward(model: nn.Module) -> None:
    """FSDP2 computes with a copy, so what is written to it in a forward is lost, before the module itself runs, too."""
    layer = model.get_submodule("base_model.model.model.layers.1")
    weight_of = layer.self_attn.q_proj.lora_A.default

    def clip(*_: object) -> None:
        with torch.no_grad():
            weight_of.weight.clamp_(-1e-3, 1e-3)

    layer.input_layernorm.register_forward_hook(clip)


WITHOUT_TP = {
    "written": (clipping_forward, r"1 parameters \(.*layers\.1.*lora_A.*\) were changed in place by a forward")
}


def faulty_step(sizes: dict, fault: str, config: dict | None = None, **arguments) -> int:
    """One step with a planted fault; returns how many steps were audited."""
    model = build("llama", {**LORA, "modules_to_save": ["lm_head"]})
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **(config or {})))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    (FAULTS | WITHOUT_TP)[fault][0](model)
    dp = accelerator.parallelism_config.data_parallel_size
    accelerator.backward(model(**batches_for(model, dp)[data_rank(accelerator)]).loss)
    optimizer.step()
    return prepared(model).audit.done


@pytest.mark.core_cases("early_hook", "drift")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_an_error_at_the_first_step(fault):
    """On all ranks, with the names, the cause and the remedy."""
    for message in expect_error(2, faulty_step, {"tp_size": 2}, fault, match=FAULTS[fault][1]):
        assert "Remedy" in message


@pytest.mark.core_cases("detached_adapter")
@pytest.mark.parametrize("fault", ["detached_adapter", "drift", *WITHOUT_TP])
def test_planted_fault_without_tensor_parallelism(fault):
    """FSDP2 alone loses gradients as well; a copy to drift exists where there are replicas."""
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 1} if fault == "drift" else {"dp_shard_size": 2}
    expect_error(2, faulty_step, sizes, fault, match=(FAULTS | WITHOUT_TP)[fault][1])


def test_audit_can_be_switched_off():
    assert run_distributed(2, faulty_step, {"tp_size": 2}, "detached_adapter", {"audit": "off"}) == [0, 0]


def late_fault(audit: str) -> int:
    """Nine sound steps, then a detached adapter; returns the step (from 1) whose audit raises, 0 for none."""
    model = build("llama", LORA)
    config = {"audit": audit, "audit_steps": 4} if audit == "every_n_steps" else {"audit": audit}
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, **config))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.01))
    for step in range(1, 15):
        if step == 10:
            detached_adapter(model)
        accelerator.backward(model(**batches_for(model, 1)[0]).loss)
        try:
            optimizer.step()
        except GradientAuditError:
            return step
        optimizer.zero_grad()
    return 0


@pytest.mark.parametrize("audit, want", [("first_step", 0), ("every_n_steps", 13)])
def test_every_n_steps(audit, want):
    """The audit of step 1 says nothing about step 10; with every_n_steps and n = 4, step 13 is the next that is looked
    at.
    """
    assert run_distributed(2, late_fault, audit) == [want, want]


def hooks_left(audit: str) -> tuple[int, int, int]:
    """Forward hooks before prepare's audit, before the first step and after it."""
    model = build("llama", LORA)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, audit=audit))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.01))

    def count() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    armed = count()
    for _ in range(2):
        accelerator.backward(model(**batches_for(model, 1)[0]).loss)
        optimizer.step()
    return armed, count(), prepared(model).audit.done


@pytest.mark.core
def test_it_costs_nothing_later():
    """Not one hook of the audit stays after the step that it looked at."""
    armed, left, done = run_distributed(2, hooks_left, "first_step")[0]
    assert (armed > left, done) == (True, 1)
    assert left == run_distributed(2, hooks_left, "off")[0][0]


# ---- no false alarm -------------------------------------------------------------------------------------------------


class ListedExperts(nn.Module):
    """Experts as modules of their own, of which each token takes one: some experts get no token at all."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[3](x) + self.experts[5](x)


class NullToken(nn.Module):
    """Replaces its input in some training steps only; in this one it hands the input back."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Pooled(nn.Module):
    """A model with parts that take no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(ListedExperts(16) for _ in range(2))
        self.tower = nn.Linear(16, 16)  # not run: the batch has no images
        self.pooler = nn.Sequential(nn.Linear(16, 16), nn.Tanh())  # runs, but nobody uses what it returns
        self.null = NullToken()
        self.mask_token = nn.Parameter(torch.zeros(16))  # used in pre-training only

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.body:
            x = x + layer(self.null(x))
        return x, self.pooler(x)


def unused_parts() -> int:
    torch.manual_seed(0)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    model = Pooled()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.randn(4, 16))[0].sum())
    optimizer.step()
    return prepared(model).audit.done


def test_no_false_alarm_for_parts_that_take_no_part():
    """Experts not hit, a tower that did not run, a pooler nobody used, tokens for other tasks."""
    assert run_distributed(2, unused_parts) == [1, 1]


def two_adapters() -> int:
    model = build("llama", LORA)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.set_adapter("second")  # freezes the first adapter, makes this one trainable
    accelerator.backward(model(**batches_for(model, 1)[0]).loss)
    optimizer.step()
    return prepared(model).audit.done


def test_no_false_alarm_for_adapters_that_are_switched():
    assert run_distributed(2, two_adapters) == [1, 1]


def evaluated_first() -> int:
    """Forwards without gradients, then a step without any gradient (to please a scheduler), then training."""
    model = build("llama", LORA)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    with torch.no_grad():
        model(**batches_for(model, 1)[0])
    optimizer.step()
    assert prepared(model).audit.done == 0
    accelerator.backward(model(**batches_for(model, 1)[0]).loss)
    optimizer.step()
    return prepared(model).audit.done


def test_evaluation_and_empty_steps_are_not_audited():
    assert run_distributed(2, evaluated_first) == [1, 1]


def rows_by_process(lengths: bool) -> None:
    """The rows of a stock data-parallel script: each process its own, also where processes form a tp group."""
    model = build("llama", LORA)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    batch = batches_for(model, 2)[accelerator.process_index]
    if lengths:
        batch = {key: value[:, : 8 + 2 * accelerator.process_index] for key, value in batch.items()}
    accelerator.backward(model(**batch).loss)
    optimizer.step()


@pytest.mark.parametrize(
    "lengths, message",
    [
        (False, "were given different batches and train on a mixture"),
        (True, r"were given different batches and cannot run .*\[2, 8\].* rank 1 of the group .*\[2, 10\]"),
    ],
)
def test_different_batches_in_a_tp_group(lengths, message):
    """Activations and gradients come out equal on both ranks, those of a mixture; only the inputs tell. Of different
    lengths there is no forward: gloo aborts the process.
    """
    expect_error(2, rows_by_process, lengths, match=message)


def skipped_step() -> int:
    """A step that a scaler skips used a module that the next step does not use."""
    model = build("llama", LORA)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    batch = batches_for(model, 1)[0]
    accelerator.backward(model(**batch).loss)
    optimizer.zero_grad()  # not stepped
    model.base_model.model.model.layers[1].mlp.forward = lambda x: x  # this time nobody calls what is inside
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    return prepared(model).audit.done


def test_no_false_alarm_after_a_skipped_step():
    assert run_distributed(2, skipped_step) == [1, 1]


def later_adapter(held: bool) -> int:
    """An adapter added after the audited step, with and without an optimizer for it."""
    model = build("llama", LORA)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    batch = batches_for(model, 1)[0]
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))
    model.set_adapter("third")
    if held:
        optimizer = accelerator.prepare(torch.optim.SGD(trainable(model), lr=0.1))
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    return prepared(model).audit.done


def test_an_adapter_that_comes_later_needs_an_optimizer():
    expect_error(2, later_adapter, False, match="third.* in no optimizer")
    assert run_distributed(2, later_adapter, True) == [1, 1]


def alternating() -> int:
    """Two optimizers that take turns; what the other one trains is frozen meanwhile."""
    model = build("llama")
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    parts = [list(model.model.layers.parameters()), [p for n, p in model.named_parameters() if ".layers." not in n]]
    model, first, second = accelerator.prepare(model, *(torch.optim.SGD(part, lr=0.1) for part in parts))
    for p in (p for group in second.param_groups for p in group["params"]):
        p.requires_grad_(False)
    accelerator.backward(model(**batches_for(model, 1)[0]).loss)
    first.step()
    return prepared(model).audit.done


def frozen_before_its_optimizer() -> int:
    """PreparedModel to be evaluated; then a part is frozen, and the rest is trained."""
    model = build("llama")
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = accelerator.prepare(model)
    model.model.embed_tokens.requires_grad_(False)
    optimizer = accelerator.prepare(torch.optim.SGD(trainable(model), lr=0.1))
    accelerator.backward(model(**batches_for(model, 1)[0]).loss)
    optimizer.step()
    return prepared(model).audit.done


@pytest.mark.parametrize("job", [alternating, frozen_before_its_optimizer], ids=lambda job: job.__name__)
def test_no_false_alarm_for_what_is_frozen_on_purpose(job):
    assert run_distributed(2, job) == [1, 1]


def test_an_overflow_does_not_use_up_the_audit():
    assert run_distributed(2, audit_of_an_overflow) == [[False, True]] * 2


def audit_of_an_overflow() -> list[bool]:
    from hf_automodel_parallel.accelerate_plugin.prepared import prepared

    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
    audited = []
    for factor in (float("inf"), 1.0):
        accelerator.backward(model(**batches_for(model, 1)[0]).loss)
        if factor != 1.0:
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.param_groups[0]["params"] = []  # the hook looks at the model; the values must survive
        optimizer.step()
        if factor != 1.0:
            optimizer.param_groups[0]["params"] = parameters
        optimizer.zero_grad()
        audit = prepared(model).audit
        audited.append(audit is not None and audit.done > 0)
    return audited
