"""Dropout under tensor parallelism: equal masks on replicated activations, different ones on sharded activations.

The ranks of a tp group start from one random state (:func:`~..core.consistency.synchronize_rng`), so they draw equal
numbers. That is right for dropout on replicated activations. Two kinds of dropout need different masks on each rank:
that of an adapter whose input is sharded, and any between a column-wise and a row-wise layer (attention probabilities,
activations inside an MLP). The former is :class:`ShardedDropout`, the latter runs under :class:`TPRngTracker`.

The TP-local numbers have no state of their own: they follow from the common state and the rank. So an activation
checkpoint that restores the common state recomputes with the same masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..core.consistency import synchronize_rng
from ..core.sharding_spec import REPLICATED, InputHook, OutputHook, ShardingSpec
from ..errors import UnsupportedError

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

#: Odd, and far from any power of two, so that the seeds of neighbouring ranks differ in many bits.
_STRIDE = 0x9E3779B97F4A7C15


class ShardedDropout(nn.Dropout):
    """Dropout of an activation whose last dimension is sharded: each rank applies its slice of one mask.

    Every rank draws the masks of all ranks, so the common random state advances equally on all of them, and the masks
    are independent. This needs temporary memory of ``size`` bytes for each element of the local activation.

    Args:
        p: probability of an element to be zeroed.
        rank: coordinate of this rank on the tp axis.
        size: number of ranks on the tp axis.
    """

    def __init__(self, p: float, rank: int, size: int) -> None:
        super().__init__(p)
        self.rank, self.size = rank, size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` of any shape -> the same shape and dtype."""
        if not self.training or self.p == 0.0:
            return input
        if self.p == 1.0:
            return input * 0.0
        masks = torch.empty((self.size, *input.shape), dtype=torch.bool, device=input.device).bernoulli_(1.0 - self.p)
        return input * masks[self.rank].clone() / (1.0 - self.p)  # clone: backward must not keep all masks alive


class TPRngTracker:
    """Switches the default generator between the common random state of all tp ranks and a TP-local one.

    Args:
        rank: coordinate of this rank on the tp axis.
        device: where the model's activations are.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.generator = _default_generator(device)
        self.common: Any = None  # the common seed or state, while TP-local numbers are drawn
        self.untouched = b""

    def enter(self, *_: Any) -> None:
        """Draw TP-local numbers from here on. For use as a forward hook."""
        if self.common is not None or torch.compiler.is_compiling():
            return
        generator = self.generator
        if generator.device.type == "cuda":
            # A counter-based generator: another seed at the same offset needs no tensor and no synchronisation with
            # the device.
            self.common, offset = generator.initial_seed(), generator.get_offset()
            generator.manual_seed(self._mixed(self.common))
            generator.set_offset(offset)
        else:
            self.common = generator.get_state()
            generator.manual_seed(self._mixed(int.from_bytes(_digest(self.common), "little")))
            self.untouched = _digest(generator.get_state())

    def leave(self, *_: Any) -> None:
        """Return to the common random state of all tp ranks. For use as a forward (pre-)hook; may be called twice."""
        if self.common is None or torch.compiler.is_compiling():
            return
        generator, common, self.common = self.generator, self.common, None
        if generator.device.type == "cuda":
            offset = generator.get_offset()  # equal on all ranks, because their shards have equal sizes
            generator.manual_seed(common)
            generator.set_offset(offset)
        else:
            drew = _digest(generator.get_state()) != self.untouched
            generator.set_state(common)
            # Advance the shared state, or the next TP-local numbers would repeat these. Without any drawn, the shared
            # numbers stay those of one process.
            if drew:
                torch.randint(2, (), generator=generator, device=generator.device)

    def _mixed(self, seed: int) -> int:
        return (seed ^ ((self.rank + 1) * _STRIDE)) % 2**63


def _digest(state: torch.Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


def install_sharded_dropout(model: nn.Module, spec: ShardingSpec, mesh: DeviceMesh) -> None:
    """Replace the dropout of adapters whose input is sharded over the tp axis ``mesh`` by :class:`ShardedDropout`."""
    tuner = compat.peft_tuner_layer_type()
    if tuner is None:
        return
    for name, module in model.named_modules():
        dropouts = getattr(module, "lora_dropout", None)
        if not isinstance(module, tuner) or not isinstance(dropouts, nn.ModuleDict):
            continue
        for adapter, dropout in list(dropouts.items()):
            place = spec.parameters.get(f"{name}.lora_A.{adapter}.weight", REPLICATED)
            if place.dim == 1 and isinstance(dropout, nn.Dropout) and not isinstance(dropout, ShardedDropout):
                sharded = ShardedDropout(dropout.p, mesh.get_local_rank(), mesh.size())
                dropouts[adapter] = sharded.train(dropout.training)


def install_tp_rng(
    model: nn.Module,
    spec: ShardingSpec,
    mesh: DeviceMesh,
    device: torch.device,
    hook: Callable[[nn.Module, Callable[[nn.Module], Any]], None],
) -> TPRngTracker:
    """Draw TP-local numbers between column-wise and row-wise layers.

    They begin at the output of a column-wise layer, and end at the input of the next module whose activations are not
    sharded on both sides: one with TP hooks, or one with a replicated parameter whose gradient is not Partial.

    Args:
        model: the model.
        spec: its sharding spec.
        mesh: the tp axis.
        device: where the model's activations are.
        hook: called with a module and a function that registers a hook on it.

    Returns:
        The tracker, one for all hooks of the model.
    """
    numbers = TPRngTracker(mesh.get_local_rank(), device)
    tuner = compat.peft_tuner_layer_type()
    for name, module in model.named_modules():
        boundary = spec.modules.get(name)
        owned = [f"{name}.{key}" if name else key for key in module._parameters]
        replicated = any(spec.parameters.get(parameter, REPLICATED) == REPLICATED for parameter in owned)
        if boundary is not None or replicated or (tuner is not None and isinstance(module, tuner)):
            hook(module, lambda m: m.register_forward_pre_hook(numbers.leave))
        if boundary is not None and is_columnwise(boundary):
            hook(module, lambda m: m.register_forward_hook(numbers.enter))
    model.register_forward_hook(numbers.leave, always_call=True)
    return numbers


def synchronize_at_first_forward(model: nn.Module, mesh: DeviceMesh) -> None:
    """Synchronise the random state over the tp axis once more, at the first training forward.

    A script may seed each process differently after ``prepare``, too.
    """

    def hook(module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            handle.remove()
            synchronize_rng(mesh)

    handle = model.register_forward_pre_hook(hook)


def is_columnwise(boundary: Any) -> bool:
    """True if the module's output stays sharded."""
    return boundary.input is InputHook.COPY_TO_TP and boundary.output is OutputHook.NONE


def draws_random_numbers(model: nn.Module) -> bool:
    """True if a module of ``model`` has a dropout, jitter or noise of some kind that is not zero."""
    return any(
        active_dropouts(module)
        or any(isinstance(v, float) and v > 0 for k, v in vars(module).items() if "jitter" in k or "noise" in k)
        for module in model.modules()
    )


def active_dropouts(module: nn.Module) -> dict[str, float]:
    """The dropout probabilities above zero in attributes of ``module`` itself, by name.

    Modules keep the probability for a functional dropout (attention kernels take one) in an attribute whose name says
    so: ``attention_dropout``, ``attn_pdrop``, ``drop_path``, ...
    """
    found = {
        name: float(value)
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    }
    if isinstance(module, _DROPOUTS) and module.p > 0:
        found["p"] = float(module.p)
    return found


def refuse_compiled_dropout(model: nn.Module, spec: ShardingSpec) -> None:
    """Raise for compiled layers that draw random numbers on sharded activations.

    Inside of a graph the random state cannot be switched, so the masks of the ranks would be equal.

    Args:
        model: the model.
        spec: its sharding spec.

    Raises:
        UnsupportedError: a module around a column-wise layer, or one that runs on sequence shards, has a dropout that
            is not zero.
    """
    for name, boundary in spec.modules.items():
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        if not is_columnwise(boundary):
            continue
        found = active_dropouts(parent)
        for key, child in parent.named_children():
            if isinstance(child, _DROPOUTS) and child.p > 0:
                found[key] = float(child.p)
        if found:
            shown = ", ".join(f"{key}={value:g}" for key, value in found.items())
            raise UnsupportedError(
                f"compile with tp_size > 1: {parent_name} ({type(parent).__name__}) has {shown}, a dropout on "
                f"activations that are sharded over tp. Inside of a compiled layer its masks would be equal on all tp "
                f"ranks. Set it to 0 in the model's config (adapters may keep lora_dropout), or leave out compile."
            )
    for name in () if spec.sequence is None else spec.sequence.layers:
        for key, module in model.get_submodule(name).named_modules():
            path = f"{name}.{key}" if key else name
            found = active_dropouts(module)
            blocks = spec.sequence.blocks  # type: ignore[union-attr]
            if found and not _is_inside(path, blocks) and not _is_of_adapter(model, path):
                shown = ", ".join(f"{key}={value:g}" for key, value in found.items())
                raise UnsupportedError(
                    f"compile with sequence_parallel=True: {path} ({type(module).__name__}) has {shown}, a dropout on "
                    f"sequence shards. Inside of a compiled layer its masks would be equal on all tp ranks. Set "
                    f"it to 0 in the model's config, or leave out compile."
                )


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in modules)


def _is_of_adapter(model: nn.Module, path: str) -> bool:
    tuner = compat.peft_tuner_layer_type()
    parts = path.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return tuner is not None and any(isinstance(module, tuner) for module in around)
