"""Train a small Llama on English text, then adapt it to unseen text with LoRA. `make demo` runs it; see `demo.py`.

An ordinary script for the stock Trainer: it imports nothing from hf_automodel_parallel and does not
know how many processes run it. Run it alone, and it trains on one process; run it through
`hf_automodel_parallel.launch`, and the very same file trains tensor parallel, sharded, or both.

  1. A BPE tokenizer is trained on the text: by default the reference manual of Python that comes with
     every Python (`pydoc_data.topics`), or any UTF-8 file given with --text.
  2. A Llama of about 4 million parameters learns the first three quarters of the text (all parameters),
     with checkpoints.
  3. PEFT adds LoRA to all linear layers, and these learn the last quarter.
  4. The result is loaded again by plain transformers + PEFT in one fresh process. Its evaluation losses
     must be those of the parallel run, to within 1e-4: otherwise the exit status is 1.

A run that was killed goes on from its last checkpoint with --resume, on any mesh.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

RANK = int(os.environ.get("RANK", "0"))
TOLERANCE = 1e-4
EXAMPLES = """examples:
  # one process, no parallelism
  python examples/finetune_text.py --output-dir build/single

  # four CPU processes, tensor parallel 2 x FSDP2 2
  OMP_NUM_THREADS=1 accelerate launch --config_file accelerate_configs/cpu_fsdp2_tp2.yaml \\
      -m hf_automodel_parallel.launch examples/finetune_text.py --output-dir build/demo

  # the same processes, other sizes
  OMP_NUM_THREADS=1 accelerate launch --config_file accelerate_configs/cpu_fsdp2_tp2.yaml \\
      -m hf_automodel_parallel.launch --auto_parallel tp=4,dp_shard=1 examples/finetune_text.py

  # after a run that ended early: go on, here without tensor parallelism
  OMP_NUM_THREADS=1 torchrun --nproc_per_node 4 -m hf_automodel_parallel.launch --auto_parallel dp_shard=4 \\
      examples/finetune_text.py --batch-size 2 --resume

  # evaluate the saved result once more, in one process
  python examples/finetune_text.py --check build/demo
"""

console = Console(quiet=RANK != 0, highlight=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--text", type=Path, help="UTF-8 text to learn (default: the manual inside Python)")
    parser.add_argument("--max-steps", type=int, default=60, help="steps of the full training (default: %(default)s)")
    parser.add_argument("--lora-steps", type=int, default=24, help="steps of the LoRA training (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks a data-parallel rank (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--eval-blocks", type=int, default=64, help="blocks of the eval slice (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="full training (default: %(default)s)")
    parser.add_argument("--lora-lr", type=float, default=4e-3, help="LoRA training (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--save-steps", type=int, default=20, help="full training (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="the last process is killed after this step")
    parser.add_argument("--no-check", action="store_true", help="leave out the fresh process at the end")
    other = parser.add_argument_group("instead of training")
    other.add_argument("--write-config", type=Path, metavar="DIR", help="write the model's config.json to DIR and stop")
    other.add_argument("--check", type=Path, metavar="DIR", help="evaluate the result of a run in one process and stop")
    return parser.parse_args()


# ---- model, text, data ------------------------------------------------------------------------------


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def read_text(path: Path | None) -> tuple[str, str]:
    """The first three quarters of the text, and the last. No paragraph occurs twice."""
    if path is not None:
        documents = [path.read_text(encoding="utf-8")]
    else:
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    paragraphs = {}
    for document in documents:
        for paragraph in document.split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    kept = [paragraph for key, paragraph in paragraphs.items() if key]
    cut = 3 * len(kept) // 4
    return "\n\n".join(kept[:cut]), "\n\n".join(kept[cut:])


def train_tokenizer(text: str, config: LlamaConfig) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def blocks(text: str, tokenizer, size: int) -> list[dict[str, list[int]]]:
    """All of the text in blocks of equal length, so that every batch weighs the same in a mean loss."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    pieces = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


# ---- the training -----------------------------------------------------------------------------------


class Progressed(TrainerCallback):
    """A progress bar with loss and speed on the main rank; without a terminal, a line now and then."""

    def __init__(self, title: str, every: int):
        self.title, self.every = title, every

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.tokens = time.time(), state.num_input_tokens_seen
        self.bar = Progress(
            TextColumn(f"  {self.title}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (state.is_world_process_zero and console.is_terminal),
        )
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, shown="")
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        seconds = time.time() - self.start
        speed = (state.num_input_tokens_seen - self.tokens) / seconds
        shown = f"loss {float(logs['loss']):.3f}  {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=state.global_step, shown=shown)
        if state.global_step % self.every == 0:
            console.print(f"  {self.title} {state.global_step:>3}/{state.max_steps}  {shown}  ({seconds:.0f} s)")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


class Killed(TrainerCallback):
    """The last rank dies after a step, as with its machine: no handler runs, the other ranks learn it from outside."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and int(os.environ.get("WORLD_SIZE", "1")) == RANK + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(title: str, model, tokenizer, train_set, eval_set, args, directory: Path) -> Trainer:
    steps, lr = (args.max_steps, args.lr) if title == "full" else (args.lora_steps, args.lora_lr)
    training_args = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=1,
        save_strategy="steps" if title == "full" else "no",
        save_steps=args.save_steps,
        save_total_limit=1,
        include_num_input_tokens_seen="all",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        log_level_replica="error",
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[Progressed(title, max(1, steps // 6))],
    )
    if args.kill_at and title == "full":
        trainer.add_callback(Killed(args.kill_at))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def losses_of(trainer: Trainer) -> dict[int, float]:
    """The training loss of each step, those before a resume included."""
    return {entry["step"]: float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry}


def train(args: argparse.Namespace) -> int:
    out = args.output_dir
    base_dir, adapter_dir = out / "base", out / "adapter"
    transformers.set_seed(args.seed)
    config = model_config()
    first_part, last_part = read_text(args.text)
    tokenizer = train_tokenizer(first_part, config)
    train_set = blocks(first_part, tokenizer, args.block_size)
    held_out = blocks(last_part, tokenizer, args.block_size)
    eval_set, lora_set = held_out[: args.eval_blocks], held_out[args.eval_blocks :]
    if not train_set or len(eval_set) < args.eval_blocks or not lora_set:
        raise SystemExit("The text is too short for these sizes: lower --block-size or --eval-blocks.")

    model = LlamaForCausalLM(config)
    console.print(
        f"Llama with {model.num_parameters() / 1e6:.1f} M parameters, vocabulary {len(tokenizer)}, "
        f"blocks of {args.block_size} tokens: {len(train_set)} to train on, "
        f"{len(lora_set)} held out for LoRA, {len(eval_set)} for evaluation",
        soft_wrap=True,
    )

    console.print("[bold]All parameters[/bold], first part of the text")
    trainer = make_trainer("full", model, tokenizer, train_set, eval_set, args, base_dir)
    trainer.train(resume_from_checkpoint=args.resume)
    history = {"full": losses_of(trainer)}
    base_loss = trainer.evaluate()["eval_loss"]
    console.print(f"  evaluation loss on the held-out part: {base_loss:.4f}")
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the base model is complete on disk

    console.print("[bold]LoRA on all linear layers[/bold], held-out part of the text")
    del model, trainer
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    transformers.set_seed(args.seed)  # the same adapters, however many processes trained until here
    lora = LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    trainable, total = model.get_nb_trainable_parameters()
    console.print(f"  {trainable / 1e6:.2f} M of {total / 1e6:.1f} M parameters are trained")
    trainer = make_trainer("LoRA", model, tokenizer, lora_set, eval_set, args, adapter_dir)
    trainer.train()
    history["LoRA"] = losses_of(trainer)
    adapter_loss = trainer.evaluate()["eval_loss"]
    console.print(f"  evaluation loss: {base_loss:.4f} before, {adapter_loss:.4f} after")
    trainer.save_model()

    processes = trainer.accelerator.num_processes
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # the distributed part ends here
    if RANK != 0:
        return 0
    record = {
        "text": str(args.text.resolve()) if args.text else None,
        "block_size": args.block_size,
        "batch_size": args.batch_size,
        "eval_blocks": args.eval_blocks,
        "processes": processes,
        "losses": {"base": base_loss, "adapter": adapter_loss},
        "history": history,
    }
    (out / "run.json").write_text(json.dumps(record) + "\n")
    return 0 if args.no_check else compare(out)


# ---- the check --------------------------------------------------------------------------------------


def plain_environment() -> dict[str, str]:
    """The environment without what launchers have set."""
    names = (
        "ACCELERATE_ FSDP_ PARALLELISM_CONFIG_ HF_AUTO_PARALLEL TORCHELASTIC_ TORCH_NCCL_ "
        "MASTER_ WORLD_SIZE RANK LOCAL_ GROUP_ ROLE_ OMP_NUM_THREADS"
    )
    launcher = tuple(names.split())
    return {name: value for name, value in os.environ.items() if not name.startswith(launcher)}


def compare(out: Path) -> int:
    """Load the result of the run in ``out`` in one fresh process and show both losses; 0 if they agree."""
    console.print("[bold]The saved result in one fresh process[/bold], plain transformers + PEFT")
    run = json.loads((out / "run.json").read_text())
    command = [sys.executable, __file__, "--check", str(out)]
    done = subprocess.run(command, env=plain_environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        console.print(f"[red]the process failed with exit status {done.returncode}[/red]")
        return 1
    losses, fresh, processes = run["losses"], json.loads(done.stdout.splitlines()[-1]), run["processes"]

    table = Table(title="evaluation loss", title_justify="left")
    table.add_column("", no_wrap=True)
    for title in (f"trained, {processes} process{'es' * (processes > 1)}", "loaded, 1 process", "difference"):
        table.add_column(title, justify="right", no_wrap=True)
    worst = 0.0
    for name, title in (("base", "base model"), ("adapter", "base + LoRA adapter")):
        difference = abs(losses[name] - fresh[name])
        worst = max(worst, difference) if difference == difference else float("inf")  # NaN is a failure too
        table.add_row(title, f"{losses[name]:.6f}", f"{fresh[name]:.6f}", f"{difference:.1e}")
    console.print(table)
    if worst > TOLERANCE:
        console.print(f"[bold red]The evaluation losses differ by {worst:.1e}, more than {TOLERANCE:.0e}.[/bold red]")
        return 1
    console.print(f"[bold green]The evaluation losses agree to within {TOLERANCE:.0e}.[/bold green] Files: {out}")
    return 0


@torch.no_grad()
def mean_loss(model, eval_set, batch_size: int) -> float:
    model.eval()
    losses = []
    for i in range(0, len(eval_set), batch_size):
        batch = default_data_collator(eval_set[i : i + batch_size])
        losses += [model(**batch).loss.item()] * len(batch["input_ids"])
    return sum(losses) / len(losses)


def check(out: Path) -> int:
    """What a user of the result would write. Prints both losses as one line of JSON."""
    if not (out / "run.json").is_file():
        raise SystemExit(f"There is no result of a run in {out}: run.json is missing.")
    record = json.loads((out / "run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    _, last_part = read_text(Path(record["text"]) if record["text"] else None)
    eval_set = blocks(last_part, tokenizer, record["block_size"])[: record["eval_blocks"]]
    model = AutoModelForCausalLM.from_pretrained(out / "base")
    losses = {"base": mean_loss(model, eval_set, record["batch_size"])}
    model = PeftModel.from_pretrained(model, out / "adapter")
    losses["adapter"] = mean_loss(model, eval_set, record["batch_size"])
    print(json.dumps(losses))
    return 0


def main() -> int:
    args = parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.write_config:
        model_config().save_pretrained(args.write_config)
        console.print(f"wrote {args.write_config / 'config.json'}")
        return 0
    if args.check:
        return check(args.check)
    return train(args)


if __name__ == "__main__":
    sys.exit(main())
