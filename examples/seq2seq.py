"""Translate or summarise with an encoder-decoder, by the stock Seq2SeqTrainer.

   1 GPU    python examples/seq2seq.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/seq2seq.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/seq2seq.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/seq2seq.py --tiny

Expect: a falling loss. T5's plan is derived: self and cross attention are sharded by heads.
"""

from dataclasses import dataclass

import tiny
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


@dataclass
class Recipe:
    model: str = "google/flan-t5-xl"
    dataset: str = "EdinburghNLP/xsum"
    source: str = "document"
    target: str = "summary"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, Seq2SeqTrainingArguments))
    parser.set_defaults(output_dir="out/seq2seq", learning_rate=5e-5)
    parser.set_defaults(**tiny.settings())
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForSeq2SeqLM.from_config(tiny.config("t5"))
        tokenizer, data = tiny.tokenizer(), tiny.rows("document", "summary")
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(recipe.model)
        tokenizer, data = AutoTokenizer.from_pretrained(recipe.model), load_dataset(recipe.dataset, split="train")

    def tokenize(row: dict) -> dict:
        return tokenizer(row[recipe.source], text_target=row[recipe.target], truncation=True, max_length=512)

    data = data.map(tokenize, remove_columns=data.column_names)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    trainer = Seq2SeqTrainer(model, args, collator, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
