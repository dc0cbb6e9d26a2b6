"""A reward model, by TRL: a language model with one output, trained on pairs.

   1 GPU    python examples/reward.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/reward.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/reward.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/reward.py --tiny

Expect: loss near 0.69 (ln 2) at the start, "accuracy" rising above 0.5. With LoRA the new head (`score`) goes into
modules_to_save, as here, or it is neither trained nor saved.
"""

from dataclasses import dataclass

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import RewardConfig, RewardTrainer


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    dataset: str = "trl-lib/ultrafeedback_binarized"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, RewardConfig))
    parser.set_defaults(output_dir="out/reward", learning_rate=1e-4, gradient_accumulation_steps=4)
    parser.set_defaults(**tiny.settings(max_length=32))
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForSequenceClassification.from_config(tiny.config(num_labels=1))
        tokenizer, dataset = tiny.tokenizer(), tiny.rows("chosen", "rejected")
    else:
        model = AutoModelForSequenceClassification.from_pretrained(recipe.model, num_labels=1, dtype=torch.bfloat16)
        tokenizer, dataset = AutoTokenizer.from_pretrained(recipe.model), load_dataset(recipe.dataset, split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
    trainer = RewardTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
