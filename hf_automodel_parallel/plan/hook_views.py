"""What does a user's hook on a module of a tensor-parallel model get: full activations, one rank's, or neither?

Input and output hooks of a plan are the innermost ones. So a user's hook outside of a pair of sharded projections gets
the activations of one process. Between them, a linear layer's slice of the features can be all-gathered for the hook
(:mod:`..tensor_parallel.user_hooks`). Whatever else varies across the ranks (heads, Partial sums, values inside of an
adapter) has no general way back to one process's tensor; a hook there is refused.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .. import compat
from ..core.model_view import ModelView
from ..core.sharding_spec import REPLICATED, InputHook, ModuleSpec, OutputHook, ParameterSpec, ShardingSpec
from ..core.user_hooks import SEES_SHARDS, hook_name, is_of_user
from ..errors import UnsupportedError
from .layer_kinds import as_matrix


class Activation(enum.Enum):
    """What one rank holds of an activation, where it is no slice of features."""

    FULL = "full"  # as in one process, with a complete gradient
    COPIED = "copied to tp"  # full, with a Partial gradient
    IDS = "ids"  # token ids, masked and shifted to this rank's rows of the vocabulary
    LOCAL = "local"  # something else that varies across the ranks


@dataclass(frozen=True)
class Features:
    """One rank's slice of the last dimension.

    Attributes:
        blocks: equal blocks that are packed along it, each of them sharded.
        shards: different slices; fewer than ranks if adjacent ranks have the same (KV-head replication).
    """

    blocks: int
    shards: int


@dataclass(frozen=True)
class HookView:
    """What hooks on one module get.

    Attributes:
        inputs: the arguments in a forward pre-hook.
        arguments: the arguments in a forward hook.
        output: the output in a forward hook; of a tuple, its first element.
        rest: indices of the further elements of a tuple that vary across the ranks.
    """

    inputs: Activation | Features = Activation.FULL
    arguments: Activation | Features = Activation.FULL
    output: Activation | Features = Activation.FULL
    rest: tuple[int, ...] = ()

    @property
    def gradients(self) -> bool:
        """True if a backward hook gets the gradients of one process."""
        return self.arguments in (Activation.FULL, Activation.IDS) and self.output is Activation.FULL


FULL = HookView()
LOCAL = HookView(Activation.LOCAL, Activation.LOCAL, Activation.LOCAL)


def hook_views(model: nn.Module, spec: ShardingSpec, tp_size: int) -> dict[str, HookView]:
    """Name of a module -> what hooks on it get; modules with full activations on all sides are left out."""
    blocks = {name.rpartition(".")[0] for name, hooks in spec.modules.items() if _ends_sharded(hooks)}
    found: dict[str, HookView] = {}
    closed: set[str] = set()  # modules inside of which nothing is known
    for name, module in model.named_modules():
        hooks, varying = spec.modules.get(name), spec.varying.get(name)
        if _is_within(name, closed):
            view = LOCAL
        elif hooks is not None:
            view, opaque = _view_of_planned(name, module, hooks, spec, tp_size)
            closed |= {name} if opaque else set()
        elif varying is not None:
            side = {False: Activation.FULL, True: Activation.LOCAL}
            view = HookView(side[varying.inputs], side[varying.inputs], side[varying.output], varying.rest)
        else:  # not run beforehand: beside sharded projections anything may vary
            view = LOCAL if _is_within(name, blocks) else FULL
        if view != FULL:
            found[name] = view
    return found


def _is_within(name: str, modules: set[str]) -> bool:
    """True if the module ``name`` is inside of one of ``modules``; without a loop over them, which may be experts."""
    return any(name[:end] in modules for end, character in enumerate(name) if character == ".")


def _ends_sharded(hooks: ModuleSpec) -> bool:
    """True if activations are sharded on the way in or out of a module with these hooks."""
    column = hooks.input is InputHook.COPY_TO_TP and hooks.output is OutputHook.NONE
    row = hooks.input is InputHook.NONE and hooks.output in (
        OutputHook.REDUCE_FROM_TP,
        OutputHook.REDUCE_SCATTER_SEQUENCE,
    )
    return column or row


def _view_of_planned(
    name: str, module: nn.Module, hooks: ModuleSpec, spec: ShardingSpec, tp_size: int
) -> tuple[HookView, bool]:
    """The view of a module with TP hooks, and whether the modules inside of it compute with neither side's values."""
    if hooks.native_style is not None:
        return LOCAL, True
    base_name, base = name, module
    while hasattr(base, "base_layer"):
        base_name, base = f"{base_name}.base_layer", base.base_layer  # type: ignore[assignment]
    weight = spec.parameters.get(f"{base_name}.weight", REPLICATED)
    matrix = as_matrix(base, base_name)
    varying = spec.varying.get(name)
    inputs: Activation | Features = Activation.FULL
    if hooks.input is InputHook.NONE and (varying.inputs if varying is not None else _ends_sharded(hooks)):
        inputs = _features(weight, tp_size) if matrix is not None else Activation.LOCAL
    arguments = {
        InputHook.NONE: inputs,
        InputHook.COPY_TO_TP: Activation.COPIED,
        InputHook.COPY_ALL_TO_TP: Activation.LOCAL,
        InputHook.SCATTER: Features(1, tp_size),
        InputHook.MASK_IDS: Activation.IDS,
        InputHook.DIVIDE: Activation.LOCAL,
    }[hooks.input]
    output: Activation | Features = Activation.FULL
    if hooks.output is OutputHook.NONE:
        if hooks.input is InputHook.COPY_TO_TP:
            output = _features(weight, tp_size) if matrix is not None else Activation.LOCAL
        elif hooks.input is not InputHook.NONE:
            output = Activation.LOCAL
    elif hooks.output in (OutputHook.COPY_TAIL_TO_TP, OutputHook.REDUCE_SCATTER_SEQUENCE):
        output = Activation.LOCAL
    opaque = matrix is not None or hooks.input is InputHook.COPY_ALL_TO_TP
    return HookView(inputs, arguments, output, () if varying is None else varying.rest), opaque


def _features(weight: ParameterSpec, tp_size: int) -> Features:
    return Features(weight.blocks, tp_size if weight.forward_shard_dim is None else weight.forward_shards)


def check_hooks(model: ModelView, spec: ShardingSpec, tp_size: int) -> None:
    """Raise :class:`UnsupportedError` for a user's hook that would get neither full nor gathered activations.

    Also for a weight that a hook computes before each forward (the old ``weight_norm``, ``prune``): it is no parameter
    that could be sharded, and computed from full parameters it does not fit between a shard's hooks.
    """
    for name in spec.modules:
        for path, module in model.model.get_submodule(name).named_modules(prefix=name):
            for key in ("weight", "bias"):
                if isinstance(vars(module).get(key), torch.Tensor):
                    sources = ", ".join(source for source in module._parameters if source.startswith(f"{key}_"))
                    raise UnsupportedError(
                        f"{path}.{key} is computed by a hook before each forward (torch.nn.utils.weight_norm or prune) "
                        f"from {sources}, and the tensor-parallel plan shards {name}. Make it permanent before prepare "
                        f"(prune.remove, remove_weight_norm), use torch.nn.utils.parametrizations, whose layers stay "
                        f"replicated, or use tp_size=1."
                    )
    modules = dict(model.model.named_modules())
    for name, view in hook_views(model.model, spec, tp_size).items():
        for problem in refused_hooks(name, modules[name], view):
            raise UnsupportedError(problem)


def refused_hooks(name: str, module: nn.Module, view: HookView) -> Iterator[str]:
    """An error for each hook of the user on ``module`` that cannot be shown what one process shows it."""
    kinds = (
        ("register_forward_pre_hook", compat.forward_pre_hooks(module), view.inputs is not Activation.LOCAL),
        ("register_forward_hook", compat.forward_hooks(module), Activation.LOCAL not in (view.arguments, view.output)),
        ("register_full_backward_hook", compat.backward_hooks(module), view.gradients),
    )
    for register, hooks, shown in kinds:
        for hook in () if shown else hooks.values():
            if is_of_user(hook):
                yield (
                    f"the hook {hook_name(hook)} on {name} ({register}) would get this rank's part of what one process "
                    f"shows it, and change loss or gradients: between sharded layers the activations differ across "
                    f"the ranks of the tp axis. Register a forward (pre-)hook on a sharded linear layer itself, where "
                    f"activations are gathered for it, or a hook on the module around; set hook.{SEES_SHARDS} = True "
                    f"if it only observes and may see this rank's part; or leave the block out of the plan (tp_plan), "
                    f"or use tp_size=1."
                )
