"""Go on training a model on long documents, the sequence itself divided over GPUs (context parallelism).

   1 GPU    python examples/long_context.py --tokens 8192
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel cp=4 examples/long_context.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel cp=8 examples/long_context.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel cp=2 \\
                examples/long_context.py --tiny

Expect: the losses of one GPU at an equal global batch; with cp=4 each GPU has a quarter of each row, and eight GPUs are
two data-parallel ranks. A row is the beginning of a document (causal attention, not packed); shorter documents are left
out, so nothing is padded. 2 x cp has to divide --tokens. Weights and states are sharded over all eight GPUs.
"""

from dataclasses import dataclass

import tiny
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class Recipe:
    model: str = "meta-llama/Llama-3.1-8B"
    dataset: str = "emozilla/pg19"  # books
    tokens: int = 131072  # of a row
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, TrainingArguments))
    parser.set_defaults(output_dir="out/long_context", learning_rate=1e-5, bf16=True, per_device_train_batch_size=1)
    parser.set_defaults(gradient_checkpointing=True, **tiny.settings(tokens=4))
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model, tokenizer, data = AutoModelForCausalLM.from_config(tiny.config()), tiny.tokenizer(), tiny.rows("text")
    else:
        model = AutoModelForCausalLM.from_pretrained(recipe.model)
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # the collator wants one
        data = load_dataset(recipe.dataset, split="train")
    data = data.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"][: recipe.tokens]})
    data = data.filter(lambda row: len(row["input_ids"]) == recipe.tokens).select_columns("input_ids")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, collator, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
