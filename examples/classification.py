"""Classify texts: an encoder with a new head, all parameters trained, by the stock Trainer.

   1 GPU    python examples/classification.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel dp_shard=8 \\
                examples/classification.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,dp_shard=8 examples/classification.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/classification.py --tiny

Expect: eval_accuracy after each epoch. BERT has no tensor-parallel plan of its own; with tp one is derived, and
compared with one process, in seconds. A model of this size needs no tp.
"""

from dataclasses import dataclass

import numpy as np
import tiny
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class Recipe:
    model: str = "google-bert/bert-base-uncased"
    dataset: str = "stanfordnlp/imdb"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, TrainingArguments))
    parser.set_defaults(output_dir="out/classification", learning_rate=2e-5, eval_strategy="epoch")
    parser.set_defaults(**tiny.settings())
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForSequenceClassification.from_config(tiny.config("bert"))
        tokenizer, train, test = tiny.tokenizer(), tiny.rows("text", "label"), tiny.rows("text", "label", number=6)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(recipe.model, num_labels=2)
        tokenizer, data = AutoTokenizer.from_pretrained(recipe.model), load_dataset(recipe.dataset)
        train, test = data["train"], data["test"]
    train, test = (d.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512)) for d in (train, test))
    collator = DataCollatorWithPadding(tokenizer)
    accuracy = lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}  # noqa: E731
    trainer = Trainer(model, args, collator, train, test, processing_class=tokenizer, compute_metrics=accuracy)
    trainer.train()
    trainer.log_metrics("eval", trainer.evaluate())  # on all ranks; rank 0 prints
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
