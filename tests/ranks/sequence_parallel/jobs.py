"""What the ranks run in the tests of sequence parallelism. Functions here are sent to the worker pool by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from harness.compare import full_grads, mean_over_ranks
from harness.models import COMMON, make_batches, randomize
from harness.training import build, data_rank, trainable
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.errors import UnsupportedError

#: A length that neither 2 nor 4 divides.
ODD = 15


def batches_of(
    model: torch.nn.Module, parts: int, length: int = ODD, rows: int = 4, seed: int = 3
) -> list[dict[str, torch.Tensor]]:
    """`parts` micro-batches of the given length."""
    return make_batches(parts, rows // parts, length, model.config.vocab_size, seed)


def sequence_gradients(
    name: str,
    sizes: dict[str, Any],
    adapter: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    dp_size: int = 1,
    lengths: tuple[int, ...] = (ODD,),
    own_checkpointing: dict[str, Any] | None = None,
    frozen: str = "",
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Loss and gradients of one step with sequence parallelism; one micro-batch of each length, backwards after all
    forwards.

    Parameters whose name contains `frozen` do not train.
    """
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**{"sequence_parallel": True, **sizes}))
    model = build(name, adapter, **(overrides or {})).train()
    freeze(model, frozen)
    if own_checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=own_checkpointing)
    batches = [batches_of(model, dp_size, length) for length in lengths]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    mine = data_rank(accelerator)
    losses = [model(**parts[mine], use_cache=False).loss / len(lengths) for parts in batches]
    loss = torch.stack(losses).sum()
    accelerator.backward(loss)
    assert all(p.requires_grad == (not frozen or frozen not in n) for n, p in model.named_parameters() if not adapter)
    return mean_over_ranks(loss), full_grads(model)


def freeze(model: torch.nn.Module, part: str) -> None:
    """Stop training what has `part` in its name."""
    for name, parameter in model.named_parameters():
        if part and part in name:
            parameter.requires_grad_(False)


def outputs(model: torch.nn.Module, backward: Any = torch.Tensor.backward) -> dict[str, list[torch.Tensor]]:
    """What callers can look at, training and evaluating."""
    batch = batches_of(model, 1)[0]
    wanted = {"output_hidden_states": True, "use_cache": False}
    result: dict[str, list[torch.Tensor]] = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            out = model(**batch, **wanted)
            result[f"{mode} as tuple"] = list(model(**batch, **wanted, return_dict=False)[2])
        result[f"{mode} hidden states"] = list(out.hidden_states)
        result[f"{mode} logits"] = [out.logits]
        if mode == "train":
            # Consumers that are the same on all ranks: of shares, of the gathered end, and of a part of it.
            backward(sum(h.square().mean() for h in out.hidden_states))
            backward(model(input_ids=batch["input_ids"], logits_to_keep=3, use_cache=False).logits.square().mean())
            result["gradients"] = [g for g in full_grads(model).values() if g is not None]
            model.zero_grad()
    prompt = batch["input_ids"][:, :5]
    result["generated"] = [model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)]
    return {key: [x.detach() for x in values] for key, values in result.items()}


def outputs_of_one_model(name: str, sizes: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """:func:`outputs` under sequence parallelism."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(sequence_parallel=True, audit="off", **sizes))
    model = build(name, attn_implementation="eager")
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    return outputs(model, accelerator.backward)


class ScaledGradient(torch.autograd.Function):
    """Looks like a view of its input, and is none: the gradient becomes a tenth."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 0.1


class BeforeHead:
    """Pre-hook of the head: what a script does to the last hidden states."""

    def __init__(self) -> None:
        self.function: Any = None

    def __call__(self, module: torch.nn.Module, args: Any) -> Any:
        return None if self.function is None else (self.function(args[0]),)


def doubled_gradient(x: torch.Tensor) -> torch.Tensor:
    """`x`, with a hook on its gradient."""
    x.register_hook(lambda gradient: gradient * 2)
    return x


def ends_looked_at(
    model: torch.nn.Module, before_head: BeforeHead, backward: Any = torch.Tensor.backward
) -> dict[str, list[torch.Tensor]]:
    """Gradients where somebody stands between the final norm and the head, and what he sees of the gradient there."""
    batch = batches_of(model, 1)[0]
    result: dict[str, list[torch.Tensor]] = {}

    def step(key: str, **more: Any) -> Any:
        out = model(**batch, use_cache=False, **more)
        kept = out.hidden_states[-1] if more else None
        if kept is not None:
            kept.retain_grad()
        backward(out.loss)
        result[key] = [g for g in full_grads(model).values() if g is not None]
        if kept is not None:
            result[f"{key} there"] = [kept.grad]
        model.zero_grad()

    step("plain")
    for function in (ScaledGradient.apply, doubled_gradient, lambda x: x[:, 0:] * 1.5):
        before_head.function = function
        step(getattr(function, "__name__", "") + str(len(result)))
    before_head.function = None
    step("retained", output_hidden_states=True)
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_full_backward_hook(lambda module, given, got: seen.append(got[0].clone()))
    step("hook of the norm")
    handle.remove()
    return result | {"hook of the norm there": seen}


def ends_looked_at_on_shares(name: str) -> dict[str, list[torch.Tensor]]:
    """:func:`ends_looked_at` under sequence parallelism."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, sequence_parallel=True, audit="off"))
    model, before_head = build(name).train(), BeforeHead()
    model.lm_head.register_forward_pre_hook(before_head)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    return ends_looked_at(model, before_head, accelerator.backward)


def other_model(kind: str, **values: Any) -> torch.nn.Module:
    """A model of two layers that is no part of the matrices."""
    config = AutoConfig.for_model(kind, **(COMMON | {"pad_token_id": 1} | values))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    return model.train()


def opt(**values: Any) -> torch.nn.Module:
    """Its layers are called or left out, if asked to; biases stand behind its reductions."""
    return other_model("opt", ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, **values)


#: A seed with which LayerDrop of one half calls these of two layers.
LAYERS_CALLED = {(False, True): 0, (True, False): 1, (False, False): 3}


def gradients_of_dropped_layers(model: torch.nn.Module, backward: Any = torch.Tensor.backward) -> dict[Any, Any]:
    """Loss and gradients for each choice of layers."""
    batch = batches_of(model, 1)[0]
    result = {}
    model.model.decoder.layerdrop = 0.5
    for called, seed in LAYERS_CALLED.items():
        torch.manual_seed(seed)
        loss = model(**batch, use_cache=False).loss
        backward(loss)
        result[called] = (loss.item(), full_grads(model))
        model.zero_grad(set_to_none=True)
    return result


def dropped_layers() -> tuple[dict[Any, Any], str]:
    """:func:`gradients_of_dropped_layers` under sequence parallelism, and what is said where the last layer is the end
    of it.
    """
    config = AutoParallelismConfig(tp_size=2, sequence_parallel=True, audit="off")
    accelerator = Accelerator(parallelism_config=config)
    model = opt()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    result = gradients_of_dropped_layers(model, accelerator.backward)
    accelerator.free_memory()
    model = other_model("olmo", intermediate_size=128)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    model.config.num_hidden_layers = 1
    try:
        model(**batches_of(model, 1)[0], use_cache=False)
    except UnsupportedError as error:
        return result, str(error)
    return result, "nothing"


class WritingMLP(LlamaMLP):
    """Changes its input in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(1.5)
        return super().forward(x)


class SecretlyWritingMLP(LlamaMLP):
    """Does so where it was not seen before the model was prepared."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            x.mul_(1.5)
        return super().forward(x)


SecretlyWritingMLP.__name__ = WritingMLP.__name__ = LlamaMLP.__name__


def writing(name: str, kind: type = WritingMLP) -> torch.nn.Module:
    """A model whose MLPs write into their input: Mixtral does so by itself, others get one that does."""
    model = build(name, **({"router_jitter_noise": 0.5} if name == "mixtral" else {})).train()
    for layer in model.model.layers:
        if type(layer.mlp) is LlamaMLP:
            layer.mlp.__class__ = kind
    return model


def written_gradients(
    name: str, sizes: dict[str, Any] | None, kind: type = WritingMLP
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Loss and gradients of :func:`writing`; `sizes=None` in one process."""
    model, backward = writing(name, kind), torch.Tensor.backward
    batch = batches_of(model, 1)[0]
    if sizes is not None:
        config = AutoParallelismConfig(tp_size=2, sequence_parallel=True, audit="off", **sizes)
        accelerator = Accelerator(parallelism_config=config)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        backward = accelerator.backward
    torch.manual_seed(7)
    loss = model(**batch, use_cache=False).loss
    backward(loss)
    return loss.item(), full_grads(model)


def compiled_by_the_user(name: str) -> tuple[float, dict[str, torch.Tensor | None], list[str]]:
    """Loss, gradients and warnings where a model that gathers again is compiled as a whole, after `prepare`."""
    config = AutoParallelismConfig(tp_size=2, sequence_parallel=True, sequence_parallel_regather=True, audit="off")
    accelerator = Accelerator(parallelism_config=config)
    model = build(name).train()
    batch = batches_of(model, 1)[0]
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with warnings_of_the_package() as said:
        loss = torch.compile(model, backend="aot_eager")(**batch, use_cache=False).loss
    accelerator.backward(loss)
    return loss.item(), full_grads(model), [message for message in said if "sequence_parallel_regather" in message]


@contextmanager
def warnings_of_the_package() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_automodel_parallel")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def hooked(path: str, when: str) -> tuple[list[str], list[int]]:
    """What is said of a hook on a module, and the tokens that it sees in two forwards."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, sequence_parallel=True))
    model = build("llama").train()
    lengths: list[int] = []

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        lengths.append((output[0] if isinstance(output, tuple) else output).shape[1])

    register = model.get_submodule(path).register_forward_hook
    if when == "before":
        register(hook)
    batch = batches_of(model, 1, 12)[0]
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    if when == "after":
        register(hook)
    with warnings_of_the_package() as said:
        for _ in range(2):
            accelerator.backward(model(**batch, use_cache=False).loss)
    return [message for message in said if "hook" in message], lengths


class KeepingLayer(LlamaDecoderLayer):
    """Leaves its output for code outside of the layers."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.kept = super().forward(hidden_states, **kwargs)
        return self.kept


def activations_outside() -> list[str]:
    """What is said of activations that a layer keeps, and of a layer that is called by hand."""
    said = []
    for keeps in (True, False):
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, sequence_parallel=True))
        model = build("llama").train()
        layer = model.model.layers[0]
        if keeps:
            layer.__class__ = KeepingLayer
        try:
            model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
            states = torch.randn(2, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
            places = model.model.rotary_emb(states, torch.arange(8)[None])
            output = layer(states.requires_grad_(), position_embeddings=places, attention_mask=None)
            accelerator.backward(output.square().mean())
            said.append("nothing")
        except UnsupportedError as error:
            said.append(str(error))
        accelerator.state._reset_state()
    return said
