"""QLoRA: LoRA on a base in 4 bit (bitsandbytes), by TRL. FSDP2 and tp shard the 4-bit weights.

   1 GPU    python examples/qlora.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel dp_shard=8 examples/qlora.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,dp_shard=8 examples/qlora.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel dp_shard=2 \\
                examples/qlora.py --tiny

Expect: half a byte per parameter of the base, divided by dp_shard. Each process reads the whole model before it is
sharded, so the CPU needs memory for all of them.
"""

from dataclasses import dataclass

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class Recipe:
    model: str = "meta-llama/Llama-3.1-70B"
    dataset: str = "trl-lib/Capybara"
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, SFTConfig))
    parser.set_defaults(output_dir="out/qlora", learning_rate=2e-4, gradient_accumulation_steps=4, packing=True)
    parser.set_defaults(**tiny.settings(max_length=32))
    recipe, args = parser.parse_args_into_dataclasses()
    dtype = torch.float32 if recipe.tiny else torch.bfloat16
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype
    )
    path = tiny.saved(AutoModelForCausalLM.from_config(tiny.config())) if recipe.tiny else recipe.model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantized)
    tokenizer = tiny.tokenizer() if recipe.tiny else AutoTokenizer.from_pretrained(path)
    dataset = tiny.rows("prompt", "completion") if recipe.tiny else load_dataset(recipe.dataset, split="train")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()  # the adapter, on all ranks


if __name__ == "__main__":
    main()
