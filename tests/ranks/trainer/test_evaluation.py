"""Evaluation, prediction and training again with the stock Trainer."""

from typing import Any

import pytest
import torch
from harness.compare import assert_losses_equal
from harness.meshes import run_on_mesh
from harness.training import LORA, build, trainable

from ranks.trainer.jobs import InOrder, Rows, arguments, history, losses_of

EVALUATION_ROWS = 11  # batches of two: neither they nor the ranks divide it
PREDICTION_ROWS = 11


def life_of_a_trainer(sizes: dict[str, int], dp_size: int, adapter: Any, directory: str) -> dict[str, Any]:
    """Evaluate, predict, train, train again, evaluate, and train the same model with a second Trainer."""
    model = build("qwen3", adapter)
    train, evaluation = Rows(8, 128, seed=40), Rows(EVALUATION_ROWS, 128, seed=41)
    trainer = InOrder(model, arguments(directory, sizes, dp_size), train_dataset=train, eval_dataset=evaluation)
    result = {"loss_before": trainer.evaluate()["eval_loss"]}
    prediction = trainer.predict(Rows(PREDICTION_ROWS, 128, seed=42))
    result["logits"], result["labels"] = map(torch.as_tensor, (prediction.predictions, prediction.label_ids))
    trainer.train()
    result["first"] = losses_of(trainer)
    trainer.train()
    result["second"] = losses_of(trainer)
    result["loss_after"] = trainer.evaluate()["eval_loss"]
    another = InOrder(model, arguments(directory, sizes, dp_size), train_dataset=train, eval_dataset=evaluation)
    another.train()
    result["another"] = losses_of(another)
    return result


@pytest.mark.core_cases("tp2-lora", "tp2_fsdp2-full")
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_evaluate_predict_train_twice_and_with_a_second_trainer(mesh, adapter, tmp_path):
    """In this order: the model is then prepared before there is an optimizer, and again by each `train()`."""
    results = run_on_mesh(mesh, life_of_a_trainer, adapter, str(tmp_path))
    reference = build("qwen3", adapter)
    train, evaluation, prediction = Rows(8, 128, 40), Rows(EVALUATION_ROWS, 128, 41), Rows(PREDICTION_ROWS, 128, 42)
    with torch.no_grad():
        before = reference(**evaluation.batch()).loss.item()
        logits = reference(**prediction.batch()).logits
    steps = [[train.batch(0, 4)], [train.batch(4, 8)]]
    for result in results:
        assert_losses_equal(result["loss_before"], before)
        assert result["logits"].shape == logits.shape
        torch.testing.assert_close(result["logits"], logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["labels"], prediction.batch()["labels"])
    # The second train() goes on with the optimizer of the first; the second Trainer makes one of its own.
    optimizer = torch.optim.AdamW(trainable(reference), lr=1e-2, eps=1e-3, weight_decay=0.0)
    assert_losses_equal(results[0]["first"], history(reference, optimizer, steps), rtol=1e-5)
    assert_losses_equal(results[0]["second"], history(reference, optimizer, steps), rtol=1e-5)
    with torch.no_grad():
        assert_losses_equal(results[0]["loss_after"], reference(**evaluation.batch()).loss.item(), rtol=1e-5)
    optimizer = torch.optim.AdamW(trainable(reference), lr=1e-2, eps=1e-3, weight_decay=0.0)
    assert_losses_equal(results[0]["another"], history(reference, optimizer, steps), rtol=1e-5)
