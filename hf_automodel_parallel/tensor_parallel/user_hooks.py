"""Hooks of the user on modules of a tensor-parallel model get full activations, or an error.

Of :mod:`..plan.hook_views`: outside of pairs of sharded projections nothing is to be done, except that the TP input and
output hooks have to be the innermost ones, also if the user registers a hook after ``prepare``. A hook on a sharded
linear layer is called with the features all-gathered, and each rank keeps its slice of what it returns. The gradient is
right on both ways: all ranks compute the same in the hook, so the gather's backward takes the own slice and the slice's
backward all-gathers. The cost is one all-gather for each side that a hook gets, and one in backward if it returns a new
tensor. A hook on anything else that varies is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from .. import compat
from ..core.rendezvous import wait_for_ranks
from ..core.sharding_spec import ShardingSpec
from ..core.user_hooks import hook_name, is_of_user
from ..errors import UnsupportedError
from ..plan.hook_views import Activation, Features, HookView, hook_views, refused_hooks
from .boundary_hooks import VocabularySlice, activation_version, first_tensor, replace_first
from .collectives import gather_from_tp, split_to_tp
from .dropout_rng import TPRngTracker


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


@dataclass
class Ends:
    """The two ways of an activation on one module: from this rank's tensor to the one of one process, and back.

    Attributes:
        mesh: the tp axis.
        ids: the hook that maps the ids of the module, an embedding sharded on the vocabulary; None for another module.
    """

    mesh: DeviceMesh
    ids: VocabularySlice | None = None

    def full(self, x: torch.Tensor, kind: Activation | Features) -> torch.Tensor:
        """``x`` of this rank as one process has it."""
        size = self.mesh.size()
        if kind is Activation.IDS and self.ids is not None and self.ids.given is not None:
            return self.ids.given
        if kind is Activation.COPIED:
            # All ranks compute the same with it, and the copy to TP sums their gradients.
            return _ScaledGradient.apply(x, 1 / size) if torch.is_grad_enabled() and x.requires_grad else x
        if not isinstance(kind, Features):
            return x
        gathered = gather_from_tp(x, self.mesh.get_group(), self.mesh.get_local_rank(), size)
        by_rank = gathered.unflatten(-1, (size, kind.blocks, -1))
        # Of adjacent ranks with the same slice the first: the gradient of a slice is counted once.
        by_rank = by_rank[..., :: size // kind.shards, :, :] if kind.shards < size else by_rank
        if kind.blocks == 1 and kind.shards == size:
            return gathered
        return by_rank.transpose(-3, -2).flatten(-3)

    def own(self, x: torch.Tensor, kind: Activation | Features) -> torch.Tensor:
        """This rank's part of ``x``, which a hook has returned on all ranks."""
        size = self.mesh.size()
        if not isinstance(kind, Features):
            return x
        if kind.blocks > 1 or kind.shards < size:
            by_rank = x.unflatten(-1, (kind.blocks, kind.shards, -1)).transpose(-3, -2)
            x = by_rank.repeat_interleave(size // kind.shards, dim=-3).flatten(-3)
        return split_to_tp(x, self.mesh.get_group(), self.mesh.get_local_rank(), size)


class FullActivations:
    """A hook of the user, called with full activations.

    Args:
        hook: the hook.
        ends: the way to full activations.
        view: what the hook would get without this.
        numbers: holder of the TP-local random numbers, which the hook must not draw.
    """

    def __init__(self, hook: Callable[..., Any], ends: Ends, view: HookView, numbers: TPRngTracker | None) -> None:
        self.hook, self.ends, self.view, self.numbers = hook, ends, view, numbers
        self.met = False

    def meet(self) -> None:
        """Before the first all-gather: raise, instead of a hang, if the hook is on some ranks of the tp axis only."""
        if self.met or torch.compiler.is_compiling():
            return
        wait_for_ranks(
            dist.get_process_group_ranks(self.ends.mesh.get_group()),
            f"calls the hook {hook_name(self.hook)}",
            "Register the hook on all ranks, and let it print or log on one of them.",
        )
        self.met = True

    def call(self, *args: Any) -> Any:
        """Call the hook with the random numbers that all tp ranks share."""
        local = self.numbers is not None and self.numbers.common is not None
        if self.numbers is not None:
            self.numbers.leave()
        try:
            return self.hook(*args)
        finally:
            if local:
                self.numbers.enter()  # type: ignore[union-attr]

    def shown(self, args: tuple[Any, ...], kwargs: dict[str, Any], kind: Activation | Features) -> Any:
        """The activation among the arguments in full, and the arguments with it."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if x is None or first_tensor(args, kwargs) is not x:
            return None, args, kwargs
        full = self.ends.full(x, kind)
        return (full, *replace_first(args, kwargs, full)) if full is not x else (x, args, kwargs)


class FullInputs(FullActivations):
    """A forward pre-hook of the user that is called with full activations."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> Any:
        self.meet()
        given = kwargs[0] if kwargs else {}
        full, shown_args, shown_kwargs = self.shown(args, given, self.view.inputs)
        if full is None:
            return self.call(module, args, *kwargs)
        version = activation_version(full)
        result = self.call(module, shown_args, *((shown_kwargs,) if kwargs else ()))
        if result is None:
            if _unchanged(full, version):
                return None
            result = (shown_args, shown_kwargs) if kwargs else shown_args  # changed in place
        new_args, new_kwargs = result if kwargs else (result if isinstance(result, tuple) else (result,), {})
        x = first_tensor(new_args, new_kwargs)
        if x is full and _unchanged(full, version):
            own = first_tensor(args, given)
        else:
            own = self.ends.own(x, self.view.inputs)
        new_args, new_kwargs = replace_first(new_args, new_kwargs, own)
        return (new_args, new_kwargs) if kwargs else new_args


class FullOutput(FullActivations):
    """A forward hook of the user that is called with full activations."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        self.meet()
        *kwargs, output = rest
        self.check(output)
        _, shown_args, shown_kwargs = self.shown(args, kwargs[0] if kwargs else {}, self.view.arguments)
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(self.view.output, Features):
            return self.call(module, shown_args, *((shown_kwargs,) if kwargs else ()), output)
        full = self.ends.full(x, self.view.output)
        version = activation_version(full)
        shown = (full, *output[1:]) if isinstance(output, tuple) else full
        result = self.call(module, shown_args, *((shown_kwargs,) if kwargs else ()), shown)
        if result is None:
            result = shown
        first, *others = result if isinstance(result, tuple) else (result,)
        unchanged = first is full and _unchanged(full, version)
        own = x if unchanged else self.ends.own(first, self.view.output)
        return (own, *others) if isinstance(result, tuple) else own

    def check(self, output: Any) -> None:
        """Raise for a tuple with activations of this rank's heads beside its first element."""
        local = [i for i in self.view.rest if isinstance(output, tuple) and i < len(output) and output[i] is not None]
        if local:
            raise UnsupportedError(
                f"the hook {hook_name(self.hook)} would get output[{local[0]}] of this rank's heads only (attention "
                f"weights). Load the model with attn_implementation='sdpa', which returns none, leave "
                f"output_attentions out, or use tp_size=1."
            )


class UserHooks:
    """The user's hooks on the modules of one model.

    Args:
        mesh: the tp axis.

    Attributes:
        views: module -> its name and what hooks on it get; only modules that need something.
        numbers: the TP-local random numbers, None if the model draws none.
    """

    numbers: TPRngTracker | None = None

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.views: dict[nn.Module, tuple[str, HookView]] = {}
        self._checked: dict[nn.Module, tuple[int, ...]] = {}
        self._scopes: dict[nn.Module, list[nn.Module]] = {}
        self._looked: dict[nn.Module, int] = {}  # scope -> the newest hook of the process when it was checked

    def look(self, model: nn.Module, spec: ShardingSpec) -> None:
        """Note what hooks on each module of ``model`` get under ``spec``."""
        views = hook_views(model, spec, self.mesh.size())
        modules = dict(model.named_modules())
        # Modules with TP hooks, too, in front of whose input hooks a later hook of the user has to be called.
        self.views = {modules[name]: (name, views.get(name, HookView())) for name in {**views, **spec.modules}}
        self._forget()

    def move(self, old: nn.Module, new: nn.Module) -> None:
        """``new`` has replaced ``old`` in the model."""
        if old in self.views:
            self.views[new] = self.views.pop(old)
        self._forget()

    def _forget(self) -> None:
        self._checked, self._scopes, self._looked = {}, {}, {}

    def check(self, scope: nn.Module, innermost: dict[nn.Module, list[tuple[Any, Any]]]) -> None:
        """Let hooks that were registered in ``scope`` since the last call get full activations.

        Args:
            scope: a module that is about to run.
            innermost: module -> its TP input and output hooks, as (handle, ...).

        Raises:
            UnsupportedError: a hook that cannot get what it gets in one process.
        """
        newest = RemovableHandle.next_id
        if self._looked.get(scope) == newest:  # no hook has been registered anywhere since
            return
        if scope not in self._scopes:
            self._scopes[scope] = [module for module in scope.modules() if module in self.views]
        for module in self._scopes[scope]:
            now = (*compat.forward_pre_hooks(module), -1, *compat.forward_hooks(module), *compat.backward_hooks(module))
            if self._checked.get(module) != now:
                self._adapt(module, [handle.id for handle, _ in innermost.get(module, [])])
                self._checked[module] = (
                    *compat.forward_pre_hooks(module),
                    -1,
                    *compat.forward_hooks(module),
                    *compat.backward_hooks(module),
                )
        self._looked[scope] = newest

    def _adapt(self, module: nn.Module, innermost: list[int]) -> None:
        name, view = self.views[module]
        for problem in refused_hooks(name, module, view):
            raise UnsupportedError(problem)
        pre, post = compat.forward_pre_hooks(module), compat.forward_hooks(module)
        if any(map(is_of_user, (*pre.values(), *post.values()))):
            _move(pre, [key for key in pre if key in innermost], last=True)
            _move(post, [key for key in post if key in innermost and not _is_numbers(post[key])], last=False)
        maps = [hook for hook in pre.values() if isinstance(getattr(hook, "__self__", None), VocabularySlice)]
        ends = Ends(self.mesh, maps[0].__self__ if maps else None)  # type: ignore[attr-defined]
        for hooks, kind, changed in (
            (pre, FullInputs, isinstance(view.inputs, Features)),
            (post, FullOutput, view != HookView(view.inputs)),
        ):
            for key, hook in list(hooks.items()) if changed else ():
                if is_of_user(hook):
                    hooks[key] = kind(hook, ends, view, self.numbers)


def _is_numbers(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), TPRngTracker)  # at its place behind the hooks of the user


def _unchanged(x: torch.Tensor, version: int) -> bool:
    """True if it is known that ``x`` has not been changed in place since it had this :func:`activation_version`."""
    counted = not torch.compiler.is_compiling() and not x.is_inference()
    return counted and activation_version(x) == version


def _move(hooks: dict[int, Any], keys: list[int], last: bool) -> None:
    """Move the hooks of these ids to the end or the beginning; their order stays."""
    moved, others = {key: hooks[key] for key in keys}, {key: hook for key, hook in hooks.items() if key not in keys}
    hooks.clear()
    for part in (others, moved) if last else (moved, others):
        hooks.update(part)
