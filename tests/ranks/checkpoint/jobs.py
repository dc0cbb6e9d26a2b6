"""What the ranks run in the tests of training checkpoints."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from harness.compare import mean_over_ranks
from harness.models import build_model, lora
from harness.training import _Rows, batches_for, data_rank

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.checkpoint import commit as directories
from hf_automodel_parallel.checkpoint import manifest
from hf_automodel_parallel.checkpoint.background import wait_for_saves

ROWS = 8
LORA = {"target_modules": "all-linear"}
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
#: As many KV heads as the largest tp size needs.
OVERRIDES = {"num_key_value_heads": 4}


def build(name: str, adapter: dict[str, Any] | None, seed: int = 0) -> torch.nn.Module:
    model = build_model(name, seed=0 if adapter else seed, **OVERRIDES)
    return model if adapter is None else lora(model, seed=1 + seed, **adapter)


def two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam with a group of its own, with other settings, for the vectors and the down projections."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    special = [p for name, p in parameters if p.ndim == 1 or "down_proj" in name]
    rest = [p for name, p in parameters if not (p.ndim == 1 or "down_proj" in name)]
    return torch.optim.AdamW(
        [{"params": rest, "lr": 1e-2}, {"params": special, "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)}]
    )


class Counter:
    """A state of the user, with an array of numpy."""

    def __init__(self) -> None:
        self.seen = numpy.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Run:
    """A model, its optimizer, schedule and a state of the user's, prepared on a mesh."""

    def __init__(
        self, sizes: dict[str, int], name: str, adapter: dict[str, Any] | None, kind: str, seed: int = 0, **config: Any
    ) -> None:
        self.accelerator = Accelerator(
            parallelism_config=AutoParallelismConfig(**sizes, **config),
            fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind),
        )
        self.dp = self.accelerator.parallelism_config.data_parallel_size
        set_seed(17 + data_rank(self.accelerator) + 100 * seed)
        model = build(name, adapter, seed)
        optimizer = two_groups(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / self.dp))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def steps(self, first: int, last: int) -> list[float]:
        """The mean losses of steps `first` to `last` - 1, each on its own batch, and at the end the learning rate."""
        losses = []
        for step in range(first, last):
            batch = batches_for(self.model, self.dp, rows=ROWS, seed=30 + step)[data_rank(self.accelerator)]
            loss = self.model(**batch, use_cache=False).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.counter.seen[0] += 1
            losses.append(mean_over_ranks(loss))
        return [*losses, self.schedule.get_last_lr()[0] * 1e2, float(self.counter.seen[0])]


def start(sizes: dict[str, int], name: str, adapter: Any, kind: str, folder: str) -> list[float]:
    """Two steps, a save, and five more."""
    run = Run(sizes, name, adapter, kind)
    run.steps(0, 2)
    run.accelerator.save_state(folder)
    return run.steps(2, 7)


def go_on(sizes: dict[str, int], name: str, adapter: Any, kind: str, folder: str, save_to: str | None) -> list[float]:
    """From other weights and seeds: a load, a save, and five steps."""
    run = Run(sizes, name, adapter, kind, seed=5)
    run.accelerator.load_state(folder)
    if save_to is not None:
        run.accelerator.save_state(save_to)
    return run.steps(2, 7)


def exactly(sizes: dict[str, int], kind: str, folder: str) -> tuple[list[float], list[float]]:
    """Same mesh, dropout: the same numbers to the last bit; saved over an older checkpoint, in the background."""
    adapter = LORA | {"lora_dropout": 0.2, "modules_to_save": ["lm_head"]}
    run = Run(sizes, "llama", adapter, kind, async_save=True)
    run.accelerator.save_state(folder)
    run.steps(0, 2)
    run.accelerator.save_state(folder)
    want = run.steps(2, 5)  # while the checkpoint is written
    wait_for_saves()
    again = Run(sizes, "llama", adapter, kind, seed=5, async_save=True)
    again.accelerator.load_state(folder)
    return want, again.steps(2, 5)


def failing(action: Any) -> str:
    """The message of the error that `action` ends with."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class limited:
    """Files of this rank may not grow beyond some bytes: what a full disk does, for one process."""

    def __init__(self, here: bool, size: int = 4096) -> None:
        self.here, self.size = here, size

    def __enter__(self) -> None:
        if self.here:
            self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *args: Any) -> None:
        if self.here:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def faults(sizes: dict[str, int], parent: str) -> dict[str, str]:
    """Label -> message of what goes wrong on this rank."""
    rank = dist.get_rank()
    seen: dict[str, str] = {}
    root = Path(parent)
    run = Run(sizes, "llama", None, SHARDED)
    run.steps(0, 1)
    good = root / "checkpoint_1"
    run.accelerator.save_state(str(good))

    def copy(name: str, manifest_too: bool = True) -> Path:
        if rank == 0:
            shutil.copytree(good, root / name)
            if not manifest_too:
                (root / name / manifest.MANIFEST).unlink()
        dist.barrier()
        return root / name

    def load(folder: Path, other: Run = run) -> str:
        return failing(lambda: other.accelerator.load_state(str(folder)))

    # No space left on one rank, in a new directory and over a complete checkpoint.
    for label, rank_with_limit in (("full_on_1", 1), ("full_on_0", 0)):
        with limited(rank == rank_with_limit):
            seen[label] = failing(lambda label=label: run.accelerator.save_state(str(root / label)))
            seen[f"{label}_over"] = failing(lambda: run.accelerator.save_state(str(good)))
        seen[f"{label}_status"] = directories.status(root / label).kind
    seen["good_after_full"] = load(good)
    # Whole files of FULL_STATE_DICT are written by rank 0 alone.
    plugin = run.accelerator.state.fsdp_plugin
    plugin.set_state_dict_type(FULL)
    with limited(rank == 0):
        seen["full_file"] = failing(lambda: run.accelerator.save_state(str(root / "full_file")))
    plugin.set_state_dict_type(SHARDED)
    # A file changed, cut, gone.
    damaged = {
        "flipped": lambda p: p.write_bytes(p.read_bytes()[:-9] + b"x" + p.read_bytes()[-8:]),
        "cut": lambda p: p.write_bytes(p.read_bytes()[:-9]),
        "gone": lambda p: p.unlink(),
    }
    for label, action in damaged.items():
        folder = copy(label)
        if rank == 0:
            action(folder / "optimizer_0" / "__1_0.distcp")
        dist.barrier()
        seen[label] = load(folder)
    # Another model, an adapter where there was none, other groups.
    seen["other_model"] = load(good, Run(sizes, "qwen3", None, SHARDED))
    seen["other_sizes"] = load(good, Run(sizes, "llama_odd_vocab", None, SHARDED))
    seen["other_adapter"] = load(good, Run(sizes, "llama", LORA, SHARDED))
    # Planted pickles, in a checkpoint whose manifest an attacker has left out.
    for name in ("random_states_1.pkl", "custom_checkpoint_0.pkl", "scheduler.bin", "pytorch_model_fsdp_0/.metadata"):
        folder = copy("planted_" + Path(name).name.replace(".", ""), manifest_too=False)
        if rank == 0:
            planted = Planted(str(root / "run"))
            if name.endswith(".metadata"):
                (folder / name).write_bytes(pickle.dumps(planted))
            else:
                torch.save(planted, folder / name)
        dist.barrier()
        seen[name] = load(folder)
    seen["run"] = str((root / "run").exists())
    seen["kwargs"] = failing(lambda: run.accelerator.load_state(str(good), load_kwargs={"weights_only": False}))
    seen["nothing"] = load(root / "not_there")
    seen["good"] = load(good)
    seen["background"] = _background(run, sizes, root, rank)
    return seen


def _background(run: Run, sizes: dict[str, int], root: Path, rank: int) -> str:
    """An error of a save in the background comes out at the next one."""
    run.accelerator.parallelism_config.async_save = True
    with limited(rank == 1, 40_000):  # the random states fit in
        started = failing(lambda: run.accelerator.save_state(str(root / "late")))
        return f"{started}; {failing(wait_for_saves)}"


class Planted:
    """Unpickling it creates a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def shuffled(sizes: dict[str, int], folder: str) -> tuple[list[list[int]], list[list[int]]]:
    """What a loop reads after a save in the middle of its second epoch, and what one with other seeds reads that
    resumes.
    """

    def loader_of(seed: int) -> tuple[Accelerator, Any]:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        set_seed(seed + dist.get_rank())
        data = torch.utils.data.DataLoader(torch.arange(32), batch_size=2, shuffle=True)
        return accelerator, accelerator.prepare(data)

    accelerator, loader = loader_of(1)
    accelerator.save_state(folder)
    seen: list[list[int]] = []
    for epoch in range(3):
        for index, batch in enumerate(loader):
            seen.append(batch.tolist())
            if epoch == 1 and index == 2:
                accelerator.save_state(folder)
                seen.clear()
    accelerator, loader = loader_of(2)
    accelerator.load_state(folder)
    again = [batch.tolist() for batch in accelerator.skip_first_batches(loader, 3)]
    return seen[: len(again)], again


def with_stock(sizes: dict[str, int], parent: str) -> list[list[float]]:
    """Losses after a save by one and a load by the other of: ours and ours, ours and stock's, stock's and ours."""
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    run = Run(sizes, "llama", None, SHARDED)
    plugin = run.accelerator.state.fsdp_plugin
    run.steps(0, 2)
    run.accelerator.save_state(f"{parent}/ours")
    save_fsdp_model(plugin, run.accelerator, run.model, f"{parent}/stock", 0)
    save_fsdp_optimizer(plugin, run.accelerator, run.optimizer, run.model, f"{parent}/stock", 0)
    if dist.get_rank() == 0:
        for name in os.listdir(f"{parent}/ours"):
            if name.startswith(("random_states", "scheduler", "custom")):
                shutil.copy(f"{parent}/ours/{name}", f"{parent}/stock/{name}")
    dist.barrier()
    results = [run.steps(2, 4)[:2]]
    stock = Run(sizes, "llama", None, SHARDED, seed=5)
    load_fsdp_model(plugin, stock.accelerator, stock.model, f"{parent}/ours", 0)
    load_fsdp_optimizer(plugin, stock.accelerator, stock.optimizer, stock.model, f"{parent}/ours", 0)
    stock.schedule.load_state_dict(torch.load(f"{parent}/ours/scheduler.bin"))
    results.append(stock.steps(2, 4)[:2])
    ours = Run(sizes, "llama", None, SHARDED, seed=5)
    ours.accelerator.load_state(f"{parent}/stock")
    results.append(ours.steps(2, 4)[:2])
    return results


def quantised(sizes: dict[str, int], base: str, parent: str, kind: str, resume: bool) -> list[float]:
    """QLoRA, saved after two steps, or resumed there: the losses of the two steps after."""
    from ranks.peft.test_qlora import NF4, quantized

    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind),
    )
    model = quantized(base, NF4, {})
    if resume:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    parts = dist.get_world_size() // accelerator.parallelism_config.non_data_parallel_size
    found = []
    if resume:
        accelerator.load_state(parent)
    for step in range(2 if resume else 0, 4):
        if step == 2 and not resume:
            accelerator.save_state(parent)
        batch = batches_for(model, parts, seed=step)[data_rank(accelerator)]
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(mean_over_ranks(loss))
    return found[-2:]


# ---- the Trainer ---------------------------------------------------------------------------------------------------


def trainer(
    sizes: dict[str, int], kind: str, output_dir: str, adapter: Any, steps: int, dp: int, seed: int = 0, **options: Any
) -> Any:
    from transformers import Trainer, TrainingArguments

    class Mine(Trainer):
        """A subclass like TRL's: overrides, and calls super."""

        saves = 0

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.saves += 1
            super()._save_checkpoint(model, trial)

    config = AutoParallelismConfig(**sizes, async_save=options.pop("async_save", False))
    args = TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=ROWS // dp,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,  # of the order of the data too
        parallelism_config=config,
        fsdp="full_shard" if dist.is_initialized() else None,
        fsdp_config={"fsdp_version": 2, "state_dict_type": kind} if dist.is_initialized() else None,
        **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **options},
    )
    model = build("llama", adapter, seed)
    data = _Rows([batch for step in range(6) for batch in batches_for(model, 1, rows=ROWS, seed=50 + step)])
    return Mine(model, args, train_dataset=data)


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def trainer_run(sizes: dict[str, int], kind: str, output_dir: str, adapter: Any, dp: int) -> dict[str, Any]:
    """Six steps with three checkpoints; then from the last complete one, True and by path."""
    seen: dict[str, Any] = {}
    kept = Path(output_dir)
    made = trainer(sizes, kind, output_dir, adapter, 6, dp, save_total_limit=2, async_save=True)
    made.train()
    seen["want"] = losses(made)
    seen["saves"] = made.saves
    dist.barrier()
    seen["left"] = sorted(os.listdir(kept))
    dist.barrier()  # all ranks have looked
    if dist.get_rank() == 0:  # a save that was killed
        shutil.copytree(kept / "checkpoint-6", kept / "checkpoint-7")
        (kept / "checkpoint-7" / manifest.MANIFEST).rename(kept / "checkpoint-7" / manifest.MARK)
        shutil.rmtree(kept / "checkpoint-6")
    dist.barrier()
    resumed = trainer(sizes, kind, output_dir, adapter, 6, dp, seed=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    seen["resumed"] = losses(resumed)
    seen["error"] = failing(
        lambda: trainer(sizes, kind, output_dir, adapter, 6, dp).train(
            resume_from_checkpoint=str(kept / "checkpoint-7")
        )
    )
    return seen


def trainer_goes_on(sizes: dict[str, int], kind: str, checkpoint: str, adapter: Any, dp: int) -> list[float]:
    made = trainer(sizes, kind, checkpoint + "_unused", adapter, 6, dp, seed=4, save_strategy="no")
    made.train(resume_from_checkpoint=checkpoint)
    return losses(made)
