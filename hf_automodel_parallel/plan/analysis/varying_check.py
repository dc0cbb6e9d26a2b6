"""Does a resolved plan compute what one process computes? One forward of one rank's layers on fake tensors.

Parameters have the shapes of one rank, and activations pass the TP input and output hooks of the plan. Three things are
found before anything is sharded: a shape that does not fit (half of a pair of projections); a replicated parameter
between sharded projections, whose gradient is ``Partial`` (head norms, activation scalars, attention sinks: the spec is
completed with them); and an invariant activation that is combined with a varying one where an input hook is missing
(refused by name).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ... import compat
from ...core.model_view import ModelView, layer_pattern
from ...core.sharding_spec import (
    PARTIAL_GRADIENT,
    REPLICATED,
    InputHook,
    ModuleSpec,
    OutputHook,
    ShardingSpec,
    VaryingActivations,
)
from ...errors import PlanError, UnsupportedError, first_line
from ..layer_kinds import as_matrix
from .equal_layers import EqualLayers, WatchedRun, arguments_of_call, holds_tensors_only, renamed
from .expert_check import check_experts
from .feature_shard import FeatureShard
from .linear_check import faulty_linears, leave_ends_replicated, refuse_remaining
from .operator_trace import tensors_in
from .stack_runner import StackRunner, first_tensor, is_below, smallest_stack
from .varying import (
    FEATURES,
    INVARIANT,
    VARYING,
    NotTraceable,
    Value,
    VaryingTrace,
    WrongPlan,
)

_REMEDY = "Complete the tp_plan (both projections of a pair, and a style for what lies between), or use tp_size=1."


def complete(
    model: nn.Module | ModelView, spec: ShardingSpec, layers: list[nn.Module], tp_size: int, strict: bool
) -> None:
    """Check a resolved plan by a run of one rank's layers on fake tensors, and complete it, in place.

    Replicated parameters that are combined with varying values get a partial gradient. Where a plan that is not the
    user's own fails, that part of the layer is replicated on every rank, which is always right, and a note says so.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        spec: its resolved plan.
        layers: the repeated layers in forward order.
        tp_size: number of ranks on the tp axis.
        strict: the plan is the user's own, so a fault in it is an error.

    Raises:
        PlanError: the layers cannot run with the shapes of one rank, or would compute something else; the message
            names the module.
    """
    view = ModelView.of(model)
    model = view.model
    # With values and before the run: shapes on fake tensors show no fault of fused experts or of a custom forward.
    check_experts(model, spec, tp_size, strict)
    names = {module: name for name, module in model.named_modules()}
    inside = {names[layer] for layer in layers}
    faults = faulty_linears(model, spec, tp_size, inside)
    leave_ends_replicated(model, spec, faults, inside, strict)
    try:
        stack, stack_layers = _stack(model, spec, layers, names)
        check = VaryingCheck(model, spec, stack, stack_layers, names, tp_size, strict, faults)
        check.run()
    except UnsupportedError as error:  # the stack cannot be run: nothing is known of the plan then
        spec.notes.append(f"not run on fake tensors beforehand ({first_line(error)}).")
        refuse_remaining(spec, faults)
        return
    refuse_remaining(spec, faults)
    spec.notes.extend(dict.fromkeys(check.notes))
    _add(view, spec, check.trace)


def _stack(
    model: nn.Module, spec: ShardingSpec, layers: list[nn.Module], names: dict[nn.Module, str]
) -> tuple[nn.Module, list[nn.Module]]:
    """The smallest module that can be called with tokens and runs all layers with something sharded, and its layers."""
    sharded = [*spec.modules, *(name for name, p in spec.parameters.items() if p.dim is not None)]
    wanted = [names[layer] for layer in layers if any(s.startswith(f"{names[layer]}.") for s in sharded)]
    if not wanted:
        raise UnsupportedError("nothing is sharded inside of the layers")
    stack = smallest_stack(model, wanted)
    if stack is None:
        raise UnsupportedError("no module around the layers takes input_ids or inputs_embeds")
    prefix = names[stack]
    return stack, [layer for layer in layers if not prefix or names[layer].startswith(f"{prefix}.")]


def _add(view: ModelView, spec: ShardingSpec, trace: VaryingTrace) -> None:
    """Give the replicated parameters that were combined with varying values a partial gradient in ``spec``."""
    deferred = {
        ".".join(part for part in (name, module.deferred_bias, "bias") if part)
        for name, module in spec.modules.items()
        if module.deferred_bias is not None
    }
    found: dict[str, int] = {}
    for name, module_name in trace.partial.items():
        if name in deferred or spec.parameters.get(name, REPLICATED) != REPLICATED:
            continue
        if name in trace.complete:
            raise PlanError(
                f"the parameter {name} is combined with activations that vary across the ranks in {module_name}, and "
                f"with replicated ones in {trace.complete[name]}, so its gradient is neither Replicate nor Partial. "
                f"{_REMEDY}"
            )
        # Every name of a tied parameter, because all of them are one parameter with one gradient.
        for tied in view.names_of[view.parameters[name]]:
            spec.parameters[tied] = PARTIAL_GRADIENT
        pattern = layer_pattern(view.plan_name(name))
        found[pattern] = found.get(pattern, 0) + 1
    spec.rows += [
        (p, "between sharded layers", n, str(PARTIAL_GRADIENT), "derived: run on fake tensors")
        for p, n in found.items()
    ]


@dataclass
class _Outcome:
    """What one call of a layer has shown: its output (fake tensors), and what it added to the trace and the spec."""

    output: Any
    partial: dict[str, str]
    complete: dict[str, str]
    varying: dict[str, VaryingActivations]


class VaryingCheck:
    """One forward of one rank's layers.

    Args:
        model: the model; it is only read.
        spec: its resolved plan; corrected in place.
        stack: the module whose forward runs the layers.
        layers: the layers in forward order.
        names: module -> its name in ``model``.
        tp_size: number of ranks on the tp axis.
        strict: the plan is the user's own, so a fault in it is an error.
        faults: linear layer -> why its forward may not be sharded.

    Attributes:
        trace: the facts that the forward showed.
        notes: corrections of the plan, and layers that could not be checked.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ShardingSpec,
        stack: nn.Module,
        layers: list[nn.Module],
        names: dict[nn.Module, str],
        tp_size: int,
        strict: bool,
        faults: Mapping[str, str],
    ) -> None:
        self.model, self.spec, self.names = model, spec, names
        self.stack, self.layers = stack, layers
        self.tp_size, self.strict, self.faults = tp_size, strict, faults
        self.notes: list[str] = []
        self.copies_inputs: set[str] = set()  # modules whose inputs all got a copy to TP here, see _copy_inputs
        self.called: set[str] = set()  # names of the layers that were called
        self.path: list[str] = []  # names of the running layer and of the modules in it
        self.unsharded: StackRunner | None = None  # made when a layer fails, see _runs_unsharded
        self.layer_names = {names[layer] for layer in layers}
        self.equal = EqualLayers(model, spec, layers, names, faults)
        self.runner = StackRunner(
            model,
            stack,
            layers,
            names,
            on_layer=self._layer,
            on_module=self._called,
            on_beside=self._beside,
            shape=self._local_shape,
            equal=self.equal,
            counts=spec.head_counts,
        )
        originals = frozenset(id(p) for name, p in model.named_parameters() if self._is_sharded(name))
        self.trace = VaryingTrace({}, originals)
        for key, name in self.runner.parameters.items():
            self._know(key, name)
        self.runner.on_parameter = self._know

    def run(self) -> None:
        """Run the stack, correcting the plan where that is possible.

        Raises:
            PlanError: the plan is wrong, see :func:`complete`.
            UnsupportedError: the stack could not be run at all.
        """
        try:
            # Gradients are on between the layers, so that `requires_grad` shows which activations depend on the input.
            with torch.enable_grad():
                self.runner.run()
        except PlanError:
            raise
        except Exception as error:
            raise UnsupportedError(f"{self.runner.prefix or 'the model'}: {first_line(error)}") from error

    def _know(self, key: int, name: str) -> None:
        self.trace.facts[key] = VARYING if self._is_sharded(name) else Value(parameters=frozenset([name]))

    def _is_sharded(self, name: str) -> bool:
        spec = self.spec.parameters.get(name, REPLICATED)
        return spec.dim is not None or spec.forward_shard_dim is not None

    def _local_shape(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        shape = list(parameter.shape)
        spec = self.spec.parameters.get(name, REPLICATED)
        dim, parts = spec.dim, self.tp_size
        if spec.forward_shard_dim is not None:
            dim, parts = spec.forward_shard_dim, spec.forward_shards
        if dim is not None and is_below(name, self.layer_names):  # the rest is not traced
            shape[dim] //= parts
        return tuple(shape)

    # ---- between the layers, where the stack's own code runs on real zeros -------------------------------------------

    def _to_real(self, value: Any) -> Any:
        def real(x: torch.Tensor) -> torch.Tensor:
            known = self.trace.value(x)
            flows = x.is_floating_point() and (known.data or known.varying)
            zero = torch.zeros(x.shape, dtype=x.dtype, requires_grad=flows)
            zero = zero.clone() if flows else zero  # not a leaf, because the stack's code may change it in place
            return self.trace.mark(zero, VARYING) if known.varying else zero

        return compat.tree_map_only(torch.Tensor, real, value)

    def _to_fake(self, value: Any) -> Any:
        made: dict[int, torch.Tensor] = {}  # one object stays one object

        def fake(x: torch.Tensor) -> torch.Tensor:
            if id(x) not in made:
                made[id(x)] = self.runner.fake.from_tensor(x.detach())
                if self.trace.value(x).varying:
                    self.trace.mark(made[id(x)], VARYING)
                elif x.requires_grad:
                    self.trace.mark(made[id(x)], INVARIANT)
            return made[id(x)]

        return compat.tree_map_only(torch.Tensor, fake, value)

    def _beside(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = self._to_fake((args, kwargs))
        with torch.no_grad(), self.runner.fake:
            output = forward(*args, **kwargs)
        for x in tensors_in(output):
            if x.is_floating_point():
                self.trace.mark(x, INVARIANT)
        return self._to_real(output)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        trace = self.trace
        repeats = self.equal.group(name) is not None and name not in self.called
        self.called.add(name)
        arguments = arguments_of_call((args, kwargs), trace.value) if repeats else None
        known = self.equal.outcome(name, arguments)
        if known is not None:
            return self._repeat(name, *known)
        forward = self.runner.forward_of(name)
        watched = WatchedRun(self.runner.submodule(name)) if arguments is not None else None
        while True:
            fake_args, fake_kwargs = self._to_fake((args, kwargs))
            before: tuple[dict[str, Any], ...] = (dict(trace.partial), dict(trace.complete), dict(self.spec.varying))
            self.path, trace.module = [name], name
            try:
                with torch.no_grad(), self.runner.fake, trace:
                    output = forward(*fake_args, **fake_kwargs)
                first = output[0] if isinstance(output, (tuple, list)) and output else output
                if isinstance(first, torch.Tensor) and trace.value(first).varying:
                    raise WrongPlan("its output varies across the ranks, because it is neither reduced nor gathered")
                break
            except Exception as error:
                watched = None
                trace.partial, trace.complete, self.spec.varying = before
                if not self._corrected(name, error, (args, kwargs)):
                    output = trace.mark(tensors_in(self._to_fake((args, kwargs)))[0], INVARIANT)
                    break
        for key, value in kwargs.items():  # dicts that a layer fills for later ones
            if isinstance(value, dict):
                value.update(self._to_real({k: v for k, v in fake_kwargs[key].items() if k not in value}))
        if watched is not None and watched.speaks_for_equal_layers() and holds_tensors_only(output):
            now: tuple[dict[str, Any], ...] = trace.partial, trace.complete, self.spec.varying
            added = [{k: v for k, v in table.items() if k not in old} for table, old in zip(now, before, strict=True)]
            self.equal.outcomes.setdefault(self.equal.group(name) or "", []).append(
                (name, arguments, _Outcome(output, *added))  # type: ignore[arg-type]
            )
        return self._to_real(output)

    def _repeat(self, name: str, layer: str, outcome: _Outcome) -> Any:
        """What the call of ``layer`` has shown, for the layer ``name``."""
        for table, added in ((self.trace.partial, outcome.partial), (self.trace.complete, outcome.complete)):
            for parameter, module in added.items():
                table.setdefault(renamed(parameter, layer, name), renamed(module, layer, name))
        for module, varying in outcome.varying.items():
            self.spec.varying[renamed(module, layer, name)] = varying
        return self._to_real(outcome.output)

    def _corrected(self, layer: str, error: Exception, arguments: Any) -> bool:
        """After a failure: correct the plan, or return False if it is this check that cannot run the layer.

        Raises:
            PlanError: the plan is wrong, and is the user's own or cannot be corrected.
        """
        place = self.path[-1]
        reason = self._fault(layer, place, error, arguments)
        if reason is None:
            kind = type(self.model.get_submodule(layer)).__name__
            self.notes.append(f"{layer} ({kind}) was not run on fake tensors beforehand: {first_line(error)}.")
            return False
        if isinstance(error, WrongPlan) and self._copy_inputs(place):
            return True
        block = None if self.strict else self._block_around(place, layer)
        if block is None:
            raise PlanError(f"{reason}. {_REMEDY}") from error
        self._leave_replicated(block, reason)
        return True

    def _fault(self, layer: str, place: str, error: Exception, arguments: Any) -> str | None:
        """The fault of the plan after a failure; None if only this check cannot run the layer."""
        module = type(self.model.get_submodule(place)).__name__
        if isinstance(error, WrongPlan):
            return f"the tensor-parallel plan is wrong for {place} ({module}): {error}"
        if isinstance(error, NotTraceable) or not self._runs_unsharded(layer, arguments):
            return None
        return (
            f"the tensor-parallel plan does not fit {place} ({module}): with the shapes of one of {self.tp_size} ranks "
            f"it fails with {type(error).__name__}: {first_line(error)}"
        )

    def _copy_inputs(self, place: str) -> bool:
        """Add the copy to TP of all inputs that a module with a reduced output needs, and plans forget."""
        hooks = self.spec.modules.get(place)
        if hooks is None or place in self.copies_inputs:
            return False
        if hooks.output is not OutputHook.REDUCE_FROM_TP or hooks.input is not InputHook.NONE:
            return False
        module = self.model.get_submodule(place)
        inside = [f"{place}.{name}" for name, _ in module.named_parameters()]
        if as_matrix(module, place) is not None or not inside or not all(map(self._is_sharded, inside)):
            return False  # the contribution of a replicated parameter in there would count once per rank
        self.spec.modules[place] = replace(hooks, input=InputHook.COPY_ALL_TO_TP)
        self.copies_inputs.add(place)
        self.notes.append(f"{place}: all its inputs get a copy to TP, because its output is reduced over the ranks.")
        return True

    def _runs_unsharded(self, layer: str, arguments: Any) -> bool:
        """True if the layer runs with unsharded parameters and without TP hooks."""
        if self.unsharded is None:
            self.unsharded = StackRunner(
                self.model,
                self.stack,
                self.layers,
                self.names,
                on_layer=lambda name, forward, args, kwargs: forward(*args, **kwargs),
                on_module=self._called_unsharded,
                fake=self.runner.fake,
            )
        try:
            with torch.no_grad(), self.runner.fake:
                args, kwargs = self._to_fake(arguments)
                return self.unsharded.submodule(layer)(*args, **kwargs) is not None
        except Exception:
            return False

    def _called_unsharded(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        hooks = self.spec.modules.get(name)
        if hooks is not None and hooks.input is InputHook.COPY_ALL_TO_TP:
            return _expert_output(args, kwargs)
        return forward(*args, **kwargs)

    # ---- modules of layers that are taken out of the plan ------------------------------------------------------------

    def _block_around(self, place: str, layer: str) -> str | None:
        """The smallest module of the layer around ``place`` in which the plan shards a parameter."""
        planned = [*self.spec.modules, *(name for name, p in self.spec.parameters.items() if p != REPLICATED)]
        block = place
        if block != layer and as_matrix(self.model.get_submodule(block), block) is not None:
            block = block.rpartition(".")[0]  # one of a pair
        while not any(_is_within(name, block) for name in planned):
            if block == layer:
                return None
            block = block.rpartition(".")[0]
        return block

    def _leave_replicated(self, block: str, reason: str) -> None:
        """Take everything in ``block`` out of the plan, and give the copy its unsharded parameters."""
        for table in (self.spec.modules, self.spec.parameters, self.spec.head_counts):
            for name in [name for name in table if _is_within(name, block)]:
                del table[name]  # type: ignore[attr-defined]
        self.spec.reduced_dora_norms = [n for n in self.spec.reduced_dora_norms if not n.startswith(f"{block}.")]
        copied_block = self.runner.submodule(block)
        for path, module in self.model.get_submodule(block).named_modules():
            copied = copied_block.get_submodule(path)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    with self.runner.fake:
                        fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                    copied._parameters[key] = fake
                    name = ".".join(part for part in (block, path, key) if part)
                    self.trace.mark(fake, Value(parameters=frozenset([name])))
            for key, value in vars(module).items():
                if ("head" in key or key == "nf") and type(value) is int:  # what resolve() counts per rank
                    setattr(copied, key, value)
        pattern = layer_pattern(ModelView.of(self.model).plan_name(block))
        self.notes.append(f"{block} is replicated on every rank: {reason}.")
        self.spec.rows.append((pattern, "left replicated", 1, "Replicate", "derived: run on fake tensors"))

    # ---- modules inside of a layer -----------------------------------------------------------------------------------

    def _called(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.path.append(name)
        self.trace.module = name
        if name in self.faults and f"{name}.weight" in self.spec.parameters:  # else it was taken out of the plan
            raise WrongPlan(self.faults[name])
        given = [x for value in (*args, *kwargs.values()) for x in _elements(value)]
        for key, (dim, _) in self.spec.head_arguments.get(name, {}).items():
            if isinstance(kwargs.get(key), torch.Tensor):
                own = kwargs[key].narrow(dim, 0, kwargs[key].shape[dim] // self.tp_size)
                kwargs = {**kwargs, key: self.trace.mark(own, VARYING)}
        hooks = self.spec.modules.get(name)
        if hooks is None:
            output = forward(*args, **kwargs)
        elif hooks.native_style is not None:
            raise NotTraceable(f"{name} has a native torch ParallelStyle, whose hooks are not traced")
        else:
            output = self._through_hooks(name, hooks, forward, args, kwargs)
        self._note_varying(name, given, _elements(output))
        self.path.pop()  # not after an exception, where the path names the module that failed
        self.trace.module = self.path[-1]
        return output

    def _note_varying(self, name: str, given: list[Any], output: list[Any]) -> None:
        """Note for the user's hooks on the module ``name`` which of its activations vary."""

        def varies(x: Any) -> bool:
            return isinstance(x, torch.Tensor) and x.is_floating_point() and self.trace.value(x).varying

        rest = tuple(index for index, x in enumerate(output) if index and varies(x))
        found = VaryingActivations(any(map(varies, given)), bool(output) and varies(output[0]), rest)
        before = self.spec.varying.get(name, found)  # a module may be called several times
        self.spec.varying[name] = VaryingActivations(
            found.inputs or before.inputs, found.output or before.output, tuple({*found.rest, *before.rest})
        )

    def _through_hooks(self, name: str, hooks: ModuleSpec, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module with its TP input and output hooks."""
        trace = self.trace
        if hooks.input is InputHook.COPY_ALL_TO_TP:
            self._check_invariant(tensors_in((args, kwargs)))
            if name not in self.copies_inputs:  # fused experts, which expert_check has run with values
                return trace.mark(_expert_output(args, kwargs), INVARIANT)
            args, kwargs = compat.tree_map_only(
                torch.Tensor, lambda x: trace.copied_to_tp(x) if x.is_floating_point() else x, (args, kwargs)
            )
        if hooks.input in (InputHook.COPY_TO_TP, InputHook.SCATTER):
            key: Any = 0 if args else next(k for k, v in kwargs.items() if isinstance(v, torch.Tensor))
            x = args[0] if args else kwargs[key]
            self._check_invariant([x])
            copied = trace.copied_to_tp(x)
            if hooks.input is InputHook.SCATTER:
                copied = trace.mark(copied[..., : copied.shape[-1] // self.tp_size], VARYING)
            args, kwargs = ((copied, *args[1:]), kwargs) if args else (args, {**kwargs, key: copied})
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if hooks.output is OutputHook.NONE and hooks.input is InputHook.COPY_TO_TP:
            trace.mark(first, replace(FEATURES, features=FeatureShard(blocks=self._blocks(name))))
        if hooks.output is OutputHook.COPY_TAIL_TO_TP:
            return trace.mark(first, replace(VARYING, tail=hooks.tail))
        if hooks.output not in (OutputHook.REDUCE_FROM_TP, OutputHook.GATHER):
            return output
        if (
            hooks.output is OutputHook.REDUCE_FROM_TP
            and hooks.input is not InputHook.MASK_IDS
            and not trace.value(first).varying
        ):
            raise WrongPlan(
                f"its output is the same on all {self.tp_size} ranks, so its all-reduce multiplies it by {self.tp_size}"
            )
        factor = self.tp_size if hooks.output is OutputHook.GATHER else 1
        fresh = torch.empty((*first.shape[:-1], first.shape[-1] * factor), dtype=first.dtype)
        fresh = trace.mark(fresh, INVARIANT)
        return (fresh, *output[1:]) if isinstance(output, tuple) else fresh

    def _blocks(self, name: str) -> int:
        """In how many blocks the output features of a layer are packed."""
        weights = (self.spec.parameters.get(f"{name}.{path}weight") for path in ("", "base_layer."))
        return max((weight.blocks for weight in weights if weight is not None), default=1)

    def _check_invariant(self, tensors: list[torch.Tensor]) -> None:
        if any(self.trace.value(x).varying and x.is_floating_point() for x in tensors):
            raise WrongPlan("its input varies across the ranks, but its input hook expects a replicated one")


def _elements(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _expert_output(args: Any, kwargs: Any) -> torch.Tensor:
    """The output of fused experts, without a run: they choose tokens by values, which fake tensors do not have."""
    first = first_tensor(args, kwargs)
    return torch.empty(first.shape, dtype=first.dtype)
