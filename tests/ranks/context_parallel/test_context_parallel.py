"""Context parallelism: loss and gradients of one process, through Accelerate's documented loop and the stock
Trainer.
"""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.dropout_jobs import recorded_masks, replayed_masks
from harness.meshes import MESHES
from harness.oracle import loss_and_grads, train_steps
from harness.pool import run_distributed
from harness.training import LORA, SEQUENCE, batches_for, build, data_rank, five_steps_trainer, trainable
from harness.training import _Rows as Rows

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError
from ranks.tensor_parallel.test_dropout import assembled, shapes_of
from ranks.trainer.test_training import assert_same_history


def with_shifted_labels(batch):
    """What a collator for context parallelism makes of a batch; every tensor has the sequence in dimension 1."""
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    positions = torch.arange(batch["input_ids"].shape[1]).expand(len(batch["input_ids"]), -1)
    return {**batch, "shift_labels": shifted, "position_ids": positions}


def in_context(accelerator, batch, **options):
    buffers = list(batch.values())
    return accelerator.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1] * len(buffers), **options)


def padded(batch):
    """``batch`` with padding at the end of its rows, as data collators make it; of no row the same number of tokens."""
    lengths = SEQUENCE - 3 - 2 * torch.arange(len(batch["input_ids"]))
    mask = (torch.arange(SEQUENCE) < lengths[:, None]).long()
    hidden = mask == 0
    labels = batch["labels"].masked_fill(hidden, -100)
    return {"input_ids": batch["input_ids"].masked_fill(hidden, 0), "labels": labels, "attention_mask": mask}


def gradients(name, sizes, adapter, dp_size, overrides=None, padding=False, **options):
    """Loss and gradients of one step of Accelerate's loop; labels of some prompts are ignored, so parts have other
    numbers.
    """
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **options))
    model = build(name, adapter, **(overrides or {}))
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    batch = batches_for(model, dp_size, ragged=True)[data_rank(accelerator)]
    batch = with_shifted_labels(padded(batch) if padding else batch)
    with in_context(accelerator, batch):
        assert batch["input_ids"].shape[1] == SEQUENCE // sizes["cp_size"], "not sharded"
        loss = model(**batch).loss
        accelerator.backward(loss)
    assert batch["input_ids"].shape[1] == SEQUENCE, "not restored"
    return mean_over_ranks(loss), loss.item(), full_grads(model)


CELLS = [
    ("llama", "cp2_tp2", None, {}),
    ("llama_tied", "cp2_tp2", LORA, {"activation_checkpointing": "full"}),
    ("llama", "cp2_fsdp2", LORA, {"activation_checkpointing": "selective"}),
    ("qwen3", "cp2_fsdp2", None, {}),
    ("qwen3", "cp2_replicas", LORA, {}),
    ("mixtral", "cp4", LORA, {}),
    ("gpt2", "cp2", None, {}),
    ("llama", "cp2", LORA, {"compile": "aot_eager"}),
]


@pytest.mark.core_cases("llama-cp2_tp2-full", "qwen3-cp2_fsdp2-full", "gpt2-cp2-full")
@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda c: "-".join([c[0], c[1], "lora" if c[2] else "full", *c[3].values()])
)
def test_gradients_equal_one_process(cell):
    name, mesh, adapter, options = cell
    world, sizes, dp_size = MESHES[mesh]
    answers = run_distributed(world, gradients, name, sizes, adapter, dp_size, **options)
    reference = build(name, adapter)
    batches = batches_for(reference, dp_size, ragged=True)
    want_loss, want = loss_and_grads(reference, batches)
    assert_losses_equal(answers[0][0], want_loss)
    assert_losses_equal(
        answers[0][1], loss_and_grads(reference, batches[:1])[0]
    )  # the loss of a rank is that of its rows
    assert_gradients_equal(answers[0][2], want)


def test_padding_at_the_end():
    """The mask that a collator returns is dropped. It is sharded as the inputs are, so that a rank sees parts of it."""
    world, sizes, dp_size = MESHES["cp2_tp2"]
    loss, _, found = run_distributed(world, gradients, "llama", sizes, None, dp_size, padding=True)[0]
    reference = build("llama")
    want_loss, want = loss_and_grads(reference, [padded(b) for b in batches_for(reference, dp_size, ragged=True)])
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(found, want)


# ---- the Trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.core_cases("cp2_fsdp2-lora")
@pytest.mark.parametrize(
    "mesh, adapter, options",
    [("cp2_tp2", None, {"accumulation": 2, "max_grad_norm": 0.05}), ("cp2_fsdp2", LORA, {})],
    ids=["cp2_tp2-accumulated", "cp2_fsdp2-lora"],
)
def test_stock_trainer(mesh, adapter, options, tmp_path):
    """Token-weighted: the rows have different numbers of labels, and so have the parts of a row."""
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(
        world,
        five_steps_trainer,
        "llama",
        sizes,
        adapter=adapter,
        dp_size=dp_size,
        ragged=True,
        output_dir=str(tmp_path),
        **options,
    )[0]
    reference = build("llama", adapter)
    accumulation = options.get("accumulation", 1)
    steps = [batches_for(reference, accumulation, 8 * accumulation, 10 + step, ragged=True) for step in range(5)]
    want = train_steps(reference, steps, lr=1e-3, max_grad_norm=options.get("max_grad_norm", 1.0), combine="tokens")
    assert_same_history(got, want)


def trainer_evaluation(output_dir):
    """The eval loss of the Trainer, and what it says where it would need whole logits."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir,
        use_cpu=True,
        per_device_eval_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        parallelism_config=AutoParallelismConfig(cp_size=2, tp_size=2),
    )
    model = build("llama")
    rows = Rows(batches_for(model, 2, 8, ragged=True))
    loss = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    whole = Trainer(model, args, eval_dataset=rows, compute_metrics=lambda prediction: {})
    with pytest.raises(UnsupportedError, match="only the loss is complete.*prediction_loss_only"):
        whole.evaluate()
    return loss


def test_evaluation_of_the_trainer(tmp_path):
    got = run_distributed(4, trainer_evaluation, str(tmp_path))
    reference = build("llama")
    batches = batches_for(reference, 2, 8, ragged=True)
    want = sum(loss_and_grads(reference, [batch])[0] for batch in batches) / 2
    assert all(abs(loss - want) <= 1e-6 * want for loss in got)


# ---- where the context ends ----------------------------------------------------------------------------------------


def outside_of_the_context():
    """What the prepared model does without the context, and where forward and backward are on two sides of its end."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(cp_size=2, activation_checkpointing="full"))
    model = build("llama")
    (whole,) = batches_for(model, 1, ragged=True)
    torch.manual_seed(dist.get_rank())
    rows = torch.utils.data.DataLoader(torch.arange(64).view(-1, 1), batch_size=4, shuffle=True)
    model, optimizer, rows = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1), rows)
    results = {"drawn": torch.rand(2)}  # what a collator may do; both ranks have one batch
    torch.manual_seed(dist.get_rank())
    results["shuffled"] = [row.flatten().tolist() for row in rows]
    accelerator.backward(model(**whole).loss)
    results["whole"] = full_grads(model)
    optimizer.zero_grad()
    batch = with_shifted_labels({key: value.clone() for key, value in whole.items()})
    view = batch["labels"].view(-1)
    with in_context(accelerator, batch, no_restore_buffers=set(batch.values())):
        loss = model(**batch).loss
    accelerator.backward(loss)  # recomputes every layer
    results["late"] = full_grads(model)
    assert batch["input_ids"].shape[1] == SEQUENCE // 2, "restored, though it need not be"
    assert torch.equal(view, whole["labels"].view(-1)), "other views of a buffer have changed"
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        results["logits"] = model(**whole).logits
        batch = with_shifted_labels(whole)
        with in_context(accelerator, batch):
            output = model(**batch)
        results["losses"] = accelerator.gather_for_metrics(output.loss.repeat(4)).tolist()
        results["generated"] = model.generate(whole["input_ids"], max_new_tokens=2, do_sample=False)
    return results


@pytest.mark.both_ends
def test_outside_of_the_context():
    first, second = run_distributed(2, outside_of_the_context)
    assert first["shuffled"] == second["shuffled"] and torch.equal(first["drawn"], second["drawn"])
    reference = build("llama")
    batches = batches_for(reference, 1, ragged=True)
    loss, want = loss_and_grads(reference, batches)
    assert_gradients_equal(first["whole"], want)
    assert_gradients_equal(first["late"], want)
    assert len(first["losses"]) == 4
    assert all(abs(got - loss) <= 1e-6 * loss for got in first["losses"])
    with torch.no_grad():
        assert torch.allclose(first["logits"], reference(**batches[0]).logits, atol=1e-5)
        tokens = reference.generate(batches[0]["input_ids"], max_new_tokens=2, do_sample=False)
    assert torch.equal(first["generated"], tokens)


# ---- random numbers ------------------------------------------------------------------------------------------------

DROPOUT = {**LORA, "lora_dropout": 0.25}


def gradients_and_masks(checkpointing):
    with recorded_masks() as masks:
        torch.manual_seed(dist.get_rank())
        answer = gradients("llama", {"cp_size": 2, "tp_size": 2}, DROPOUT, 1, activation_checkpointing=checkpointing)
        return *answer, list(masks)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_dropout_masks_differ_along_the_sequence_alone(checkpointing):
    """Replayed in one process: equal on tp ranks where activations are replicated, others on each part of a
    sequence.
    """
    answers = run_distributed(4, gradients_and_masks, checkpointing)
    reference = build("llama", DROPOUT).train()
    (batch,) = batches_for(reference, 1, ragged=True)
    shapes = shapes_of(reference, {key: value[:, : SEQUENCE // 2] for key, value in batch.items()})
    masks = [answer[3] for answer in answers]
    recomputed = len(masks[0]) // len(shapes) - 1
    assert recomputed == (checkpointing == "full")
    parts = [assembled([own[: len(shapes)] for own in masks[first : first + 2]], shapes)[0] for first in (0, 2)]
    assert not any(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    with replayed_masks([whole_sequence(a, b) for a, b in zip(*parts, strict=True)]):
        loss, want = loss_and_grads(reference, [batch])
    assert_losses_equal(answers[0][1], loss)
    assert_gradients_equal(answers[0][2], want)


def whole_sequence(first, second):
    """Head and tail chunks of two ranks in the order of the sequence, which is dimension 1."""
    (a, d), (b, c) = first.chunk(2, 1), second.chunk(2, 1)
    return torch.cat([a, b, c, d], 1)


# ---- what is refused -----------------------------------------------------------------------------------------------


def misuses():
    """Each mistake raises on all four ranks, also one that only the second data-parallel rank makes; then all goes
    on.
    """
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(cp_size=2, dp_shard_size=2))
    model = build("llama")
    good = batches_for(model, 1)[0]
    second = data_rank(accelerator) == 1
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    seen = {}

    def attempt(name, change, drop=(), left_whole=(), **extra):
        batch = with_shifted_labels({key: value.clone() for key, value in good.items()})
        batch = {key: value for key, value in {**batch, **change(batch)}.items() if key not in drop}
        buffers = [value for key, value in batch.items() if key not in left_whole]
        try:
            with accelerator.maybe_context_parallel(buffers, [1] * len(buffers)):
                model(**batch, **extra)
            seen[name] = "accepted"
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"

    def padding(batch):
        mask = torch.ones_like(batch["input_ids"])
        mask[:, : 2 * second] = 0
        return {"attention_mask": mask}

    def padding_with_labels(batch):
        mask = torch.ones_like(batch["input_ids"])
        mask[:, SEQUENCE - 2 * second :] = 0 if second else 1
        return {"attention_mask": mask}

    def packed(batch):
        return {"position_ids": batch["position_ids"] % (8 if second else SEQUENCE)}

    def cut(batch):
        length = SEQUENCE - 1 if second else SEQUENCE
        return {key: value[:, :length].contiguous() for key, value in batch.items()}

    def by_process(batch):
        return {"input_ids": batch["input_ids"] + dist.get_rank() % 2}

    nothing = lambda batch: {}  # noqa: E731
    attempt("padding", padding)
    attempt("padding with labels", padding_with_labels)
    attempt("packed", packed)
    attempt("length", cut)
    attempt("different batches", by_process)
    attempt("no positions", nothing, drop=("position_ids",))
    attempt("whole positions", nothing, left_whole=("position_ids",))
    attempt("whole inputs", nothing, left_whole=("input_ids",))
    attempt("unshifted labels", nothing, drop=("shift_labels",))
    attempt("label smoothing", nothing, drop=("labels",))
    attempt("whole labels", nothing, left_whole=("shift_labels",))
    attempt("no buffers", nothing, left_whole=("input_ids", "labels", "shift_labels", "position_ids"))
    attempt("cache", nothing, use_cache=True)
    attempt("last logits", nothing, logits_to_keep=1)
    attempt("all visible", lambda batch: {"attention_mask": torch.ones_like(batch["input_ids"])})
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    attempt("neftune", nothing)
    return seen


MISUSES = {
    "padding": "attention_mask hides tokens that are followed by others",
    "padding with labels": "hides tokens at the end that have labels",
    "packed": "packed into one row",
    "length": "15 tokens cannot be split into 4 equal chunks",
    "different batches": "ranks of a cp group were given different batches",
    "no positions": "position_ids are missing",
    "whole positions": "Put position_ids into buffers",
    "whole inputs": "a rank holds 8 of 16 tokens",
    "unshifted labels": "labels without shift_labels",
    "label smoothing": "label_smoothing_factor",
    "whole labels": "shift_labels have the shape",
    "no buffers": "buffers has 0 tensors",
    "cache": "use_cache=True is not supported",
    "last logits": "logits_to_keep=1 is not supported",
    "all visible": "accepted",
    "neftune": "neftune_noise_alpha",
}


@pytest.mark.core
def test_misuses_are_refused_on_all_ranks():
    answers = run_distributed(4, misuses)
    for seen in answers:
        assert seen.keys() == MISUSES.keys()
        for name, part in MISUSES.items():
            assert part in seen[name], (name, seen[name])
