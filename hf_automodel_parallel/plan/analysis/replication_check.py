"""Does a resolved plan compute what one process computes? One forward of the layers of one rank, without values.

Parameters have the shapes of one rank and the boundaries are crossed as the plan says. Three things come to light
before anything is sharded: a shape that does not fit (half of a pair of projections), a replicated parameter between
sharded projections, whose gradient then is a summand on each rank (head norms, activation scalars, attention sinks: the
spec is completed with them), and activations that are mixed where a boundary is missing (refused by name).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ... import compat
from ...core.module_names import plan_name, unwrapped
from ...core.sharding_spec import PARTIAL, REPLICATED, Input, ModuleSpec, Output, ShardingSpec
from ...errors import PlanError, UnsupportedError, first_line
from ..layer_kinds import as_matrix
from ..patterns import layer_pattern
from .expert_check import try_experts
from .linear_check import faulty_linears, leave_ends_whole, refuse_what_is_left
from .replication import EQUAL, FEATURES, VARYING, NotTraceable, ReplicationTrace, Value, WrongPlan
from .stack_runner import StackRunner

_REMEDY = "Complete the tp_plan (both projections of a pair, and a style for what lies between), or use tp_size=1."


def complete(model: nn.Module, spec: ShardingSpec, layers: list[nn.Module], tp_size: int, strict: bool) -> None:
    """Check a resolved plan by a run of one rank's layers without values, and complete it, in place.

    Replicated parameters that meet values which differ between the ranks get a partial gradient. Where a plan that
    nobody wrote for this model fails, the part of the layer is left whole on every rank, which is always right, and a
    note says so.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        spec: its resolved plan.
        layers: the repeated layers in forward order.
        tp_size: number of ranks on the tp axis.
        strict: the plan is the user's own, so a fault in it is an error.

    Raises:
        PlanError: the layers cannot run on the shares of one rank, or would compute something else; the message names
            the module.
    """
    try_experts(model, spec, tp_size, strict)
    names = {module: name for name, module in model.named_modules()}
    inside = {names[layer] for layer in layers}
    faults = faulty_linears(model, spec, tp_size, inside)
    leave_ends_whole(model, spec, faults, inside, strict)
    try:
        stack, stack_layers = _runner(model, spec, layers, names)
        probe = ReplicationCheck(model, spec, stack, stack_layers, names)
        probe.tp_size, probe.strict, probe.faults = tp_size, strict, faults
        probe.look()
    except UnsupportedError as error:  # of the machinery that runs a stack: nothing is known of the plan then
        spec.notes.append(f"not run without values beforehand ({first_line(error)}).")
        refuse_what_is_left(spec, faults)
        return
    refuse_what_is_left(spec, faults)
    spec.notes.extend(dict.fromkeys(probe.notes))
    _add(model, spec, probe)


def _runner(
    model: nn.Module, spec: ShardingSpec, layers: list[nn.Module], names: dict[nn.Module, str]
) -> tuple[nn.Module, list[nn.Module]]:
    """The smallest module that can be called with token ids and runs all layers with something sharded inside."""
    sharded = [*spec.modules, *(name for name, p in spec.parameters.items() if p.dim is not None)]
    wanted = [names[layer] for layer in layers if any(s.startswith(f"{names[layer]}.") for s in sharded)]
    if not wanted:
        raise UnsupportedError("nothing is sharded inside of the layers")
    path = wanted[0]
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if not all(name.startswith(f"{path}.") or not path for name in wanted) or not compat.has_implemented_forward(
            module
        ):
            continue
        if {"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters):
            inside = [layer for layer in layers if not path or names[layer].startswith(f"{path}.")]
            return module, inside
    raise UnsupportedError("no module around the layers takes input_ids or inputs_embeds")


def _add(model: nn.Module, spec: ShardingSpec, probe: ReplicationCheck) -> None:
    places: dict[int, list[str]] = {}
    ids: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
        ids[name] = id(parameter)
    deferred = {
        ".".join(part for part in (name, module.deferred_bias, "bias") if part)
        for name, module in spec.modules.items()
        if module.deferred_bias is not None
    }
    found: dict[str, int] = {}
    for name, place in probe.variance.partial.items():
        if name in deferred or spec.parameters.get(name, REPLICATED) != REPLICATED:
            continue
        if name in probe.variance.complete:
            raise PlanError(
                f"the parameter {name} is used by {place}, where the ranks differ, and by "
                f"{probe.variance.complete[name]}, where they do not, so its gradient is neither whole nor a summand. "
                f"{_REMEDY}"
            )
        for other in places[ids[name]]:
            spec.parameters[other] = PARTIAL
        short = plan_name(name, unwrapped(model)[1])
        pattern = layer_pattern(short)
        found[pattern] = found.get(pattern, 0) + 1
    spec.rows += [
        (p, "between sharded layers", n, str(PARTIAL), "derived: run without values") for p, n in found.items()
    ]


class ReplicationCheck(StackRunner):
    """The same run of a stack as for sequence parallelism, of which it takes the machinery, with the shapes of one
    rank.
    """

    tp_size = 1
    strict = True
    whole_shapes = False
    faults: Mapping[str, str] = {}

    def look(self) -> None:
        """Run the stack; what it showed is in :attr:`variance` and :attr:`notes`.

        Raises:
            PlanError: the plan is wrong, see :func:`complete`.
            UnsupportedError: the stack could not be run at all.
        """
        self.notes: list[str] = []
        self.opened: set[str] = set()  # modules that sum their output, and now the gradients of their inputs, too
        self.fake = compat.fake_tensor_mode()
        self.whole_layers: nn.Module | None = None
        stack = self.stack_copy = self._skeleton()
        known = {
            key: Value(varying=True) if self._is_sharded(name) else Value(parameters=frozenset([name]))
            for key, name in self.parameters.items()
        }
        originals = {id(p): name for name, p in self.model.named_parameters()}
        whole = frozenset(key for key, name in originals.items() if self._is_sharded(name))
        self.variance = ReplicationTrace(known, whole)
        self.path: list[str] = []
        try:
            with torch.enable_grad(), compat.quiet_fake_tensors():
                stack(**self._inputs(stack))
        except PlanError:
            raise
        except Exception as error:
            raise UnsupportedError(f"{self.prefix or 'the model'}: {first_line(error)}") from error

    def _is_sharded(self, name: str) -> bool:
        spec = self.spec.parameters.get(name, REPLICATED)
        return spec.dim is not None or spec.part_dim is not None

    def _shape(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        shape = list(parameter.shape)
        spec = self.spec.parameters.get(name, REPLICATED)
        dim, parts = (spec.dim, self.tp_size) if spec.part_dim is None else (spec.part_dim, spec.parts)
        inside = any(name.startswith(f"{self.names[layer]}.") for layer in self.layers)  # elsewhere nothing is followed
        if dim is not None and inside and not self.whole_shapes:
            shape[dim] //= parts
        return tuple(shape)

    def _skeleton(self) -> nn.Module:
        stack = super()._skeleton()
        for name, counts in self.spec.head_counts.items():
            if not self.whole_shapes and name.startswith(self.prefix):
                module = stack.get_submodule(name.removeprefix(self.prefix).lstrip("."))
                for attribute, count in counts.items():
                    setattr(module, attribute, count)
        return stack

    # ---- between the layers, where the model's own code runs on real zeros -------------------------------------------

    def _to_real(self, value: Any) -> Any:
        def real(x: torch.Tensor) -> torch.Tensor:
            flows = x.is_floating_point() and (self.variance.value(x).data or self.variance.value(x).varying)
            zero = torch.zeros(x.shape, dtype=x.dtype, requires_grad=flows)
            zero = zero.clone() if flows else zero  # code between the layers may change it in place
            if self.variance.value(x).varying:
                self.variance.mark(zero, VARYING)
            return zero

        return compat.tree_map_only(torch.Tensor, real, value)

    def _to_fake(self, value: Any, known: Any = None, instead: Any = None) -> Any:
        made: dict[int, torch.Tensor] = {}  # one object stays one object

        def fake(x: torch.Tensor) -> torch.Tensor:
            if id(x) not in made:
                made[id(x)] = self.fake.from_tensor(x.detach())
                if self.variance.value(x).varying:
                    self.variance.mark(made[id(x)], VARYING)
                elif x.requires_grad:
                    self.variance.mark(made[id(x)], EQUAL)
            return made[id(x)]

        return compat.tree_map_only(torch.Tensor, fake, value)

    def _beside(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._to_fake((args, kwargs))
            with torch.no_grad(), self.fake:
                output = forward(*args, **kwargs)
            for x in compat.tree_leaves(output):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    self.variance.mark(x, EQUAL)
            return self._to_real(output)

        return run

    # ---- the layers --------------------------------------------------------------------------------------------------

    def _layer(self, name: str, kind: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            while True:
                fake_args, fake_kwargs = self._to_fake((args, kwargs))
                if self.whole_shapes:
                    return forward(*fake_args, **fake_kwargs)
                before = dict(self.variance.partial), dict(self.variance.complete)
                self.path, self.variance.place = [name], name
                try:
                    with torch.no_grad(), self.fake, self.variance:
                        output = forward(*fake_args, **fake_kwargs)
                    first = output[0] if isinstance(output, (tuple, list)) and output else output
                    if isinstance(first, torch.Tensor) and self.variance.value(first).varying:
                        raise WrongPlan("its output differs between the ranks, because nothing sums or gathers it")
                    break
                except Exception as error:
                    self.variance.partial, self.variance.complete = before
                    reason = self._fault(name, self.path[-1], error, (args, kwargs))
                    if reason is None:
                        self.notes.append(
                            f"{name} ({kind.__name__}) was not run without values beforehand: {first_line(error)}."
                        )
                        tensors = compat.tree_leaves(self._to_fake((args, kwargs)))
                        output = self.variance.mark(next(x for x in tensors if isinstance(x, torch.Tensor)), EQUAL)
                        break
                    if self._open(self.path[-1], error):
                        continue
                    block = None if self.strict else self._block_around(self.path[-1], name)
                    if block is None:
                        raise PlanError(f"{reason}. {_REMEDY}") from error
                    self._leave_whole(block, reason)
            for key, value in kwargs.items():  # what a layer leaves for later ones
                if isinstance(value, dict):
                    new = {k: v for k, v in fake_kwargs[key].items() if k not in value}
                    value.update(self._to_real(new))
            return self._to_real(output)

        return run

    def _fault(self, name: str, place: str, error: Exception, arguments: Any) -> str | None:
        """What is wrong with the plan after a failure, None if it is the probe that cannot run this layer."""
        module = type(self.model.get_submodule(place)).__name__
        if isinstance(error, WrongPlan):
            return f"the tensor-parallel plan is wrong for {place} ({module}): {error}"
        if isinstance(error, NotTraceable) or self._whole(name, arguments) is None:
            return None
        return (
            f"the tensor-parallel plan does not fit {place} ({module}): with the shapes of one of {self.tp_size} ranks "
            f"it fails with {type(error).__name__}: {first_line(error)}"
        )

    def _open(self, place: str, error: Exception) -> bool:
        """Where a module sums its output over the ranks, all that it reads has to cross a boundary; plans forget
        that.
        """
        boundary = self.spec.modules.get(place)
        if not isinstance(error, WrongPlan) or boundary is None or place in self.opened:
            return False
        if boundary.output is not Output.REDUCE or boundary.input is not Input.NONE:
            return False
        module = self.model.get_submodule(place)
        inside = [f"{place}.{name}" for name, _ in module.named_parameters()]
        if as_matrix(module, place) is not None or not inside or not all(map(self._is_sharded, inside)):
            return False  # what is whole in there would count once per rank
        self.spec.modules[place] = replace(boundary, input=Input.COPY_ALL)
        self.opened.add(place)
        self.notes.append(f"{place}: the gradients of all its inputs are summed over the ranks, as its output is.")
        return True

    # ---- parts of layers that stay whole -----------------------------------------------------------------------------

    def _planned_below(self, block: str) -> list[str]:
        sharded = [name for name, p in self.spec.parameters.items() if p != REPLICATED]
        return [n for n in (*self.spec.modules, *sharded) if n == block or n.startswith(f"{block}.")]

    def _block_around(self, place: str, layer: str) -> str | None:
        """The smallest part of the layer around ``place`` of which the plan shards something."""
        block = place
        if block != layer and as_matrix(self.model.get_submodule(block), block) is not None:
            block = block.rpartition(".")[0]  # one of a pair
        while not self._planned_below(block):
            if block == layer:
                return None
            block = block.rpartition(".")[0]
        return block

    def _leave_whole(self, block: str, reason: str) -> None:
        """Take everything below ``block`` out of the plan, and give its modules their whole parameters here."""
        for table in (self.spec.modules, self.spec.parameters, self.spec.head_counts):
            for name in [n for n in table if n == block or n.startswith(f"{block}.")]:
                del table[name]  # type: ignore[attr-defined]
        self.spec.summed_norms = [n for n in self.spec.summed_norms if not n.startswith(f"{block}.")]
        relative = block.removeprefix(self.prefix).lstrip(".")
        ours, theirs = self.stack_copy.get_submodule(relative), self.model.get_submodule(block)
        for path, module in theirs.named_modules():
            copied = ours.get_submodule(path)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    with self.fake:
                        whole = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                    copied._parameters[key] = whole
                    full = ".".join(part for part in (block, path, key) if part)
                    self.variance.mark(whole, Value(parameters=frozenset([full])))
            for key, value in vars(module).items():
                if ("head" in key or key == "nf") and type(value) is int:  # what resolve() counts per rank
                    setattr(copied, key, value)
        pattern = layer_pattern(plan_name(block, unwrapped(self.model)[1]))
        self.notes.append(f"{block} is left whole on every rank: {reason}.")
        self.spec.rows.append((pattern, "left whole", 1, "Replicate", "derived: run without values"))

    def _whole(self, name: str, arguments: Any) -> Any:
        """What the layer returns with whole parameters and no boundaries; None if it fails then, too."""
        if self.whole_layers is None:
            parameters, self.whole_shapes = self.parameters, True
            self.whole_layers = self._skeleton()
            self.parameters = parameters
        relative = name.removeprefix(self.prefix).lstrip(".")
        self.whole_shapes = True
        try:
            with torch.no_grad(), self.fake:
                args, kwargs = self._to_fake(arguments)
                return self.whole_layers.get_submodule(relative)(*args, **kwargs)
        except Exception:
            return None
        finally:
            self.whole_shapes = False

    # ---- modules inside of a layer -----------------------------------------------------------------------------------

    def called(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module inside of a layer is called."""
        boundary = self.spec.modules.get(name)
        if self.whole_shapes:
            if boundary is not None and boundary.input is Input.COPY_ALL:
                return self._experts(args, kwargs)
            return forward(*args, **kwargs)
        self.path.append(name)
        self.variance.place = name
        if name in self.faults and f"{name}.weight" in self.spec.parameters:  # else it has been left whole
            raise WrongPlan(self.faults[name])
        for key, (dim, _) in self.spec.head_arguments.get(name, {}).items():
            if isinstance(kwargs.get(key), torch.Tensor):
                own = kwargs[key].narrow(dim, 0, kwargs[key].shape[dim] // self.tp_size)
                kwargs = {**kwargs, key: self.variance.mark(own, VARYING)}
        if boundary is None:
            output = forward(*args, **kwargs)
        elif boundary.foreign is not None:
            raise NotTraceable(f"{name} runs on an engine of torch's")
        else:
            output = self._crossed(name, boundary, forward, args, kwargs)
        self.path.pop()  # left where it is by an exception
        self.variance.place = self.path[-1]
        return output

    def _experts(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Experts choose tokens by their values; as many come out as go in."""
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return torch.empty(first.shape, dtype=first.dtype)

    def _crossed(self, name: str, boundary: ModuleSpec, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        trace = self.variance
        if boundary.input is Input.COPY_ALL:
            self._check_equal([x for x in compat.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)])
            if name not in self.opened:  # their miniature has been tried
                return trace.mark(self._experts(args, kwargs), EQUAL)
            args, kwargs = compat.tree_map_only(
                torch.Tensor, lambda x: trace.copied(x) if x.is_floating_point() else x, (args, kwargs)
            )
        if boundary.input in (Input.COPY, Input.SPLIT):
            key: Any = 0 if args else next(k for k, v in kwargs.items() if isinstance(v, torch.Tensor))
            x = args[0] if args else kwargs[key]
            self._check_equal([x])
            copied = trace.copied(x)
            if boundary.input is Input.SPLIT:
                copied = trace.mark(copied[..., : copied.shape[-1] // self.tp_size], VARYING)
            args, kwargs = ((copied, *args[1:]), kwargs) if args else (args, {**kwargs, key: copied})
        output = forward(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if boundary.output is Output.NONE and boundary.input is Input.COPY:
            trace.mark(first, FEATURES)
        if boundary.output is Output.COPY_TAIL:
            return trace.mark(first, replace(VARYING, tail=boundary.tail))
        if boundary.output not in (Output.REDUCE, Output.GATHER):
            return output
        if boundary.output is Output.REDUCE and boundary.input is not Input.MASK and not trace.value(first).varying:
            raise WrongPlan(
                f"its output is the same on all {self.tp_size} ranks, and summed over them it counts that many times"
            )
        factor = self.tp_size if boundary.output is Output.GATHER else 1
        fresh = torch.empty((*first.shape[:-1], first.shape[-1] * factor), dtype=first.dtype)
        fresh = trace.mark(fresh, EQUAL)
        return (fresh, *output[1:]) if isinstance(output, tuple) else fresh

    def _check_equal(self, tensors: list[torch.Tensor]) -> None:
        if any(self.variance.value(x).varying and x.is_floating_point() for x in tensors):
            raise WrongPlan("its input differs between the ranks, but its boundary takes it for equal on all")
