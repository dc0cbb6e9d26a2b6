"""Loss parallelism: logits stay sharded over the vocabulary, look whole, and the loss is computed on the shards."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.pool import run_distributed
from harness.training import batches_for, build, five_steps_trainer, trainable
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError
from hf_automodel_parallel.core.rendezvous import TIMEOUT_VARIABLE
from hf_automodel_parallel.tensor_parallel.vocab_parallel import logits as sharded_logits
from hf_automodel_parallel.tensor_parallel.vocab_parallel.cross_entropy import Vocabulary
from hf_automodel_parallel.tensor_parallel.vocab_parallel.logits import ShardedLogits, shard_logits

# ---- functions: each equals the same function of whole logits, in value and gradient --------------------------------

CLASSES = 16
SHAPE = (2, 5, CLASSES)
TARGET = torch.randint(0, CLASSES, SHAPE[:-1], generator=torch.Generator().manual_seed(2))
TARGET[0, 1] = -100
MASK = torch.tensor([[True, False, True, True, False], [True] * 5])


class Squared(torch.autograd.Function):
    """Somebody's kernel: autograd records the wrapper, not the slice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def _set(x: torch.Tensor, index: Any) -> torch.Tensor:
    x[index] = -5.0
    return x


def _after(function: Any, x: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """`x` after a function has changed it in place, called with names alone."""
    function(input=x, **arguments)
    return x * 2


def _write_into_view(x: torch.Tensor, view: Any) -> torch.Tensor:
    view(x).mul_(0.5)
    return x * 2


def _entropies(x: torch.Tensor) -> torch.Tensor:
    parts = [F.log_softmax(part, dim=-1) for part in x.reshape(-1, CLASSES).split(4, dim=0)]
    return torch.cat([-(part.exp() * part).sum(-1) for part in parts])


def flat_loss(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(x.view(-1, CLASSES), TARGET.view(-1), **options)


#: name -> (function, whole logits are needed for it)
FUNCTIONS: dict[str, tuple[Any, bool]] = {
    "mean": (lambda x: flat_loss(x.float()), False),
    "sum, smoothed": (lambda x: flat_loss(x, reduction="sum", label_smoothing=0.1), False),
    "none": (lambda x: flat_loss(x, reduction="none"), False),
    "float64": (lambda x: flat_loss(x.double()), False),
    "nothing counts": (lambda x: F.cross_entropy(x[0], torch.full((5,), -100), reduction="sum"), False),
    "one row": (lambda x: F.cross_entropy(x[0, 0], TARGET[0, 0]), False),
    "module, shifted": (
        lambda x: torch.nn.CrossEntropyLoss(ignore_index=3)(
            x[..., :-1, :].contiguous().view(-1, x.size(-1)), TARGET[..., 1:].clamp(min=0).reshape(-1)
        ),
        False,
    ),
    "a whole slice masked": (
        lambda x: F.cross_entropy(x.masked_fill(torch.arange(CLASSES) < 8, -torch.inf)[1], TARGET[1].clamp(min=8)),
        False,
    ),
    "class weights": (lambda x: flat_loss(x, weight=torch.linspace(0.5, 1, CLASSES, dtype=x.dtype)), True),
    "probabilities": (lambda x: F.cross_entropy(x[0], torch.full((5, CLASSES), 1 / CLASSES, dtype=x.dtype)), True),
    "classes in dimension 1": (lambda x: F.cross_entropy(x.transpose(1, 2), TARGET), True),
    "log_softmax": (lambda x: F.log_softmax(x, dim=-1), False),
    "softmax": (lambda x: x.softmax(-1), False),
    "chosen": (lambda x: -F.log_softmax(x, dim=-1).gather(dim=-1, index=TARGET.clamp(min=0).unsqueeze(-1)), False),
    "smoothing": (lambda x: F.log_softmax(x, dim=-1).sum(dim=-1, keepdim=True, dtype=torch.float32), False),
    "entropies": (_entropies, False),
    "logsumexp by rows": (lambda x: torch.stack([torch.logsumexp(row, dim=-1) for row in x]), False),
    "soft cap": (lambda x: torch.tanh(x / 30.0) * 30.0, False),
    "reversed": (lambda x: 2 / (3 - x), False),
    "bias": (lambda x: x + torch.arange(CLASSES).to(x.dtype), False),
    "temperatures": (lambda x: x / torch.full((2, 5, 1), 2.0, dtype=x.dtype), False),
    "chosen rows": (lambda x: x[MASK], False),
    "last": (lambda x: x[:, -1], False),
    "a class": (lambda x: x[..., 3], True),
    "new last dimension": (lambda x: x[..., None], True),
    "new first dimension": (lambda x: x[None], False),
    "where": (lambda x: torch.where(MASK.unsqueeze(-1), x, 0.0), False),
    "pieces": (lambda x: torch.cat([x.unbind(0)[1], x.chunk(2, dim=0)[0].flatten(0, 1)]), False),
    "there and back": (lambda x: x.to(torch.bfloat16).float(), False),
    "argmax": (lambda x: x.argmax(-1), True),
    "average": (lambda x: x.mean(), True),
    "as integers": (lambda x: torch.stack([x.int(), x.long(), x.bool().int()]), False),
    "as many rows as a rank has classes, transposed": (lambda x: x.reshape(-1, CLASSES)[: CLASSES // 2].t(), True),
    "in place": (lambda x: x.clone().div_(2.0), False),
    "operators in place": (lambda x: functools.reduce(lambda y, f: f(y), [lambda y: y.__iadd__(1)], x.clone()), False),
    "set rows": (lambda x: _set(x.clone(), (slice(None), 0)), True),
    "set a class": (lambda x: _set(x.clone(), (..., 2)), True),
    "write into rows": (lambda x: _write_into_view(x.clone(), lambda y: y[:, :-1]), False),
    "write into a class": (lambda x: _write_into_view(x.clone(), lambda y: y[..., 5]), True),
    "custom function": (Squared.apply, False),
    "custom function after a change": (lambda x: Squared.apply(x.clone().mul_(3.0)), False),
    "like": (lambda x: torch.zeros_like(x) + x.new_ones(CLASSES), False),
    "named: softmax": (lambda x: torch.softmax(input=x, dim=-1), False),
    "named: softmax of rows": (lambda x: torch.softmax(input=x, dim=0), True),
    "named: transposed": (lambda x: torch.transpose(input=x, dim0=0, dim1=2), True),
    "named: in one row": (lambda x: torch.flatten(input=x), True),
    "named: new shape": (lambda x: torch.reshape(input=x, shape=(-1,)), True),
    "named: detached": (lambda x: torch.detach(input=x) * x, False),
    "named: like": (lambda x: torch.zeros_like(input=x) + x, False),
    "named: view as": (lambda x: x.view_as(other=torch.empty(10, CLASSES)), False),
    "named: where": (lambda x: torch.where(condition=MASK.unsqueeze(-1), input=x, other=0.0), False),
    "named: in place": (lambda x: _after(torch.clamp_, x.clone(), min=torch.zeros(5, 1, dtype=x.dtype)), False),
    "named: in place, whole": (lambda x: _after(torch.relu_, x.clone()), True),
    "numpy's names: a sum": (lambda x: torch.logsumexp(x, axis=-1, keepdims=True), False),
    "numpy's names: classes": (lambda x: torch.stack(x.unbind(axis=-1)[:3]), True),
    "numpy's names: joined": (lambda x: torch.concatenate([x, x], axis=-1), True),
}


def compare_functions(dtype: torch.dtype, chunk_rows: int | None) -> dict[str, tuple[list[str], int]]:
    """What is wrong with each function, and how often logits were gathered."""
    rank, size = dist.get_rank(), dist.get_world_size()
    width = CLASSES // size
    vocabulary = Vocabulary(dist.group.WORLD, rank, size, chunk_rows)
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    gathered: list[int] = []
    original = sharded_logits.gather_from_tp
    sharded_logits.gather_from_tp = lambda *args: gathered.append(1) or original(*args)
    verdicts = {}
    for name, (function, _) in FUNCTIONS.items():
        reference = whole.clone().requires_grad_()
        want = function(reference)
        part = whole[..., rank * width : (rank + 1) * width].clone().requires_grad_()
        gathered.clear()
        got = function(shard_logits(part * 1, vocabulary))
        problems, count = [], len(gathered)
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            problems.append(f"{got.shape} {got.dtype} instead of {want.shape} {want.dtype}")
        values = got.full() if isinstance(got, ShardedLogits) else got
        if not torch.allclose(values.float(), want.float(), **tolerance):
            problems.append("values")
        if got.requires_grad != want.requires_grad:
            problems.append("requires_grad")
        elif want.requires_grad:
            weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
            (want.float() * weights).sum().backward()
            (got.float() * weights).sum().backward()
            if not torch.allclose(part.grad, reference.grad[..., rank * width : (rank + 1) * width], **tolerance):
                problems.append("gradient")
        verdicts[name] = problems, count
    sharded_logits.gather_from_tp = original
    return verdicts


@pytest.mark.core_cases("2-dtype0-3")
@pytest.mark.both_ends
@pytest.mark.parametrize(
    "size, dtype, rows", [(2, torch.float32, 3), (2, torch.bfloat16, None), (4, torch.float32, None)]
)
def test_functions_of_sharded_logits_equal_those_of_whole_ones(size, dtype, rows):
    for rank in run_distributed(size, compare_functions, dtype, rows):
        assert {name: problems for name, (problems, _) in rank.items() if problems} == {}
        assert {name for name, (_, count) in rank.items() if count} == {
            n for n, (_, whole) in FUNCTIONS.items() if whole
        }


def as_a_tensor() -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    part = whole.chunk(size, dim=-1)[rank].clone().requires_grad_()
    logits = shard_logits(part * 1, Vocabulary(dist.group.WORLD, rank, size))
    text = repr(logits)
    seen = []
    logits.register_hook(seen.append)
    (flat_loss(logits) + logits.full().sum()).backward()
    plain = logits.detach()
    stacked = torch.empty(size * SHAPE[0], *SHAPE[1:])
    dist.all_gather_into_tensor(stacked, plain)
    other = shard_logits(part.detach().clone().requires_grad_() * 1, logits.vocabulary)
    (asked,) = torch.autograd.grad(flat_loss(other), other)
    narrow = shard_logits(part.detach().bfloat16(), logits.vocabulary)
    upcast = narrow.float()
    narrow.div_(2)
    stale = error_of(lambda: upcast * 1)
    return {
        "tensor": torch.is_tensor(logits) and not isinstance(logits, DTensor),
        "text": "slice" in text and str(SHAPE) in text,
        "hook": torch.allclose(seen[0].full(), asked.full() + 1),
        "copy": torch.equal(copy.deepcopy(plain), whole) and torch.equal(pickle.loads(pickle.dumps(plain)), whole),
        "numpy": (plain.numpy() == whole.numpy()).all() and plain.tolist() == whole.tolist(),
        "collective": torch.equal(stacked, torch.cat([whole] * size)),
        "stale": stale,
        "target": error_of(lambda: F.cross_entropy(plain.view(-1, CLASSES), torch.full((10,), 77))),
    }


def error_of(function: Any) -> str:
    try:
        function()
    except (UnsupportedError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.core
def test_sharded_logits_are_a_tensor():
    for rank in run_distributed(2, as_a_tensor):
        assert rank.pop("stale").startswith("UnsupportedError: the logits were modified in place")
        assert rank.pop("target").startswith("IndexError: Target 77 is out of bounds")
        assert all(rank.values()), rank


# ---- in a model
# --------------------------------------------------------------------------------------------------------


def prepared(name: str, adapter: dict[str, Any] | None = None, mixed_precision: str = "no", **config: Any) -> Any:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**config), mixed_precision=mixed_precision)
    model = build(name, adapter)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    return accelerator, model


def loss_communication(**config: Any) -> tuple[Counter[str], Counter[str], str]:
    """Collectives of forward and backward, and the type of the logits."""
    _, model = prepared("llama", tp_size=2, **config)
    batch = batches_for(model, 1)[0]
    with CommDebugMode() as forward:
        outputs = model(**batch, use_cache=False)
    with CommDebugMode() as backward:
        outputs.loss.backward()
    counts = [
        Counter({str(k).rpartition(".")[2]: n for k, n in mode.get_comm_counts().items()})
        for mode in (forward, backward)
    ]
    return counts[0], counts[1], type(outputs.logits).__name__


@pytest.mark.core
def test_the_loss_adds_small_all_reduces_instead_of_a_gather():
    forward, backward, kind = run_distributed(2, loss_communication)[0]
    gathered_forward, gathered_backward, gathered_kind = run_distributed(2, loss_communication, loss_parallel=False)[0]
    assert (kind, gathered_kind) == ("ShardedLogits", "Tensor")
    assert gathered_forward.total() - gathered_forward["all_reduce"] == 1  # the gather
    assert forward.total() == forward["all_reduce"] <= gathered_forward["all_reduce"] + 3
    assert backward == gathered_backward


def penalised(batch: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
    """The model's loss and what somebody reads off the logits, sharded and whole."""
    z = torch.logsumexp(outputs.logits, dim=-1).pow(2).mean()
    return outputs.loss + 0.1 * z + 0.1 * outputs.logits[..., :5].pow(2).mean()


def penalised_gradients(name: str, adapter: dict[str, Any] | None) -> tuple[float, dict, torch.Tensor, torch.Tensor]:
    accelerator, model = prepared(name, adapter, tp_size=2)
    batch = batches_for(model, 1)[0]
    outputs = model(**batch, use_cache=False)
    loss = penalised(batch, outputs)
    accelerator.backward(loss)
    gradients = full_grads(model)
    with torch.no_grad():
        evaluated = model.eval()(batch["input_ids"], logits_to_keep=3).logits[:, :, 1:7]
    return loss.item(), gradients, outputs.logits.detach() + 0, evaluated


@pytest.mark.parametrize(
    "name, adapter", [("cohere", None), ("gemma3_softcap", {"target_modules": ["q_proj", "lm_head"]})]
)
def test_whoever_reads_the_logits_has_them_whole_and_gradients_add_up(name, adapter):
    loss, gradients, logits, evaluated = run_distributed(2, penalised_gradients, name, adapter)[0]
    reference = build(name, adapter)
    batch = batches_for(reference, 1)[0]
    outputs = reference(**batch)
    want = penalised(batch, outputs)
    want.backward()
    assert_losses_equal(loss, want.item())
    assert_gradients_equal(gradients, {n: p.grad for n, p in reference.named_parameters()})
    torch.testing.assert_close(logits, outputs.logits.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluated, outputs.logits.detach()[:, -3:, 1:7], rtol=1e-5, atol=1e-5)


@pytest.mark.core
def test_label_smoothing_of_the_trainer(tmp_path):
    """With `num_items_in_batch` and accumulation; the Trainer's smoother reads the logits itself."""
    options = {"ragged": True, "accumulation": 2, "output_dir": str(tmp_path), "label_smoothing_factor": 0.1}
    sharded, gathered = (
        run_distributed(2, five_steps_trainer, "llama", {"tp_size": 2, "loss_parallel": on}, **options)[0]
        for on in (True, False)
    )
    assert len(sharded) == len(gathered) == 5
    for got, want in zip(sharded, gathered, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def one_step(precision: str, backend: str | None, **config: Any) -> tuple[float, dict, torch.dtype]:
    accelerator, model = prepared("gemma3_softcap", mixed_precision=precision, tp_size=2, **config)
    called = torch.compile(model, backend=backend) if backend else model
    outputs = called(**batches_for(model, 1)[0], use_cache=False)
    accelerator.backward(outputs.loss)
    return outputs.loss.item(), full_grads(model), outputs.loss.dtype


def test_chunks_and_a_compiled_whole_model_change_nothing():
    loss, gradients, _ = run_distributed(2, one_step, "no", None, loss_parallel=False)[0]
    for backend, options in ((None, {"loss_chunk_size": 7}), ("aot_eager", {})):
        got = run_distributed(2, one_step, "no", backend, timeout=200, **options)[0]
        assert_losses_equal(got[0], loss)
        assert_gradients_equal(got[1], gradients)


def what_outlives_a_step(**config: Any) -> list[bool]:
    """Whether the logits, and the model, are still there when nobody holds them."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2, **config))
    model = build("llama")
    batch = batches_for(model, 1)[0]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    outputs = model(**batch, use_cache=False)
    accelerator.backward(outputs.loss)
    optimizer.step()
    held = [weakref.ref(outputs.logits), weakref.ref(model)]
    accelerator.free_memory()
    del outputs, model, optimizer, accelerator
    gc.collect()
    return [reference() is not None for reference in held]


def test_nothing_outlives_a_step():
    """A hook that refers to the logits it hangs on is a cycle through the graph of autograd, which is never
    collected.
    """
    for options in ({}, {"sequence_parallel": True}):
        assert run_distributed(2, what_outlives_a_step, **options) == [[False, False]] * 2


def test_mixed_precision():
    """Loss and gradients pass through bfloat16 in either way, in which a unit in the last place is 2 ** -8."""
    loss, gradients, dtype = run_distributed(2, one_step, "bf16", None, loss_parallel=False)[0]
    got = run_distributed(2, one_step, "bf16", None, loss_parallel=True)[0]
    assert got[2] == dtype
    assert_losses_equal(got[0], loss, rtol=2**-8)
    assert_gradients_equal(got[1], gradients, rtol=5e-3, atol_of_total=1e-4)


# ---- what is decided, and refused
# --------------------------------------------------------------------------------------


def read_on_one_rank() -> str:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama")
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    logits = model(**batches_for(model, 1)[0], use_cache=False).logits
    logits.sum().item()  # on all ranks
    os.environ[TIMEOUT_VARIABLE] = "1"
    try:
        if accelerator.is_main_process:
            (logits * 2)[0, 0, :3].tolist()
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def test_reading_logits_on_one_rank_ends_with_the_missing_rank():
    read, other = run_distributed(2, read_on_one_rank)
    assert "rank 0 reads logits" in read and "rank 1 did not within 1 s" in read and "all ranks" in read
    assert other == "nothing"
