"""Supervised fine-tuning of a causal language model with LoRA, by TRL.

   1 GPU    python examples/sft_lora.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/sft_lora.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/sft_lora.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/sft_lora.py --tiny

Expect: an adapter in --output_dir, and losses like those of one GPU at an equal global batch. With tp=2 eight GPUs are
four data-parallel ranks: the global batch is 4 x per_device_train_batch_size x gradient_accumulation_steps. The base in
bf16 takes 2 bytes per parameter, divided by all eight GPUs.
"""

from dataclasses import dataclass

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class Recipe:
    model: str = "meta-llama/Llama-3.1-8B"
    dataset: str = "trl-lib/Capybara"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, SFTConfig))
    parser.set_defaults(output_dir="out/sft_lora", learning_rate=2e-4, gradient_accumulation_steps=4, packing=True)
    parser.set_defaults(**tiny.settings(max_length=32))
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForCausalLM.from_config(tiny.config())
        tokenizer, dataset = tiny.tokenizer(), tiny.rows("prompt", "completion")
    else:
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.bfloat16)
        tokenizer, dataset = AutoTokenizer.from_pretrained(recipe.model), load_dataset(recipe.dataset, split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
