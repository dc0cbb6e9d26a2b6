"""A training script without a Trainer, with the idioms of the public ones: it knows nothing of this package.

Its data are sentences of numbers; a sentence has the class of its first word's parity.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_scheduler


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--validation_file", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--eval_batch_size", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpointing_steps", type=int, default=None)
    parser.add_argument("--resume_from_checkpoint", type=Path, default=None)
    return parser.parse_args()


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    tokens = [[1, *(int(word) + 4 for word in row["text"].split()), 2] for row in rows]
    longest = max(map(len, tokens))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in tokens]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation)
    set_seed(5)
    config = BertConfig(
        vocab_size=104,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = BertForSequenceClassification(config)
    train, validation = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (args.train_file, args.validation_file)
    )
    train_loader = DataLoader(train, batch_size=args.batch_size, collate_fn=collate)
    eval_loader = DataLoader(validation, batch_size=args.eval_batch_size, collate_fn=collate)
    decayed = [p for name, p in model.named_parameters() if "bias" not in name and "LayerNorm" not in name]
    rest = [p for name, p in model.named_parameters() if "bias" in name or "LayerNorm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, eps=1e-3
    )
    steps = args.epochs * len(train_loader) // args.accumulation
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    first_epoch, skip = 0, 0
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)
        done = int(args.resume_from_checkpoint.name.removeprefix("step_")) * args.accumulation
        first_epoch, skip = divmod(done, len(train_loader))
    completed = (first_epoch * len(train_loader) + skip) // args.accumulation
    losses: list[float] = []
    results: dict[str, object] = {}
    for epoch in range(first_epoch, args.epochs):
        model.train()
        for batch in accelerator.skip_first_batches(train_loader, skip) if skip else train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
            if accelerator.sync_gradients:
                completed += 1
                if completed == args.checkpointing_steps:
                    accelerator.save_state(args.output_dir / f"step_{completed}")
        skip = 0
        results[f"epoch {epoch}"] = evaluate(accelerator, model, eval_loader)
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=weights,
    )
    if accelerator.is_main_process:
        results |= {"losses": losses, "completed": completed, "rate": scheduler.get_last_lr()}
        (args.output_dir / "all_results.json").write_text(json.dumps(results))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> dict[str, object]:
    """Predictions in both ways in which scripts gather them: cut to the data set by hand, or by Accelerate."""
    model.eval()
    by_hand, by_accelerate, seen = [], [], 0
    for step, batch in enumerate(loader):
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(-1)
        by_accelerate += accelerator.gather_for_metrics(predictions).tolist()
        predictions, references = accelerator.gather((predictions, batch["labels"]))
        if accelerator.num_processes > 1:
            if step == len(loader) - 1:
                predictions = predictions[: len(loader.dataset) - seen]
                references = references[: len(loader.dataset) - seen]
            else:
                seen += references.shape[0]
        by_hand += zip(predictions.tolist(), references.tolist(), strict=True)
    return {
        "samples": len(by_hand),
        "accuracy": sum(predicted == reference for predicted, reference in by_hand) / len(by_hand),
        "predictions": by_accelerate,
    }


if __name__ == "__main__":
    main()
