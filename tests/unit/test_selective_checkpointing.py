"""Selective checkpoints: between none and full in memory and work, exact also with dropout, and usable on their own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import vision_language
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.models import LORA_7, build_model, lora, make_batches
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_automodel_parallel import UnsupportedError, activation_checkpointing, apply_selective_activation_checkpointing
from hf_automodel_parallel.activation_checkpointing import (
    FULL,
    SELECTIVE,
    checkpoint_module,
    checkpointable_parts,
    is_checkpointed,
)
from hf_automodel_parallel.core.model_structure import find_layers

MODES = ("none", "selective", "submodule", "full")


def checkpointed(model: nn.Module, mode: str) -> nn.Module:
    for layer in find_layers(model):
        if mode == "submodule":
            for part in checkpointable_parts(layer):
                checkpoint_module(part)
        elif mode != "none":
            checkpoint_module(layer, SELECTIVE if mode == "selective" else FULL)
    return model.train()


def step(model: nn.Module, length: int = 16, seed: int = 5) -> tuple[float, dict[str, torch.Tensor | None]]:
    torch.manual_seed(seed)
    batch = make_batches(1, 2, length, model.config.vocab_size, seed=3)[0]
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


# ---- memory and work -----------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of what operators have made and somebody still holds: the graph, or the store of a selective checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        return output

    def live(self, without: nn.Module) -> int:
        weights = {StorageWeakRef(t.untyped_storage()).cdata for t in [*without.parameters(), *without.buffers()]}
        return sum(
            size
            for cdata, (reference, size) in self.storages.items()
            if cdata not in weights and not reference.expired()
        )


def measure(mode: str, adapter: bool) -> tuple[int, int]:
    """Bytes alive between forward and backward, and FLOPs of the backward."""
    model = build_model("llama", num_hidden_layers=4)
    model = checkpointed(lora(model) if adapter else model, mode)
    batch = make_batches(1, 2, 64, model.config.vocab_size, seed=3)[0]
    with LiveBytes() as memory:
        loss = model(**batch, use_cache=False).loss
    held = memory.live(without=model)
    with FlopCounterMode(display=False) as flops:
        loss.backward()
    return held, flops.get_total_flops()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_memory_and_work_lie_between_none_and_full(adapter):
    held, flops = zip(*(measure(mode, adapter) for mode in MODES), strict=True)
    again = [value - flops[0] for value in flops]
    table = Table(
        "checkpointing", "activations held", "recomputed FLOPs", title=f"Llama, {'LoRA' if adapter else 'full'}"
    )
    for mode, size, work in zip(MODES, held, again, strict=True):
        table.add_row(mode, f"{size / held[0]:.0%}", f"{work / again[-1]:.0%} of full's")
    Console().print(table)
    by_mode = dict(zip(MODES, zip(held, again, strict=True), strict=True))
    none, selective, full = by_mode["none"], by_mode["selective"], by_mode["full"]
    assert full[0] < 0.9 * selective[0] < 0.9 * 0.9 * none[0]
    assert none[1] == 0 < selective[1] < 0.6 * full[1]


# ---- random numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name, options, adapter",
    [
        ("llama", {"attention_dropout": 0.1}, {"target_modules": LORA_7, "lora_dropout": 0.1}),
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}, None),
    ],
    ids=["llama-lora", "gpt2"],
)
def test_dropout_is_recomputed_alike(name, options, adapter, implementation):
    def run(mode):
        model = build_model(name, attn_implementation=implementation, **options)
        return step(checkpointed(model if adapter is None else lora(model, **adapter), mode))

    (want_loss, want), (loss, gradients) = run("none"), run("selective")
    assert loss == want_loss
    assert_gradients_equal(gradients, want)


@torch.library.custom_op("hfap_tests::random_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_attention(x: torch.Tensor, dropout_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As the fused attention of a GPU: one operator that draws its own mask, if its dropout is active."""
    mask = torch.rand_like(x) >= dropout_p if dropout_p else torch.ones_like(x, dtype=torch.bool)
    return x * mask, mask


random_attention.register_autograd(
    lambda ctx, gradient, _: (gradient * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, p: float) -> torch.Tensor:
        x = F.dropout(F.silu(self.first(x)), 0.3)
        x, _ = random_attention(x, p)
        return F.silu(self.second(F.dropout(x, 0.3)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_operator_that_draws_is_never_kept(p, monkeypatch):
    """Kept, it would not draw in the recomputation, and every dropout after it would get other numbers."""
    operator = torch.ops.hfap_tests.random_attention.default
    kept = activation_checkpointing._ALWAYS_SAVED | {operator}
    monkeypatch.setattr(activation_checkpointing, "_ALWAYS_SAVED", kept)
    calls = []
    real = activation_checkpointing._draws
    monkeypatch.setattr(
        activation_checkpointing, "_draws", lambda *call: calls.append((call[0], real(*call))) or calls[-1][1]
    )

    def gradients(selective: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = Attending()
        if selective:
            checkpoint_module(layer, SELECTIVE)
        layer(torch.randn(4, 8), p).square().sum().backward()
        return [parameter.grad for parameter in layer.parameters()]

    want, got = gradients(False), gradients(True)
    assert (operator, p > 0) in calls
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_fused_attention_draws_only_with_dropout():
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert torch.Tag.nondeterministic_seeded in flash.tags
    draws = activation_checkpointing._draws
    assert not draws(flash, (1, 2, 3), {}) and not draws(flash, (1, 2, 3, 0.0), {})
    assert draws(flash, (1, 2, 3, 0.1), {}) and draws(flash, (1, 2, 3), {"dropout_p": 0.1})
    assert draws(torch.ops.aten.native_dropout.default, (1, 0.1, True), {})
    assert not draws(torch.ops.aten.mm.default, (1, 2), {})


class AddsInPlace(nn.Module):
    """As the alternating updates of Gemma3n: a batched product, reshaped, gets its residual added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.matmul(x, self.weight)
        product += x
        return product.square()


@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8)], ids=["plain", "reshaped"])
def test_writing_into_something_kept_is_an_error(shape):
    layer = AddsInPlace()
    checkpoint_module(layer, SELECTIVE)
    with pytest.raises(UnsupportedError, match="in place .*add_"):
        layer(torch.randn(*shape))


# ---- on one device -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("adapter", [None, {"lora_dropout": 0.1}], ids=["full", "lora"])
def test_alone_on_one_device(adapter, compiled, monkeypatch):
    assert not torch.distributed.is_initialized()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def model():
        return build_model("llama") if adapter is None else lora(build_model("llama"), **adapter)

    plain, selective = model(), model()
    config, keys = plain.config.to_dict(), list(plain.state_dict())
    apply_selective_activation_checkpointing(selective, enable_compile=compiled)
    want_loss, want = step(plain.train())
    loss, gradients = step(selective.train())
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert selective.config.to_dict() == config and list(selective.state_dict()) == keys
    if not compiled:
        assert all(is_checkpointed(layer) for layer in find_layers(selective))


def test_a_model_around_another_that_fills_a_cache():
    """Its forward does not name the argument that says so."""
    plain, selective = (vision_language.build("llava").train() for _ in range(2))
    apply_selective_activation_checkpointing(selective)
    batch = vision_language.batch("llava", [1, 1])
    for model in (plain, selective):
        model(**batch).loss.backward()
    want = {name: p.grad for name, p in plain.named_parameters()}
    assert_gradients_equal({name: p.grad for name, p in selective.named_parameters()}, want)


def test_alone_it_is_refused_where_it_would_do_nothing_or_double_work():
    model = build_model("llama")
    apply_selective_activation_checkpointing(model)
    with pytest.raises(UnsupportedError, match="checkpointed already"):
        apply_selective_activation_checkpointing(model)
    model = build_model("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient_checkpointing_enable"):
        apply_selective_activation_checkpointing(model)
    with pytest.raises(UnsupportedError, match="no repeated layers"):
        apply_selective_activation_checkpointing(nn.Linear(2, 2))
