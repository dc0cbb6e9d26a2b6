"""A sequence-to-sequence script with a Trainer and the idioms of the public ones; it knows nothing of this package."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "one pair of sentences in each line"})
    validation_file: str


def rows_of(path: str) -> list[dict[str, list[int]]]:
    pairs = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [
        {
            "input_ids": [int(word) + 4 for word in pair["source"].split()] + [1],
            "labels": [int(word) + 4 for word in pair["target"].split()] + [1],
        }
        for pair in pairs
    ]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = {key: max(len(row[key]) for row in rows) for key in ("input_ids", "labels")}
    padded = {
        key: torch.tensor([row[key] + [filler] * (longest[key] - len(row[key])) for row in rows])
        for key, filler in (("input_ids", 0), ("labels", -100))
    }
    return padded | {"attention_mask": (padded["input_ids"] != 0).long()}


def main() -> None:
    data, training = HfArgumentParser((DataArguments, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    config = T5Config(
        vocab_size=104,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=0.5,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    validation = rows_of(data.validation_file)

    def metrics(prediction) -> dict[str, float]:
        pairs = list(zip(prediction.predictions, prediction.label_ids, strict=True))
        hits = [any(token in labels for token in tokens if token > 3) for tokens, labels in pairs]
        return {"samples": len(pairs), "hits": sum(hits) / len(hits)}

    trainer = Seq2SeqTrainer(
        model=T5ForConditionalGeneration(config),
        args=training,
        train_dataset=rows_of(data.train_file),
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    predicted = trainer.predict(validation, metric_key_prefix="predict", max_length=8, min_new_tokens=4, num_beams=2)
    trainer.save_metrics("predict", predicted.metrics)
    if trainer.is_world_process_zero():
        text = "\n".join(" ".join(map(str, row)) for row in predicted.predictions)
        (Path(training.output_dir) / "generated_predictions.txt").write_text(text)


if __name__ == "__main__":
    main()
