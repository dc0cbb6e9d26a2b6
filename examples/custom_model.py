"""A model class that nobody has seen: names of its own, a temperature for heads, no plan. Tensor parallel nevertheless.

   1 GPU    python examples/custom_model.py
   8 GPUs   torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 examples/custom_model.py
  16 GPUs   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint node0:29500 \\
                -m hf_automodel_parallel.launch --auto_parallel dp_replicate=2,tp=2 examples/custom_model.py
  CPU       torchrun --nproc_per_node 2 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
                examples/custom_model.py --tiny

Expect: the loss of one process. A plan is derived from the module tree, and compared with one process on a tiny copy of
the model before it is used.
"""

import tiny
from custom_model_class import MyConfig, MyForCausalLM
from transformers import DataCollatorForLanguageModeling, HfArgumentParser, Trainer, TrainingArguments, set_seed


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.set_defaults(output_dir="out/custom_model", learning_rate=1e-3, **tiny.settings())
    args, rest = parser.parse_args_into_dataclasses()
    set_seed(args.seed)  # new weights
    sizes = {"hidden_size": 64, "num_hidden_layers": 2} if rest.tiny else {"hidden_size": 1024}
    model, tokenizer = MyForCausalLM(MyConfig(**sizes)), tiny.tokenizer()
    data = tiny.rows("text").map(
        lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"]
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, collator, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # on all ranks


if __name__ == "__main__":
    main()
