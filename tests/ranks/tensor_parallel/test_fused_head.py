"""TRL's fused head (``model(..., fused_lm_head=True)``) on a sharded head: statistics and gradients of one process,
without a gather of the head or of logits.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.collectives import CollectiveCounter
from harness.compare import assert_gradients_equal, full_grads
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable

from hf_automodel_parallel import AutoParallelismConfig

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

#: name -> (model, adapter, overrides of its config, arguments of add_fused_lm_head)
CASES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", None, {}, {"temperature": 0.7}),
    "llama_tied_lora": ("llama_tied", LORA | {"target_modules": ["q_proj", "down_proj"]}, {}, {}),
    "softcap_tied": ("gemma3_softcap", None, {"tie_word_embeddings": True}, {"temperature": 1.3}),
    "scaled": ("cohere", None, {"logit_scale": 0.3}, {"cast_lm_head_to_fp32": True}),
    "head_to_save": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}, {}),
    # tp does not divide these vocabularies, so that the head is sharded on its input dimension
    "odd": ("llama_odd_vocab", None, {}, {}),
    "odd_bias_tied": ("gptj", None, {"vocab_size": 131, "tie_word_embeddings": True}, {}),
    # nor the hidden size: every rank has the whole head, and TRL's own kernel computes
    "replicated": ("qwen3", None, {"vocab_size": 131, "hidden_size": 63}, {}),
}


def fused(case: str, precision: str = "no", sizes: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The model of a case with TRL's fused head, prepared if ``sizes`` are given; and its Accelerator."""
    from trl.trainer.utils import add_fused_lm_head

    name, adapter, overrides, arguments = CASES[case]
    model = build(name, adapter, **overrides)
    add_fused_lm_head(model if adapter is None else model.get_base_model(), outputs=OUTPUTS, **arguments)
    if sizes is None:
        return model, None
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), mixed_precision=precision)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    return model, accelerator


def statistics(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch, fused_lm_head=True)


def objective(output: Any) -> torch.Tensor:
    """What a trainer may make of the statistics: the loss, ratios of probabilities, an entropy bonus."""
    return output.loss + output.log_probs.exp().mean() - 0.1 * output.entropy.mean()


def numbers(output: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(output, name).detach() for name in ("loss", *OUTPUTS)}


def sharded(cases: list[str], sizes: dict[str, Any], dp_size: int, **options: Any) -> list[Any]:
    """(statistics, gradients, collectives on the tp axis, elements of the largest all-gather) of each case; two
    forwards before the two backwards.
    """
    results = []
    for case in cases:
        model, accelerator = fused(case, sizes=sizes, **options)
        batches = [batches_for(model, dp_size, seed=seed)[data_rank(accelerator)] for seed in (3, 4)]
        with torch.no_grad():
            silent = numbers(statistics(model, batches[0]))  # as a trainer asks the reference
        with CollectiveCounter() as counter:
            outputs = [statistics(model, batch) for batch in batches]
            with accelerator.no_sync(model):
                accelerator.backward(objective(outputs[0]))
            accelerator.backward(objective(outputs[1]))
        mesh = accelerator.torch_device_mesh["tp"]
        assert all(torch.equal(value, silent[name]) for name, value in numbers(outputs[0]).items())
        results.append((numbers(outputs[0]), full_grads(model), counter.counts.on(mesh), counter.counts.largest))
        accelerator.free_memory()
    return results


def alone(case: str, dp_size: int, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    model, _ = fused(case)
    shown = []
    for seed in (3, 4):
        parts = [statistics(model, batch) for batch in batches_for(model, dp_size, seed=seed)]
        (sum(objective(part) for part in parts) / dp_size).backward()
        shown.append(numbers(parts[rank]))
    return shown[0], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize(
    ("mesh", "cases"),
    [("tp2", list(CASES)), ("tp2_fsdp2", ["llama_tied_lora", "softcap_tied", "odd"])],
    ids=["tp2", "tp2_fsdp2"],
)
def test_statistics_and_gradients_are_those_of_one_process(mesh, cases):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, sharded, cases, sizes, dp_size, timeout=240)[0]
    for case, (got, gradients, collectives, _) in zip(cases, results, strict=True):
        assert_same(case, got, gradients, dp_size)
        # The features of a token's embedding, of each forward; forward and backward of the head.
        others = {"all_gather": 2, "all_to_all": 4} if case.startswith("odd") else {}
        assert collectives - Counter(all_reduce=collectives["all_reduce"]) == others, (case, collectives)


def test_under_sequence_parallelism():
    cases = ["llama"]
    results = run_distributed(2, sharded, cases, {"tp_size": 2, "sequence_parallel": True}, 1)[0]
    for case, (got, gradients, _, largest) in zip(cases, results, strict=True):
        assert_same(case, got, gradients, 1)
        assert largest["all_gather"] < 128 * 64, "activations, and neither the head nor the logits"


def assert_same(case: str, got: Any, gradients: Any, dp_size: int) -> None:
    want, want_gradients = alone(case, dp_size, 0)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{case} {n}: {m}")
    assert_gradients_equal(gradients, want_gradients)


def in_low_precision(**config: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    model, accelerator = fused("softcap_tied", "bf16", config)
    output = statistics(model, batches_for(model, 1)[0])
    accelerator.backward(objective(output))
    return numbers(output), full_grads(model)


def test_log_probabilities_are_float32_under_mixed_precision():
    """Against TRL's own kernel on a gathered head, and the same low-precision activations."""
    got, gradients = run_distributed(2, in_low_precision, tp_size=2)[0]
    want, reference = run_distributed(2, in_low_precision, tp_size=2, loss_parallel=False)[0]
    for name, value in got.items():
        assert value.dtype == (torch.bool if name == "is_top1" else torch.float32)
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=name)
    # Below the head gradients are bf16: what differs in float32 may round to another neighbour.
    assert_gradients_equal(gradients, reference, rtol=4e-3, atol_of_total=1e-4)
