"""Supervised fine-tuning of a vision-language model with LoRA on its language part, by TRL.

   1 GPU    python examples/vision_language.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/vision_language.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/vision_language.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/vision_language.py --tiny

Expect: an adapter in --output_dir, and the losses of one GPU at an equal global batch. Both ranks of a tp group get the
same images. `hf-automodel-parallel plan MODEL --tp 2` says how the vision part is divided. Rows are not cut off
(max_length=None): an image stands for many tokens, all of which have to be there.
"""

from dataclasses import dataclass

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class Recipe:
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    dataset: str = "trl-lib/llava-instruct-mix"  # columns: images, prompt, completion
    tiny: bool = False


def main() -> None:
    parser = HfArgumentParser((Recipe, SFTConfig))
    parser.set_defaults(output_dir="out/vision_language", learning_rate=2e-4, gradient_accumulation_steps=4)
    parser.set_defaults(max_length=None, **tiny.settings())
    recipe, args = parser.parse_args_into_dataclasses()
    if recipe.tiny:
        model = AutoModelForImageTextToText.from_config(tiny.vision_language_config())
        processor, dataset = tiny.processor(), tiny.rows("images", "prompt", "completion")
    else:
        model = AutoModelForImageTextToText.from_pretrained(recipe.model, dtype=torch.bfloat16)
        processor = AutoProcessor.from_pretrained(recipe.model)
        dataset = load_dataset(recipe.dataset, split="train")
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # not those of the vision part
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=processor, peft_config=lora)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
