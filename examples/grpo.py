"""Group relative policy optimisation with LoRA, by TRL: generation, reward and training on one mesh.

   1 GPU    python examples/grpo.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/grpo.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/grpo.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/grpo.py --tiny

Expect: "reward" rises. A group of num_generations completions is dealt to the data-parallel ranks: 4 with tp=2 on
eight GPUs, so 4 x per_device_train_batch_size has to be a multiple of num_generations (what is not is refused).
"""

from dataclasses import dataclass

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    dataset: str = "trl-lib/tldr"
    tiny: bool = False


def near_twenty_words(completions: list[str], **kwargs: object) -> list[float]:
    return [-abs(20.0 - len(completion.split())) for completion in completions]


def main() -> None:
    parser = HfArgumentParser((Recipe, GRPOConfig))
    parser.set_defaults(output_dir="out/grpo", learning_rate=1e-5, per_device_train_batch_size=8, num_generations=8)
    parser.set_defaults(**tiny.settings(num_generations=2, max_completion_length=6))
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForCausalLM.from_config(tiny.config())
        tokenizer, dataset = tiny.tokenizer(), tiny.rows("prompt")
    else:
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.bfloat16)
        tokenizer, dataset = AutoTokenizer.from_pretrained(recipe.model), load_dataset(recipe.dataset, split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(model, near_twenty_words, args, dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
