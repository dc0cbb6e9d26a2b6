"""Apply a sharding spec to a model: parameters become DTensors, modules get hooks, layers local-parameter scopes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat
from ..core.forward_stack import ForwardSlot, ForwardStack
from ..core.model_view import ModelView
from ..core.packed_weights import packed_matrix
from ..core.shard_layout import shard_parameter
from ..core.sharding_spec import REPLICATED, InputHook, ModuleSpec, OutputHook, ParameterSpec, ShardingSpec
from . import boundary_hooks as boundaries
from .dora import sum_weight_norm
from .grad_sync import PartialGradients
from .head_counts import set_local_counts
from .local_parameters import LocalParamForward, ParamBinding
from .sequence_parallel import SequenceParallel
from .shared_sequence import ScatterOutput
from .user_hooks import UserHooks
from .vocab_parallel.cross_entropy import Vocabulary
from .vocab_parallel.logits import KeepSharded


@dataclass
class TensorParallelState:
    """The state of tensor parallelism on one model, for the later steps.

    Attributes:
        mesh: the tp axis.
        partial: the Partial gradients.
        copies: copies to TP by module name; the modules of one layer that read the same tensor use one copy.
        native_styles: modules that run on native torch ParallelStyles; their DTensors stay DTensors during forward.
        places: (owner, attribute) of a parameter -> its placement and that of its gradient. By object, because a module
            that is used in several layers has several names.
        deferred: owner of a bias -> the output hook that adds it after the all-reduce.
        hooks: module -> its input and output hooks, each as (handle, function that registers the hook on a module).
        scopes: module -> the local-parameter scope of its forward.
        packed: layers that compute with a part of a packed weight, and have the scales of that part.
        local: parameters are local tensors between forwards, too.
        sequence: the hooks of sequence parallelism, None without it.
        compute_dtypes: (owner, attribute) of a parameter -> the dtype that its module computes with, if not its own.
        user_hooks: shows full activations to hooks of the user; None on a proxy model, which has none.
    """

    mesh: DeviceMesh
    partial: PartialGradients
    copies: dict[str, boundaries.CopyInput] = field(default_factory=dict)
    native_styles: list[nn.Module] = field(default_factory=list)
    places: dict[tuple[nn.Module, str], ParameterSpec] = field(default_factory=dict)
    deferred: dict[nn.Module, boundaries.ReduceOutput] = field(default_factory=dict)
    hooks: dict[nn.Module, list[tuple[Any, Callable[[nn.Module], Any]]]] = field(default_factory=dict)
    scopes: dict[nn.Module, LocalParamForward] = field(default_factory=dict)
    packed: set[nn.Module] = field(default_factory=set)
    local: bool = False
    sequence: SequenceParallel | None = None
    compute_dtypes: dict[tuple[nn.Module, str], torch.dtype] = field(default_factory=dict)
    user_hooks: UserHooks | None = None

    def hook(self, module: nn.Module, register: Callable[[nn.Module], Any]) -> None:
        """Register an input or output hook on ``module``."""
        self.hooks.setdefault(module, []).append((register(module), register))

    def move_hooks(self, old: nn.Module, new: nn.Module) -> None:
        """Move the hooks of ``old`` to ``new``, which has replaced it in the model."""
        for handle, register in self.hooks.pop(old, []):
            handle.remove()
            self.hook(new, register)
        if self.user_hooks is not None:
            self.user_hooks.move(old, new)

    def place(self, module: nn.Module, name: str, spec: ParameterSpec) -> None:
        """Note the placement of the parameter ``name`` of the model, which ``module`` owns, and of its gradient."""
        key = name.rpartition(".")[2]
        self.places[module, key] = spec
        if spec.partial_gradient:
            self.partial.add(module, key)

    def bindings_of(self, modules: Iterable[nn.Module]) -> list[ParamBinding]:
        """The bindings of the parameters that ``modules`` own directly, for the scope that makes them local."""
        native = {id(inner) for module in self.native_styles for inner in module.modules()}
        result = []
        for owner in modules:
            if id(owner) in native:
                continue
            for key, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                spec = self.places.get((owner, key), REPLICATED)
                hook = self.partial.hook(owner, key) if spec.partial_gradient else None
                bias_of = self.deferred.get(owner) if key == "bias" else None
                zero = spec.rank_zero_only and self.mesh.get_local_rank() > 0
                forward_shard, full_and_cut = self._forward_shard(spec), None
                if spec.dim is not None and not self.local:
                    rank, size = self.mesh.get_local_rank(), self.mesh.size()
                    full_and_cut = (parameter.shape, (spec.dim, spec.blocks, rank, size))
                elif forward_shard is not None and not self.local:
                    full_and_cut = (parameter.shape, forward_shard)
                result.append(
                    ParamBinding(
                        owner,
                        key,
                        hook,
                        spec.on_sequence_shards,
                        bias_of,
                        zero,
                        forward_shard,
                        self.local,
                        full_and_cut,
                        self.mesh.get_group(),
                        self.compute_dtypes.get((owner, key)),
                        owner in self.packed and key == "weight",
                    )
                )
        return result

    def _forward_shard(self, spec: ParameterSpec) -> tuple[int, int, int, int] | None:
        """:attr:`ParamBinding.forward_shard` of this rank."""
        if spec.forward_shard_dim is None:
            return None
        return (
            spec.forward_shard_dim,
            spec.blocks,
            self.mesh.get_local_rank() * spec.forward_shards // self.mesh.size(),
            spec.forward_shards,
        )

    def grow(self, model: nn.Module, spec: ShardingSpec, names: list[str], device: torch.device) -> None:
        """Shard the parameters ``names``, which were added to the sharded ``model``; ``spec`` is the new one."""
        _shard_parameters(model, spec, self, device)
        by_scope: dict[nn.Module, list[ParamBinding]] = {}
        for name in names:
            path, _, key = name.rpartition(".")
            (binding,) = [b for b in self.bindings_of([model.get_submodule(path)]) if b.name == key]
            around = [path[:end] for end in range(len(path), -1, -1) if end == len(path) or path[end] == "."]
            scopes = [module for part in [*around, ""] if (module := model.get_submodule(part)) in self.scopes]
            for module in scopes if any(m is not model for m in scopes) else [_nearest_caller(model, path)]:
                by_scope.setdefault(module, []).append(binding)
        for module, bindings in by_scope.items():
            if module in self.scopes:
                self.scopes[module].bindings.extend(bindings)
            else:
                self.scopes[module] = LocalParamForward.install(module, bindings)
                if self.sequence is not None:
                    self.sequence.connect(self.scopes[module])
        if self.user_hooks is not None:
            self.user_hooks.look(model, spec)
        self.check_user_hooks()

    def check_user_hooks(self, *_: Any) -> None:
        """Show full activations to the user's hooks, now and at the beginning of each forward of a scope."""
        if self.user_hooks is None or torch.compiler.is_compiling():
            return
        for module, scope in self.scopes.items():
            scope.before = scope.before or functools.partial(self.user_hooks.check, module, self.hooks)
            scope.before()


def apply_tensor_parallel(
    model: nn.Module, spec: ShardingSpec, mesh: DeviceMesh, device: torch.device
) -> TensorParallelState:
    """Shard ``model`` over the tp axis ``mesh``, in place.

    Every parameter becomes a DTensor on ``mesh``, the ones without a spec replicated, so that optimizers, clipping and
    checkpoints see one kind of parameter. A tied parameter stays one parameter.

    Args:
        model: the model with equal, full parameters on every rank.
        spec: the validated sharding spec.
        mesh: 1-D mesh of the tp axis.
        device: device of the shards.

    Returns:
        The state that :func:`install_local_parameters` completes after FSDP2 has been applied.
    """
    state = TensorParallelState(mesh, PartialGradients(mesh))
    # Before the hooks, because row-wise layers register theirs with it.
    if spec.sequence is not None:
        state.sequence = SequenceParallel(model, spec.sequence, mesh, set(spec.modules))
    for name, module_spec in spec.modules.items():
        if module_spec.native_style is not None:
            module = model.get_submodule(name)
            _apply_native_style(module, name, module_spec.native_style, mesh)
            state.native_styles.append(module)
        else:
            install_hooks(model, name, module_spec, state)
    install_head_arguments(model, spec, state)
    _shard_parameters(model, spec, state, device)
    for name, attributes in spec.head_counts.items():
        set_local_counts(model.get_submodule(name), attributes, mesh.size())
    for name in spec.reduced_dora_norms:
        sum_weight_norm(model.get_submodule(name), mesh)
    state.user_hooks = UserHooks(mesh)
    state.user_hooks.look(model, spec)
    return state


def _shard_parameters(model: nn.Module, spec: ShardingSpec, state: TensorParallelState, device: torch.device) -> None:
    from torch.distributed.tensor import DTensor

    converted: dict[int, nn.Parameter] = {}
    # If a replaced parameter were freed, a new object could get its id.
    keep: list[nn.Parameter] = []
    for module_name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(parameter, DTensor):
                continue
            name = f"{module_name}.{key}" if module_name else key
            parameter_spec = spec.parameters.get(name, REPLICATED)
            packed = packed_matrix(module) if key == "weight" else None
            if packed is not None and parameter_spec != REPLICATED:
                rank, size = state.mesh.get_local_rank(), state.mesh.size()
                module.quant_state = packed.local_state(parameter_spec, rank, size, device)
                state.packed.add(module)
            if id(parameter) not in converted:
                shown = packed.as_matrix(parameter) if packed is not None and module in state.packed else parameter
                converted[id(parameter)] = shard_parameter(shown, parameter_spec, state.mesh, device)
                keep.append(parameter)
            module._parameters[key] = converted[id(parameter)]
            state.place(module, name, parameter_spec)


def install_hooks(model: nn.Module, name: str, spec: ModuleSpec, state: TensorParallelState) -> None:
    """Register the input and output hooks of ``spec`` on the module ``name`` of ``model``."""
    module = model.get_submodule(name)
    mesh = state.mesh
    group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    # Innermost: input hooks run last and output hooks first, so that existing hooks (NEFTune's noise on the embedding)
    # get the same tensors as in one process.

    def before(hook: Callable[..., Any]) -> None:
        state.hook(module, lambda m: m.register_forward_pre_hook(hook, with_kwargs=True))

    def after(hook: Callable[..., Any], **options: bool) -> None:
        state.hook(module, lambda m: m.register_forward_hook(hook, prepend=True, **options))

    if spec.input is InputHook.COPY_TO_TP:
        state.copies[name] = boundaries.CopyInput(group)
        before(state.copies[name])
    elif spec.input is InputHook.COPY_ALL_TO_TP:
        before(boundaries.CopyAllInputs(group))
    elif spec.input is InputHook.SCATTER:
        before(boundaries.SplitInput(group, rank, size))
    elif spec.input is InputHook.DIVIDE:
        before(boundaries.ScaleInput(size))
    elif spec.input is InputHook.MASK_IDS:
        rows: int = cast(nn.Embedding, module).weight.shape[0] // size
        vocabulary = boundaries.VocabularySlice(group, rank, rows)
        before(vocabulary.before)
        after(vocabulary.after, always_call=True)
        return
    if spec.output in (OutputHook.REDUCE_FROM_TP, OutputHook.REDUCE_SCATTER_SEQUENCE):
        bias_owner = None if spec.deferred_bias is None else module.get_submodule(spec.deferred_bias)
        reduce = boundaries.ReduceOutput(group, bias_owner)
        if spec.output is OutputHook.REDUCE_SCATTER_SEQUENCE:
            reduce = ScatterOutput(group, bias_owner)
            state.sequence.add(name, reduce)  # type: ignore[union-attr]
        after(reduce)
        if bias_owner is not None:
            state.deferred[bias_owner] = reduce
    elif spec.output is OutputHook.GATHER:
        after(boundaries.GatherOutput(group, rank, size))
    elif spec.output is OutputHook.SHARDED_LOGITS:
        after(KeepSharded(Vocabulary(group, rank, size, spec.chunk_rows)))
    elif spec.output is OutputHook.COPY_TAIL_TO_TP:
        after(boundaries.CopyTail(group, spec.tail))


def _register_pre_hook(hook: Any, module: nn.Module) -> Any:
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def install_head_arguments(model: nn.Module, spec: ShardingSpec, state: TensorParallelState) -> None:
    """Register hooks that slice arguments with one value per head to this rank's heads."""
    group, rank, size = state.mesh.get_group(), state.mesh.get_local_rank(), state.mesh.size()
    for name, arguments in spec.head_arguments.items():
        own = boundaries.OwnHeads(arguments, group, rank, size)
        register = functools.partial(_register_pre_hook, own)
        state.hook(model.get_submodule(name), register)


def _apply_native_style(module: nn.Module, name: str, style: object, mesh: DeviceMesh) -> None:
    """Apply a torch ``ParallelStyle``, or a layer object registered with transformers, on its own engine."""
    from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

    if isinstance(style, ParallelStyle):
        parallelize_module(module, mesh, style, src_data_rank=None)
        return
    for key, _ in list(module.named_parameters(recurse=False)):
        style.shard_param(module, key, mesh)  # type: ignore[attr-defined]
    style.install_forward(module, mesh)  # type: ignore[attr-defined]


def install_local_parameters(
    model: nn.Module, units: list[nn.Module], state: TensorParallelState, parts: dict[nn.Module, list[nn.Module]]
) -> None:
    """Make parameters local during forward, and connect the copies to TP inside of each layer.

    Args:
        model: the model after tensor parallelism and FSDP2.
        units: modules that become one scope each (decoder layers). Elsewhere every module that owns parameters is a
            scope of its own, so that outside of its forward its weight is a DTensor (losses that read
            ``lm_head.weight``).
        state: what :func:`apply_tensor_parallel` returned.
        parts: modules inside of each unit that are recomputed separately, so they need a scope of their own, too.
    """
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    taken: set[tuple[int, str]] = set()
    for unit in units:
        prefix = names[unit]
        shared = boundaries.SharedInputs() if state.sequence is None else state.sequence.memory(prefix)
        for name, copy in state.copies.items():
            if name.startswith(f"{prefix}."):
                copy.shared = shared
        bindings = state.bindings_of(unit.modules())
        taken.update((id(binding.owner), binding.name) for binding in bindings)
        for part in dict.fromkeys([*parts.get(unit, []), *_recomputed_by_code(unit)]):
            state.scopes[part] = LocalParamForward.install(part, state.bindings_of(part.modules()), shared)
        state.scopes[unit] = LocalParamForward.install(unit, bindings, shared)
    # Parameters outside of the units: the scope is on the module whose forward reads them.
    for caller, bindings in _callers(model, state, taken).items():
        state.scopes[caller] = LocalParamForward.install(caller, bindings)
    if state.sequence is not None:
        state.sequence.complete(state.scopes, [copy for copy in state.copies.values() if copy.shared is None])
    state.partial.resolve()
    state.check_user_hooks()
    # The pre-hooks of a scope itself are called before its forward, so they are checked before the model's.
    for root in dict.fromkeys([model, ModelView.of(model).inner]):
        root.register_forward_pre_hook(state.check_user_hooks)


def make_local_in_forward(model: nn.Module, units: list[nn.Module], names: dict[str, torch.dtype | None]) -> None:
    """Without tensor parallelism: the parameters ``names``, replicated DTensors, are local tensors during forwards.

    Args:
        model: the model after FSDP2.
        units: modules that are a scope each, and modules inside of them that are recomputed separately. Elsewhere the
            module whose forward reads a parameter is its scope.
        names: first and further names of the parameters -> the dtype that they are cast to, None for their own.
    """
    around: dict[nn.Module, list[nn.Module]] = {}
    for unit in units:
        for module in unit.modules():
            around.setdefault(module, []).append(unit)
    scopes: dict[nn.Module, list[ParamBinding]] = {}
    for name, dtype in names.items():
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        for scope in around.get(owner) or [_nearest_caller(model, path)]:
            scopes.setdefault(scope, []).append(ParamBinding(owner, key, dtype=dtype))
    for module, bindings in scopes.items():
        LocalParamForward.install(module, bindings)


def grow_local_parameters(model: nn.Module, units: list[nn.Module], names: dict[str, torch.dtype | None]) -> None:
    """Like :func:`make_local_in_forward`, for parameters that were added later.

    The scopes are the modules around a parameter that are scopes or checkpoints already, and its unit.
    """
    whole = set(units)
    for name, dtype in names.items():
        path, _, key = name.rpartition(".")
        binding = ParamBinding(model.get_submodule(path), key, dtype=dtype)
        around = [path[:end] for end in range(len(path), 0, -1) if end == len(path) or path[end] == "."]
        modules = [model.get_submodule(part) for part in around]
        scopes = [m for m in modules if m in whole or any(slot in ForwardStack.of(m) for slot in _SCOPES)]
        for module in scopes or [_nearest_caller(model, path)]:
            scope = ForwardStack.of(module).get(ForwardSlot.LOCAL_PARAMETERS)
            if isinstance(scope, LocalParamForward):
                scope.bindings.append(binding)
            else:
                LocalParamForward.install(module, [binding])


#: Forwards in which a parameter has to be local: scopes, and what is recomputed in backward.
_SCOPES = (ForwardSlot.LOCAL_PARAMETERS, ForwardSlot.CHECKPOINT)


def _recomputed_by_code(unit: nn.Module) -> list[nn.Module]:
    """Modules with parameters below those whose code calls ``torch.utils.checkpoint`` by itself: the recomputation, in
    backward, is outside of the forward of ``unit``.
    """
    calling = [module for module in unit.modules() if _names_checkpoint(type(module))]  # type: ignore[arg-type]
    return [
        inner
        for module in calling
        for inner in module.modules()
        if inner is not module and inner._parameters and compat.has_implemented_forward(inner)
    ]


@functools.lru_cache(maxsize=1024)
def _names_checkpoint(cls: type) -> bool:
    functions = [f for base in cls.__mro__ if base is not nn.Module for f in vars(base).values()]
    return any("checkpoint" in f.__code__.co_names for f in functions if isinstance(f, types.FunctionType))


def _callers(
    model: nn.Module, state: TensorParallelState, taken: set[tuple[int, str]]
) -> dict[nn.Module, list[ParamBinding]]:
    """The modules whose forwards read the parameters that are not ``taken``, (id of the owner, name), by a layer."""
    callers: dict[nn.Module, list[ParamBinding]] = {}
    for name, owner in model.named_modules(remove_duplicate=False):  # a module with several names has several callers
        bindings = [b for b in state.bindings_of([owner]) if (id(owner), b.name) not in taken]
        if not bindings:
            continue
        callers.setdefault(_nearest_caller(model, name), []).extend(bindings)
        while name.endswith(".base_layer"):  # PEFT's layer may read the weight of the layer below it
            name = name.removesuffix(".base_layer")
            callers.setdefault(model.get_submodule(name), []).extend(bindings)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):  # torch's attention reads the weights of its child out_proj
            callers.setdefault(parent, []).extend(bindings)
    return callers


def _nearest_caller(model: nn.Module, name: str) -> nn.Module:
    """The module itself, or the nearest one above it that has a forward (a ``ParameterDict`` has none)."""
    module = model.get_submodule(name)
    while name and not compat.has_implemented_forward(module):
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
    return module
