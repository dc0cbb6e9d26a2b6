"""Statistics of tokens on slices of the vocabulary, computed by threads, equal those of one rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from hf_automodel_parallel.tensor_parallel.thread_group import ThreadGroup, run_ranks
from hf_automodel_parallel.tensor_parallel.vocab_parallel.cross_entropy import Vocabulary
from hf_automodel_parallel.tensor_parallel.vocab_parallel.token_statistics import (
    OPTIONAL,
    Logits,
    token_statistics,
)

ROWS, FEATURES = 11, 6
NAMES = ("log_probs", *OPTIONAL)


class Statistics(NamedTuple):
    log_probs: Any
    entropy: Any
    log_sum_sq_probs: Any
    mean_logits: Any
    is_top1: Any


def tensors(classes: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = draw(ROWS, FEATURES), draw(classes, FEATURES), draw(classes)
    target = torch.randint(0, classes, (ROWS,), generator=generator)
    target[:6] = (hidden @ weight.T + bias).argmax(-1)[:6]
    weight[classes // 2], bias[classes // 2] = weight[1], bias[1]  # a tie between slices
    return hidden, weight, bias, target


def plain(hidden: Any, weight: Any, bias: Any, target: Any, softcap: Any, scale: float, t: float) -> Statistics:
    """By the definitions, with all logits."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / t
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    hit = log_p.gather(-1, target[:, None]).squeeze(-1)
    return Statistics(hit, -(p * log_p).sum(-1), p.square().sum(-1).log(), logits.mean(-1), logits.argmax(-1) == target)


def objective(result: Statistics) -> torch.Tensor:
    weights = torch.linspace(0.5, 1.5, ROWS, dtype=result.log_probs.dtype)
    return (weights * result.log_probs).sum() + 0.3 * (weights * result.entropy).sum()


def on_ranks(size: int, given: tuple[Any, ...], chunk: int | None, outputs: Any, **logits: Any) -> list[Any]:
    """(statistics, gradients of hidden states, weight and bias) of each rank."""
    hidden, weight, bias, target = given
    width = -(-len(weight) // size)

    def one(group: ThreadGroup) -> Any:
        part = slice(group.rank * width, (group.rank + 1) * width)
        own = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight[part], bias)]
        own[2] = None if bias is None else bias[part].clone().requires_grad_()
        start = None if len(weight) % size == 0 else min(part.start, len(weight))
        vocabulary = Vocabulary(group, group.rank, size, chunk, start)  # type: ignore[arg-type]
        result = Statistics(*token_statistics(*own, target, Logits(vocabulary, len(weight), **logits), outputs))
        if "entropy" in outputs:
            objective(result).backward()
        else:
            result.log_probs.sum().backward()
        return result, [None if x is None else x.grad for x in own]

    return run_ranks(size, one)


@pytest.mark.parametrize(
    ("size", "classes", "chunk", "with_bias", "options"),
    [
        (2, 16, None, False, {}),
        (2, 16, 3, True, {"softcap": 2.0, "scale": 0.7, "temperature": 1.3}),
        (4, 13, 4, True, {"temperature": 0.5}),
        (4, 5, 4, False, {"softcap": 1.0}),  # the last rank has no classes
    ],
)
def test_statistics_and_gradients_equal_those_of_all_logits(size, classes, chunk, with_bias, options):
    hidden, weight, bias, target = tensors(classes)
    bias = bias if with_bias else None
    leaves = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    want = plain(*leaves, target, options.get("softcap"), options.get("scale", 1.0), options.get("temperature", 1.0))
    objective(want).backward()
    ranks = on_ranks(size, (hidden, weight, bias, target), chunk, OPTIONAL, **options)
    assert want.is_top1.any() and not want.is_top1.all()
    for result, (of_hidden, _, _) in ranks:
        for name in NAMES:
            torch.testing.assert_close(getattr(result, name), getattr(want, name), rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(of_hidden, leaves[0].grad, rtol=1e-12, atol=1e-12)
    for index in (1, 2) if with_bias else (1,):
        whole = torch.cat([gradients[index] for _, gradients in ranks])
        torch.testing.assert_close(whole, leaves[index].grad, rtol=1e-12, atol=1e-12)


def test_low_precision_gives_float32_and_what_was_not_asked_for_is_missing():
    hidden, weight, _, target = tensors(16, torch.bfloat16)
    for result, gradients in on_ranks(2, (hidden, weight, None, target), 4, ("is_top1",)):
        assert result.log_probs.dtype == torch.float32 and result.is_top1.dtype == torch.bool
        assert result.entropy is result.mean_logits is result.log_sum_sq_probs is None
        assert [x.dtype for x in gradients if x is not None] == [torch.bfloat16] * 2
        want = plain(hidden.float(), weight.float(), None, target, None, 1.0, 1.0)
        torch.testing.assert_close(result.log_probs, want.log_probs, rtol=0.02, atol=0.02)


def test_no_token_at_all():
    hidden, weight, bias, target = tensors(16)
    vocabulary = Vocabulary(None, 0, 2)  # type: ignore[arg-type]  # no rank to talk to, and nothing to say
    own = [x.clone().requires_grad_() for x in (hidden[:0], weight[:8], bias[:8])]
    result = Statistics(*token_statistics(*own, target[:0], Logits(vocabulary, 16)))
    result.log_probs.sum().backward()
    assert result.log_probs.shape == (0,) and not own[1].grad.any() and own[0].grad.shape == (0, FEATURES)


def test_classes_that_a_bias_rules_out_add_nothing():
    """Logits of -inf have probability 0: results and gradients are those of logits that are far down."""
    hidden, weight, bias, target = tensors(16)
    out = torch.tensor([0, 7, 8, 15])
    target[torch.isin(target, out)] = 3
    far, never = bias.index_fill(0, out, -1e3), bias.index_fill(0, out, -torch.inf)
    for (result, gradients), (want, wanted) in zip(
        *(on_ranks(2, (hidden, weight, given, target), 4, ("entropy",)) for given in (never, far)), strict=True
    ):
        for value, expected in zip((result.log_probs, result.entropy, *gradients), (*want[:2], *wanted), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
