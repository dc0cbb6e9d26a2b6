"""Comparing losses, gradients and parameters of a parallel run with those of the oracle."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

Gradients = Mapping[str, torch.Tensor | None]

WORST_SHOWN = 10

_WRAPPER_SEGMENTS = {"_checkpoint_wrapped_module", "_orig_mod", "module"}


def gradient_error(
    gradient: torch.Tensor,
    reference: torch.Tensor,
    all_ref_norm: float,
    rtol: float = 1e-5,
    atol_of_total: float = 1e-8,
) -> float:
    """``|g - g*| / (rtol |g*| + atol_of_total all_ref_norm)``: more than 1 is too far off.

    The bound is relative to each parameter, so that an error in a small one is not lost beside the large ones; the
    second term, relative to the norm of all reference gradients together, allows for the rounding of gradients that
    cancel to nearly nothing (for example of the bias of a key projection). Infinite if anything is not finite.
    """
    difference = _norm(gradient.double() - reference.double())
    bound = rtol * _norm(reference) + atol_of_total * all_ref_norm
    if difference == 0.0:
        return 0.0
    if not math.isfinite(difference) or bound == 0.0:
        return math.inf
    return difference / bound


def assert_gradients_equal(got: Gradients, want: Gradients, rtol: float = 1e-5, atol_of_total: float = 1e-8) -> None:
    """Asserts names, presence, shapes, dtypes, and the bound of `gradient_error` for *every* parameter."""
    problems = [f"{name}: not expected" for name in sorted(got.keys() - want.keys())]
    problems += [f"{name}: missing" for name in sorted(want.keys() - got.keys())]
    all_ref_norm = math.sqrt(math.fsum(_norm(reference) ** 2 for reference in want.values() if reference is not None))
    compared = 0
    failed: list[tuple[float, str, torch.Tensor, torch.Tensor]] = []
    for name in sorted(got.keys() & want.keys()):
        gradient, reference = got[name], want[name]
        if gradient is None or reference is None:
            if reference is not None:
                problems.append(f"{name}: no gradient")
            elif gradient is not None:
                problems.append(f"{name}: a gradient where none is expected")
        elif (gradient.shape, gradient.dtype) != (reference.shape, reference.dtype):
            problems.append(
                f"{name}: {tuple(gradient.shape)} {gradient.dtype}"
                f" instead of {tuple(reference.shape)} {reference.dtype}"
            )
        else:
            compared += 1
            error = gradient_error(gradient, reference, all_ref_norm, rtol, atol_of_total)
            if error > 1.0:
                failed.append((error, name, gradient, reference))
    if not problems and not failed:
        return
    lines = [f"{len(failed)} of {compared} gradients are too far off; norm of all references {all_ref_norm:.3e}"]
    lines += problems
    if failed:
        failed.sort(key=lambda entry: entry[0], reverse=True)
        lines.append(f"{'error/bound':>12} {'|g-g*|/|g*|':>12} {'|g|':>10} {'|g*|':>10}  parameter")
    for error, name, gradient, reference in failed[:WORST_SHOWN]:
        norm, reference_norm = _norm(gradient), _norm(reference)
        difference = _norm(gradient.double() - reference.double())
        relative = difference / reference_norm if reference_norm else math.inf
        lines.append(f"{error:12.3g} {relative:12.3e} {norm:10.3e} {reference_norm:10.3e}  {name}")
    raise AssertionError("\n".join(lines))


def assert_losses_equal(got: float | Sequence[float], want: float | Sequence[float], rtol: float = 1e-6) -> None:
    """Compares one loss or as many as there are steps."""
    got_values = [got] if isinstance(got, float) else list(got)
    want_values = [want] if isinstance(want, float) else list(want)
    if len(got_values) != len(want_values):
        raise AssertionError(f"{len(got_values)} losses instead of {len(want_values)}")
    errors = [abs(a - b) / abs(b) if b else math.inf for a, b in zip(got_values, want_values, strict=True)]
    if not all(error <= rtol for error in errors):
        table = "\n".join(
            f"{index:4d} {a:.9g} {b:.9g} {error:.3e}"
            for index, (a, b, error) in enumerate(zip(got_values, want_values, errors, strict=True))
        )
        raise AssertionError(f"losses differ by more than {rtol:g}\nstep got expected relative error\n{table}")


def assert_bitwise_equal(by_rank: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Asserts that every rank reports the same tensors, to the last bit."""
    for rank, tensors in enumerate(by_rank):
        assert tensors.keys() == by_rank[0].keys()
        different = [name for name, tensor in tensors.items() if not torch.equal(tensor, by_rank[0][name])]
        assert not different, f"rank {rank} differs from rank 0 in {len(different)} tensors: {different[:4]}"


def mean_over_ranks(loss: torch.Tensor) -> float:
    """The loss of all ranks. Collective."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def full_grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The whole gradients as plain tensors; a collective, to be called on all ranks of the model."""
    return {
        normalize_name(name): None if parameter.grad is None else _full(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def full_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole parameters as plain tensors; a collective, to be called on all ranks of the model."""
    with torch.no_grad():  # detach() would lose what compat marks in the spec of packed parameters before torch 2.13
        return {normalize_name(name): _full(parameter).detach() for name, parameter in model.named_parameters()}


def normalize_name(name: str) -> str:
    """`name` without the segments that checkpointing, torch.compile and DDP put into it."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    # A replicated DTensor gives its own storage, which the next backward or step would change.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _norm(tensor: torch.Tensor) -> float:
    return tensor.double().norm().item()


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
