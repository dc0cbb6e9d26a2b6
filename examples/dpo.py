"""Direct preference optimisation with LoRA, by TRL. The base without its adapter is the reference: there is one model.

   1 GPU    python examples/dpo.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/dpo.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/dpo.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/dpo.py --tiny

Expect: loss 0.69 (ln 2) at the first step, then falling; rewards/margins above zero. A row is two texts, so activations
take twice the memory of SFT.
"""

from dataclasses import dataclass

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    dataset: str = "trl-lib/ultrafeedback_binarized"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, DPOConfig))
    parser.set_defaults(output_dir="out/dpo", learning_rate=5e-6, beta=0.1, gradient_accumulation_steps=4)
    parser.set_defaults(**tiny.settings(max_length=32))
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForCausalLM.from_config(tiny.config())
        tokenizer, dataset = tiny.tokenizer(), tiny.rows("prompt", "chosen", "rejected")
    else:
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.bfloat16)
        tokenizer, dataset = AutoTokenizer.from_pretrained(recipe.model), load_dataset(recipe.dataset, split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
