"""Hooks that users register on modules of a model: what the ranks run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import full_grads, mean_over_ranks
from harness.models import build_model, lora, make_batches
from harness.training import data_rank, trainable
from torch import nn
from torch.nn.utils import prune

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.core.rendezvous import TIMEOUT_VARIABLE
from hf_automodel_parallel.errors import UnsupportedError

Penalties = list[torch.Tensor]


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Fake quantisation with one scale for each token, and a straight-through gradient."""
    scale = x.detach().abs().amax(-1, keepdim=True) / 7
    return x + (torch.round(x / scale) * scale - x).detach()


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).add(1e-3).sqrt()


def doubled_in_place(x: torch.Tensor) -> None:
    x[..., :3].mul_(2)


def pre(function: Callable[[torch.Tensor], Any], **options: bool) -> Callable[[nn.Module, Penalties], None]:
    """Register a forward pre-hook that gives the first argument to ``function``."""

    def register(module: nn.Module, penalties: Penalties) -> None:
        module.register_forward_pre_hook(lambda _, args: function(args[0]), **options)

    return register


def post(function: Callable[[torch.Tensor], Any], **options: bool) -> Callable[[nn.Module, Penalties], None]:
    """Register a forward hook that gives the output to ``function``."""

    def register(module: nn.Module, penalties: Penalties) -> None:
        module.register_forward_hook(lambda _, args, output: function(output), **options)

    return register


def penalised(module: nn.Module, penalties: Penalties) -> None:
    """Penalties on inputs and outputs, which enter the loss."""
    module.register_forward_pre_hook(lambda _, args: penalties.append(args[0].square().mean(-1).max()))
    module.register_forward_hook(
        lambda _, args, output: penalties.append(args[0].std(-1).max() + output.softmax(-1)[..., 1].sum())
    )


def by_keyword(module: nn.Module, penalties: Penalties) -> None:
    module.register_forward_pre_hook(lambda _, args, kwargs: ((normalised(args[0]),), kwargs), with_kwargs=True)
    module.register_forward_hook(lambda _, args, kwargs, output: output + quantised(output), with_kwargs=True)


def counts_ids(module: nn.Module, penalties: Penalties) -> None:
    """What is done to an embedding depends on the ids that it is called with."""
    module.register_forward_pre_hook(lambda _, args: (args[0].clamp(max=100),))
    module.register_forward_hook(lambda _, args, output: output * (args[0] + 2).unsqueeze(-1).log(), prepend=True)


def steered(module: nn.Module, penalties: Penalties) -> None:
    module.register_forward_hook(lambda _, args, output: (normalised(output[0]), *output[1:]))


LAYER = "model.layers.1"
#: Model -> module -> how a hook is registered on it.
SEEN_IN_FULL: dict[str, dict[str, Callable[[nn.Module, Penalties], None]]] = {
    "llama": {
        f"{LAYER}.mlp.down_proj": pre(quantised),
        f"{LAYER}.mlp.up_proj": post(quantised, prepend=True),
        f"{LAYER}.mlp.gate_proj": by_keyword,
        f"{LAYER}.self_attn.o_proj": penalised,
        f"{LAYER}.self_attn.q_proj": post(normalised),
        f"{LAYER}.self_attn.v_proj": post(doubled_in_place),
        f"{LAYER}.self_attn": steered,
        "model.layers.0.mlp.down_proj": pre(doubled_in_place),
        "model.layers.0.mlp.up_proj": penalised,
        "model.layers.0.self_attn.o_proj": pre(quantised),
        "model.layers.0.self_attn.q_proj": pre(quantised, prepend=True),
        "model.embed_tokens": counts_ids,
        "model.norm": post(normalised),
        "lm_head": penalised,
    },
    # Fused projections, whose slices of the features are no contiguous ones.
    "gpt2": {
        "transformer.h.0.attn.c_attn": penalised,
        "transformer.h.1.attn.c_attn": post(lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1])),
        "transformer.h.1.mlp.c_proj": pre(quantised),
    },
    # Ranks share the one key/value head.
    "llama_mqa": {
        "model.layers.0.self_attn.k_proj": post(lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1])),
        "model.layers.0.self_attn.v_proj": penalised,
    },
}


def batches(parts: int) -> list[dict[str, torch.Tensor]]:
    return make_batches(parts, 4 // parts, 16, 128, seed=3)


def hooked_loss(model: nn.Module, batch: dict[str, torch.Tensor], penalties: Penalties) -> torch.Tensor:
    loss = model(**batch, use_cache=False).loss
    loss = loss + 0.1 * sum(penalties)
    penalties.clear()
    return loss


def register(name: str, model: nn.Module, penalties: Penalties) -> None:
    for path, how in SEEN_IN_FULL[name].items():
        how(model.get_submodule(path), penalties)


def in_one_process(name: str, parts: int) -> tuple[float, dict[str, torch.Tensor | None]]:
    model, penalties = build_model(name).train(), []
    register(name, model, penalties)
    total = 0.0
    for batch in batches(parts):
        loss = hooked_loss(model, batch, penalties) / parts
        loss.backward()
        total += loss.item()
    return total, {key: p.grad for key, p in model.named_parameters()}


def hooked_gradients(
    cases: list[tuple[str, str]], sizes: dict[str, Any], dp_size: int
) -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    """Loss and gradients of each model with hooks that were registered "before" or "after" ``prepare``."""
    results = []
    for name, when in cases:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, audit="off"))
        model, penalties = build_model(name).train(), []
        if when == "before":
            register(name, model, penalties)
        model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
        if when == "after":
            register(name, model, penalties)
        loss = hooked_loss(model, batches(dp_size)[data_rank(accelerator)], penalties)
        accelerator.backward(loss)
        results.append((mean_over_ranks(loss), full_grads(model)))
        accelerator.state._reset_state()
    return results


def nothing(*_: Any) -> None:
    """A hook that looks at nothing, which cannot be known."""


MLP, ATTENTION = f"{LAYER}.mlp", f"{LAYER}.self_attn"
ADAPTED = "base_model.model."
#: (model, adapter, module, how a hook is registered)
REFUSED: list[tuple[str, bool, str, Callable[[nn.Module], Any]]] = [
    ("llama", False, f"{MLP}.act_fn", lambda module: module.register_forward_hook(nothing)),
    ("llama", False, f"{MLP}.act_fn", lambda module: module.register_forward_pre_hook(functools.partial(nothing))),
    ("llama", False, f"{ATTENTION}.q_proj", lambda module: module.register_full_backward_hook(nothing)),
    ("llama", False, "lm_head", lambda module: module.register_full_backward_hook(nothing)),
    ("qwen3", False, f"{ATTENTION}.q_norm", lambda module: module.register_forward_hook(nothing)),
    ("mixtral", False, f"{MLP}.experts", lambda module: module.register_forward_hook(nothing)),
    (
        "llama",
        True,
        f"{ADAPTED}{ATTENTION}.q_proj.lora_A.default",
        lambda module: module.register_forward_hook(nothing),
    ),
]
#: The same; what is computed before each forward is refused only by ``prepare``.
COMPUTED_WEIGHTS: list[tuple[str, bool, str, Callable[[nn.Module], Any]]] = [
    ("llama", False, f"{ATTENTION}.q_proj", torch.nn.utils.weight_norm),
    ("llama", False, "lm_head", lambda module: prune.random_unstructured(module, "weight", 0.3)),
]


def messages(cases: list[tuple[str, int]], sizes: dict[str, Any]) -> list[str]:
    """What is raised for each (when, number of an entry of ``REFUSED + COMPUTED_WEIGHTS``)."""
    said = []
    for when, number in cases:
        name, adapter, path, attach = (REFUSED + COMPUTED_WEIGHTS)[number]
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, audit="off"))
        model = build_model(name).train()
        model = lora(model) if adapter else model
        try:
            if when == "before":
                attach(model.get_submodule(path))
            model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
            if when == "after":
                attach(model.get_submodule(path))
            model(**batches(1)[0], use_cache=False)
            said.append("nothing")
        except UnsupportedError as error:
            said.append(str(error))
        accelerator.state._reset_state()
    return said


def observing(*_: Any) -> None:
    """A hook that says that it may see shards."""


observing.sees_shards = True  # type: ignore[attr-defined]


def on_rank_0_alone() -> str:
    """What a rank says when a hook that needs an all-gather is registered on rank 0 only, behind one that observes."""
    os.environ[TIMEOUT_VARIABLE] = "2"
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, audit="off"))
    model = build_model("llama").train()
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
    model.get_submodule(f"{MLP}.act_fn").register_forward_hook(observing)
    if dist.get_rank() == 0:
        model.lm_head.register_forward_hook(nothing)  # behind it the other rank has no collective to wait in
    try:
        model(input_ids=batches(1)[0]["input_ids"], use_cache=False)
        return "nothing"
    except UnsupportedError as error:
        return str(error)
