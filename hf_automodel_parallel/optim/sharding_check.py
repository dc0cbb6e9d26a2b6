"""Check numerically that an optimizer computes the same update on shards as on full parameters.

An element-wise optimizer is correct on any shard. An optimizer with a statistic over the full parameter (Adafactor's
row and column means, LAMB's trust ratio, Muon's orthogonalisation) is correct only if it computes it with DTensor
operators, across the shards. A list of names could not cover optimizers that users write. So an optimizer of the same
class with the same settings steps on a small full tensor, and on the same tensor with the placements of the real
parameter. The results must agree. The check runs before ``prepare`` changes anything.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .. import compat
from ..core.ranks import difference, raise_on_all_ranks
from ..core.shard_layout import shard_parameter
from ..core.sharding_spec import REPLICATED, ParameterSpec
from ..errors import PrepareError, UnsupportedError
from ..fsdp.shard import data_parallel_placement
from .handoff import optimizer_name

#: Largest accepted difference, relative to the norm of the full update. Rounding stays well below (also the bfloat16
#: iterations of Muon and 8-bit states); a statistic over a shard instead of the full parameter is well above.
TOLERANCE = 0.05

#: torch's classes whose update of an element depends on that element alone. Tests train each of them on shards, so a
#: run does not try it again. A subclass may change the update and is tried.
ELEMENT_WISE: frozenset[type[torch.optim.Optimizer]] = frozenset(
    getattr(torch.optim, name) for name in "SGD Adam AdamW Adamax NAdam RAdam Adadelta Adagrad RMSprop ASGD".split()
)

#: The same for the larger tensors. Quantised states have other blocks on a shard than on the full parameter, which is
#: right; measured: 0.9 % for torchao's 8-bit AdamW, 1.3 % for its fp8 AdamW.
_LARGE_TOLERANCE = 0.2

#: Optimizers with 8-bit states keep those of fewer elements in float32 (bitsandbytes, torchao).
_QUANTIZED_FROM = 4096

_STEPS = 3
_LEARNING_RATE = 0.01
_REMEDY = (
    "Use an element-wise optimizer (AdamW, SGD, Adagrad, RMSprop, Lion, ...) or one that computes with DTensors. If "
    "you know that this one is right on shards, set AutoParallelismConfig(check_optimizer=False)."
)


@dataclass(frozen=True)
class _Kind:
    """A small shape and a placement, which represent all parameters that a sharded optimizer treats in the same way."""

    shape: tuple[int, ...]
    spec: ParameterSpec
    sharded: bool


def check_on_shards(
    optimizers: list[torch.optim.Optimizer],
    names: list[list[list[str]]],
    shapes: dict[str, torch.Size],
    specs: dict[str, ParameterSpec],
    dp_mesh: DeviceMesh,
    tp_mesh: DeviceMesh | None,
    device: torch.device,
    offload_policy: OffloadPolicy | None = None,
    unsharded: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Raise unless each optimizer computes the same update on shards as on full parameters.

    Collective over both meshes; all ranks call it with the same arguments. The optimizers, their parameters and the
    random state are not changed.

    Args:
        optimizers: torch optimizers.
        names: ``names[optimizer][group][i]``, the names of their parameters.
        shapes: name -> full shape of the parameter.
        specs: name -> placement on the tp axis; a missing name means ``Replicate``.
        dp_mesh: the mesh for ``fully_shard``.
        tp_mesh: the tp axis; None without tensor parallelism.
        device: device of the shards.
        offload_policy: FSDP2's offload policy; it may put the shards on the CPU.
        unsharded: names of parameters that FSDP2 ignores.

    Raises:
        UnsupportedError: an optimizer raises on shards, or computes a different update there.
        PrepareError: an optimizer cannot be constructed or run on small tensors, or ranks have different optimizers.
    """
    kinds, large = (
        [
            [_kinds_of(group, shapes, specs, dp_mesh, tp_mesh, unsharded, larger) for group in optimizer_names]
            for optimizer_names in names
        ]
        for larger in (False, True)
    )
    _check_same([_described(optimizer) for optimizer in optimizers], names)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=accelerators, device_type=device.type if accelerators else "cuda"):
        for optimizer, groups, large_groups in zip(optimizers, kinds, large, strict=True):
            if _known_element_wise(optimizer, groups):
                continue
            shard = functools.partial(
                _sharded,
                dp_mesh=dp_mesh,
                tp_mesh=tp_mesh,
                device=device,
                offload_policy=offload_policy or OffloadPolicy(),
            )
            _check_one(optimizer, groups, shard, uneven_numbers, TOLERANCE)
            # torch's own optimizers run the same code on tensors of every size.
            if not type(optimizer).__module__.startswith("torch."):
                _check_one(optimizer, large_groups, shard, _even_numbers, _LARGE_TOLERANCE)


def _known_element_wise(optimizer: torch.optim.Optimizer, groups: list[list[_Kind]]) -> bool:
    """Whether the check can be left out: a class of `ELEMENT_WISE` in its default implementation.

    The fused and foreach ones may refuse a list of DTensors, and the default on GPUs (foreach) refuses a list that
    mixes DTensors with plain tensors.
    """
    settings = [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    implementations = ("fused", "foreach", "capturable", "differentiable")
    default = not any(group.get(flag) for group in optimizer.param_groups for flag in implementations)
    default = default and not any(isinstance(value, torch.Tensor) for value in settings)
    one_type = len({kind.sharded for kinds in groups for kind in kinds}) <= 1
    return type(optimizer) in ELEMENT_WISE and default and one_type


def _kinds_of(
    group: list[str],
    shapes: dict[str, torch.Size],
    specs: dict[str, ParameterSpec],
    dp_mesh: DeviceMesh,
    tp_mesh: DeviceMesh | None,
    unsharded: frozenset[str] | set[str],
    larger: bool = False,
) -> list[_Kind]:
    """The kinds of the parameters of one group.

    Args:
        group: their names.
        shapes, specs, dp_mesh, tp_mesh, unsharded: as for :func:`check_on_shards`.
        larger: of those parameters alone whose shards have :data:`_QUANTIZED_FROM` elements or more, with shapes whose
            shards have, too. Otherwise even the full tensors are smaller, so that shard and full tensor are treated
            alike by an optimizer that treats large tensors differently.
    """
    found: dict[_Kind, None] = {}
    tp_size, dp_size = 1 if tp_mesh is None else tp_mesh.size(), dp_mesh.size(dp_mesh.ndim - 1)
    for name in group:
        if not shapes[name]:
            continue  # without dimensions: a replica on each rank, which is stepped as in one process
        spec = specs.get(name, REPLICATED)
        # Only these fields decide the shards; the others would multiply the number of kinds to check.
        spec = ParameterSpec(spec.dim, spec.blocks)
        unit = spec.blocks * tp_size
        shape = tuple(shapes[name])
        # (2, ..., 24, 24), or as much in one dimension
        targets = [2] * (len(shape) - 2) + [24, 24] if len(shape) > 1 else [576] * len(shape)
        shards = (tp_size if spec.dim is not None else 1) * (dp_size if name not in unsharded else 1)
        if larger and math.prod(shape) // shards < _QUANTIZED_FROM:
            continue
        small: list[int] = []
        for dim, (size, target) in enumerate(zip(shape, targets, strict=True)):
            multiple = unit * dp_size if dim == 0 or spec.blocks > 1 else unit
            if larger and dim == len(shape) - 1:
                target = math.ceil(_QUANTIZED_FROM * shards / math.prod(small))
            elif not larger and dim > 0:
                target = min(target, max(1, (_QUANTIZED_FROM - 1) // math.prod(small)))  # many ranks
            # The small size keeps the remainder of the real one, because uneven and empty shards are special cases.
            remainder = 0 if larger else size % multiple
            small.append(size if size < multiple else math.ceil(target / multiple) * multiple + remainder)
        found.setdefault(_Kind(tuple(small), spec, name not in unsharded))
    return list(found)


def _described(optimizer: torch.optim.Optimizer) -> str:
    plain = (bool, int, float, str, type(None))
    settings = [
        {key: value for key, value in sorted(group.items()) if key != "params" and isinstance(value, plain)}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__} {settings}"


def _check_same(described: list[str], names: list[list[list[str]]]) -> None:
    found = difference((described, names))
    if found is not None:
        raise PrepareError(
            f"the optimizer of rank {found.ranks[0]} is not that of rank 0: {_shortened(found.other[0])} instead of "
            f"{_shortened(found.reference[0])}, or for other parameters. Shards of one parameter would be changed "
            f"differently. Create it alike on all ranks."
        )


def _shortened(described: list[str]) -> str:
    text = "; ".join(described)
    return text if len(text) <= 300 else text[:300] + " ..."


def _check_one(
    optimizer: torch.optim.Optimizer,
    groups: list[list[_Kind]],
    shard: Callable[[list[torch.Tensor], list[_Kind]], list[nn.Parameter]],
    numbers: Callable[[tuple[int, ...], torch.Generator], torch.Tensor],
    tolerance: float,
) -> None:
    """Compare the steps of a twin of ``optimizer`` on full tensors and on shards; ``numbers`` makes the gradients."""
    cls = optimizer_name(optimizer)
    kinds = [kind for group in groups for kind in group]
    if not kinds:
        return
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(kind.shape, generator=generator) for kind in kinds]
    gradients = [[numbers(kind.shape, generator) for kind in kinds] for _ in range(_STEPS)]
    parameters = shard(values, kinds)
    sharded_gradients = [shard(step, kinds) for step in gradients]
    home = parameters[0].device
    full = [nn.Parameter(value.clone().to(home)) for value in values]
    # If only one rank fails, the others must not wait in the all-gather of the results below.
    with raise_on_all_ranks("trying the optimizer"), _explained(functools.partial(_cannot_be_tried, cls)):
        reference = like_on(optimizer, groups, full)
        run_steps(reference, full, [[g.to(home) for g in step] for step in gradients])
        probe = like_on(optimizer, groups, parameters)
    with raise_on_all_ranks("trying the optimizer"), _explained(functools.partial(_fails_on_shards, cls)):
        run_steps(probe, parameters, sharded_gradients)
    results = [_full(p) for p in parameters]
    for kind, value, expected, result in zip(kinds, values, full, results, strict=True):
        update = (expected.detach().cpu() - value).double().norm().item()
        difference = (expected.detach().cpu() - result.detach().cpu()).double().norm().item()
        # The second term is rounding of the values, for updates that are tiny or zero. `not <=` also catches NaN.
        if not difference <= tolerance * update + 1e-6 * value.double().norm().item():
            raise UnsupportedError(
                f"{cls} computes something else on sharded parameters than on full ones: on a parameter with "
                f"{len(kind.shape)} dimension{'s' if len(kind.shape) > 1 else ''} ({kind.spec} over tp, then sharded "
                f"by FSDP2) its update is off by {difference / update if update else math.inf:.0%}. It needs a "
                f"statistic over the full parameter and takes it over each shard. {_REMEDY}"
            )


@contextmanager
def _explained(explain: Callable[[str], Exception]) -> Iterator[None]:
    """Convert any exception of the optimizer's own code with ``explain``."""
    try:
        yield
    except Exception as error:
        raise explain(f"{type(error).__name__}: {_first_line(error)}") from error


def _cannot_be_tried(cls: str, reason: str) -> PrepareError:
    return PrepareError(
        f"{cls} cannot be tried on small tensors ({reason}), so it is unknown whether it computes on shards what it "
        f"computes on full parameters. Its class should be constructible from parameter groups and its defaults. If "
        f"you know that it treats each element on its own, set AutoParallelismConfig(check_optimizer=False)."
    )


def _fails_on_shards(cls: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{cls} does not work on sharded parameters (DTensors): {reason}. {_REMEDY}")


def uneven_numbers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return heavy-tailed random numbers that grow along each dimension.

    So each statistic over a shard differs clearly from the one over the full tensor.

    Returns:
        float32 on the CPU, of the given shape.
    """
    result = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(2).exp()
    for dim, size in enumerate(shape):
        ramp = torch.logspace(-1, 1, size)
        result *= ramp.view([-1 if d == dim else 1 for d in range(len(shape))])
    return result


def _even_numbers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return normally distributed numbers: the scale of a quantised block fits all of its elements."""
    return torch.randn(shape, generator=generator)


def _sharded(
    values: list[torch.Tensor],
    kinds: list[_Kind],
    dp_mesh: DeviceMesh,
    tp_mesh: DeviceMesh | None,
    device: torch.device,
    offload_policy: OffloadPolicy,
) -> list[nn.Parameter]:
    """Return ``values`` as parameters, sharded by the same code that shards the model."""
    module = nn.Module()
    ignored: set[nn.Parameter] = set()
    for index, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        parameter = nn.Parameter(value.clone().to(device))
        if tp_mesh is not None:
            parameter = shard_parameter(parameter, kind.spec, tp_mesh, device)
        if not kind.sharded:
            ignored.add(parameter)
        module.register_parameter(str(index), parameter)
    placement = functools.partial(data_parallel_placement, size=dp_mesh.size(dp_mesh.ndim - 1))
    fully_shard(
        module,
        mesh=dp_mesh,
        shard_placement_fn=placement,
        offload_policy=offload_policy,
        ignored_params=ignored or None,
    )
    return list(module.parameters())


def _full(parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    # Offloaded shards are on the CPU; NCCL can only all-gather them on the GPU.
    local = parameter.to_local().detach().to(parameter.device_mesh.device_type)
    gathered = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    compat.mark_packed_placements([gathered])
    return gathered.full_tensor()


def like_on(
    optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Any]], parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return a new optimizer of the same class with the same settings.

    The learning rate is replaced by a fixed one, because a warm-up may start at zero.

    Args:
        optimizer: the optimizer to imitate.
        groups: for each of its groups a sequence with as many items as the new group has parameters.
        parameters: the parameters of all new groups, concatenated.
    """
    made = []
    remaining = iter(parameters)
    for group, kinds in zip(optimizer.param_groups, groups, strict=True):
        if not kinds:
            continue
        settings = {key: copy.deepcopy(v) for key, v in group.items() if key not in ("params", "param_names")}
        settings["lr"] = _learning_rate(settings.get("lr"))
        made.append({**settings, "params": [next(remaining) for _ in kinds]})
    arguments = {}
    # Constructor arguments need not be in `defaults`: some optimizers keep them as attributes only.
    for name, parameter in list(inspect.signature(type(optimizer).__init__).parameters.items())[2:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in optimizer.defaults:
            arguments[name] = optimizer.defaults[name]
        elif hasattr(optimizer, name):
            arguments[name] = getattr(optimizer, name)
    if "lr" in arguments:
        arguments["lr"] = _learning_rate(arguments["lr"])
    result = type(optimizer)(made, **arguments)
    train = getattr(result, "train", None)  # optimizers with a training and an evaluation mode
    if callable(train):
        train()
    return result


def _learning_rate(given: Any) -> Any:
    if given is None:  # Adafactor chooses its own
        return None
    return torch.full_like(given, _LEARNING_RATE) if isinstance(given, torch.Tensor) else _LEARNING_RATE


def run_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: list[list[Any]]) -> None:
    """Take one step of ``optimizer`` for each list of gradients (one for each parameter, in the same placement)."""
    # The same random numbers on full tensors and on shards. This seeds the global RNG; callers have to restore it.
    torch.manual_seed(0)
    for gradients in steps:

        def closure(gradients: list[Any] = gradients) -> Any:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                # The term with the parameter makes the gradient depend on it, which a line search needs.
                parameter.grad = (gradient + 0.1 * parameter).detach()
            return torch.zeros((), device=parameters[0].device)

        closure()
        with torch.enable_grad():
            optimizer.step(closure) if _needs_closure(optimizer) else optimizer.step()


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else ""
