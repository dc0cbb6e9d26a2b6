"""A model whose forward reads parameters of other modules: what the ranks run."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from harness.compare import full_grads, mean_over_ranks
from harness.models import build_model, lora, make_batches
from harness.training import data_rank, trainable
from torch.func import functional_call
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.errors import UnsupportedError


class ReadingLlama(LlamaForCausalLM):
    """Its loss depends on a row of the embedding, on the whole table, and on the last norm, each read from outside."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.model
        pad = inner.embed_tokens.weight[5, :]
        output = super().forward(*args, **kwargs)
        extra = (pad * torch.arange(pad.shape[-1]).to(inner.embed_tokens.weight.dtype)).mean()
        extra = extra + self.all_of_it().square().mean() + self.model.norm.weight.sum()
        output.loss = output.loss + extra
        return output

    def all_of_it(self) -> torch.Tensor:
        table = self.model.embed_tokens
        return 3 * table.weight[-2] + self.get_input_embeddings().weight


def reading(tied: bool, adapter: bool) -> torch.nn.Module:
    plain = build_model("llama", tie_word_embeddings=tied)
    model = ReadingLlama(plain.config)
    model.load_state_dict(plain.state_dict())
    return lora(model, target_modules=["q_proj", "embed_tokens"]) if adapter else model


def batches(parts: int) -> list[dict[str, torch.Tensor]]:
    return make_batches(parts, 4 // parts, 16, 128, seed=3)


def reading_gradients(
    cases: list[tuple[bool, bool]], sizes: dict[str, int], dp_size: int
) -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    """Loss and gradients through ``Accelerator.prepare`` for each (tied, with LoRA)."""
    results = []
    for tied, adapter in cases:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        model = reading(tied, adapter)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
        loss = model(**batches(dp_size)[data_rank(accelerator)]).loss
        accelerator.backward(loss)
        results.append((mean_over_ranks(loss), full_grads(model)))
        accelerator.state._reset_state()
    return results


class ReadingMore(LlamaForCausalLM):
    """Reads by other ways than an attribute that is the parameter itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(config.hidden_size, 3) for _ in range(2)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        table = getattr(self.model, "embed_tokens").weight  # noqa: B009
        similar = (table.T @ table).square().mean() + self.lm_head.weight.mT.square().mean()
        held = (self.lm_head.weight.data * self.model.embed_tokens.weight).mean()
        heads = sum(self.heads[i].weight.square().sum() for i in range(2))
        output.loss = output.loss + similar + held + heads + self.heads[0].bias.sum()
        return output


class GivenWeights(LlamaForCausalLM):
    """Embedding and head compute with other weights than their own."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        size = self.model.embed_tokens.weight.shape
        waves = torch.sin(torch.arange(float(size.numel())).view(size))
        embedded = functional_call(self.model.embed_tokens, {"weight": waves * 0.1}, (input_ids,))
        embedded = embedded + self.model.embed_tokens(input_ids)
        hidden = self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        other = functional_call(self.lm_head, {"weight": self.lm_head.weight * 2 + waves * 0.1}, (hidden,))
        logits = (self.lm_head(hidden) + other).float()
        return CausalLMOutput(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class Penalising(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + sum(parameter.square().sum() for parameter in self.parameters())
        return output


class Lending(LlamaForCausalLM):
    """A function outside of the class reads the weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs, output_hidden_states=True)
        output.loss = output.loss + similarity(self.model.embed_tokens, output.hidden_states[0])
        return output


def similarity(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return (states @ module.weight.t()).mean()


class Naming(LlamaForCausalLM):
    """A function outside of the class reads the weight by its name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs, output_hidden_states=True)
        output.loss = output.loss + similarity_by_name(dict(self.named_parameters()), output.hidden_states[0])
        return output


def similarity_by_name(parameters: dict[str, torch.nn.Parameter], states: torch.Tensor) -> torch.Tensor:
    return (states @ parameters["model.embed_tokens.weight"].t()).mean()


OTHERS = {cls.__name__: cls for cls in (ReadingMore, GivenWeights, Penalising, Lending, Naming)}


def other(name: str) -> torch.nn.Module:
    plain = build_model("llama")
    torch.manual_seed(3)
    model = OTHERS[name](plain.config)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def gradients_of_others(
    names: list[str], sizes: dict[str, int], dp_size: int
) -> list[tuple[float, dict[str, torch.Tensor | None]] | str]:
    """Loss and gradients, or the error, of each of ``OTHERS``."""
    results: list[Any] = []
    for name in names:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        model = other(name)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
        try:
            loss = model(**batches(dp_size)[data_rank(accelerator)]).loss
            accelerator.backward(loss)
            results.append((mean_over_ranks(loss), full_grads(model)))
        except (RuntimeError, UnsupportedError) as error:
            results.append(str(error))
        accelerator.state._reset_state()
    return results
