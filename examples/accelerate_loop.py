"""A training loop with Accelerate: only `Accelerator.prepare` makes it parallel.

   1 GPU    python examples/accelerate_loop.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/accelerate_loop.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/accelerate_loop.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/accelerate_loop.py --tiny

Expect: a line for each tenth step on rank 0. With tp=2 the loader gives both ranks of a group the same rows.
"""

import argparse

import tiny
import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B")
    parser.add_argument("--dataset", default="roneneldan/TinyStories")
    parser.add_argument("--output_dir", default="out/accelerate_loop")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.tiny, mixed_precision="no" if args.tiny else "bf16")
    torch.manual_seed(0)
    if args.tiny:
        model, tokenizer, data = AutoModelForCausalLM.from_config(tiny.config()), tiny.tokenizer(), tiny.rows("text")
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        data = load_dataset(args.dataset, split="train[:1%]")
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader):
        batch.pop("token_type_ids", None)
        loss = model(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            mean = accelerator.gather(loss.detach()).mean().item()  # on all ranks
            accelerator.print(f"step {step}: loss {mean:.4f}, gradient norm {float(norm):.3f}")
    model.save_pretrained(args.output_dir)  # on all ranks
    accelerator.end_training()


if __name__ == "__main__":
    main()
