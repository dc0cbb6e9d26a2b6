"""Train a new model, with checkpoints, on machines that may be taken away: it resumes if there is something.

   1 GPU    python examples/pretraining.py --enable_jit_checkpoint True
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel dp_shard=8 \\
                examples/pretraining.py --enable_jit_checkpoint True
  16 GPUs   sbatch examples/slurm/requeue.sbatch
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel dp_shard=2 \\
                examples/pretraining.py --tiny

Expect: loss near ln(vocabulary) at the start. At SIGTERM all ranks save one checkpoint and end; the same command
goes on from it, also with another number of GPUs or another mesh.
"""

from dataclasses import dataclass
from pathlib import Path

import tiny
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_automodel_parallel import last_complete_checkpoint


@dataclass
class Recipe:
    model: str = "Qwen/Qwen3-0.6B-Base"  # its config and tokenizer; the weights are new
    dataset: str = "roneneldan/TinyStories"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, TrainingArguments))
    parser.set_defaults(output_dir="out/pretraining", learning_rate=3e-4, bf16=True, save_steps=500, save_total_limit=2)
    parser.set_defaults(**tiny.settings(save_strategy="steps", save_steps=1))
    recipe, args = parser.parse_args_into_dataclasses()
    config = tiny.config() if recipe.tiny else AutoConfig.from_pretrained(recipe.model)
    tokenizer = tiny.tokenizer() if recipe.tiny else AutoTokenizer.from_pretrained(recipe.model)
    data = tiny.rows("text") if recipe.tiny else load_dataset(recipe.dataset, split="train")
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=1024), remove_columns=["text"])
    set_seed(args.seed)  # new weights
    model, collator = AutoModelForCausalLM.from_config(config), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, collator, data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))  # None: from the beginning
    if trainer.state.global_step >= trainer.state.max_steps:  # not interrupted
        trainer.save_model()  # on all ranks
        Path(args.output_dir, "done").touch()  # what slurm/requeue.sbatch looks for


if __name__ == "__main__":
    main()
