"""The strategy with megatron-fsdp instead of FSDP2: the same steps, plans and checks, for every Hugging Face model.

Also here are its helpers: the form of tensor-parallel parameters that megatron-fsdp can shard (:func:`make_local`), the
operations that are refused afterwards (:func:`refuse_changes`), and the classes of its units (:func:`unit_classes`).
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...core.model_structure import find_structure
from ...core.model_view import ModelView
from ...core.option_fields import refuse_for_backend
from ...core.sharding_spec import REPLICATED, ShardingSpec
from ...errors import ConfigError, UnsupportedError, not_available_yet
from ...fsdp.quantized import quantization_method
from ...fsdp.shard import separable
from ...peft.operations import check_trainable_as_shards
from ...plan.analysis.cross_module_reads import cross_module_reads, refuse_cross_module_reads
from ...plan.layer_kinds import check_peft_method
from ...plan.resolve import resolve
from ...plan.select import select_plan
from ...plan.torch_styles import check_sequence_layouts
from ...plan.validate import validate
from ...plan_search.proof import proven_plan
from ...strategies.base import refuse_sharded
from ...strategies.context import ParallelizeContext
from ...strategies.default import DefaultParallelizationStrategy, refuse_fused_loss
from . import engine
from .mesh import find_axes
from .options import MegatronOptions
from .sharding import MegatronModel, managed_by_megatron, shard_with_megatron
from .shards import local_part
from .state import FullStates

logger = logging.getLogger(__name__)


class MegatronFsdpStrategy(DefaultParallelizationStrategy):
    """Tensor parallelism as in the default strategy, then megatron-fsdp.

    With one data-parallel rank there is nothing for megatron-fsdp to shard. Then FSDP2 on an axis of one rank is used,
    as in the default strategy.

    Args:
        options: behaviour of megatron-fsdp.
        shard: axis of the mesh to shard over; may be a flattened one.
        tp: axis of tensor parallelism, None if the mesh has none.
        has_optimizer: an optimizer is prepared together with the model.
    """

    def __init__(
        self,
        options: MegatronOptions | None = None,
        shard: str = "dp_shard",
        tp: str | None = "tp",
        has_optimizer: bool = True,
    ) -> None:
        self.options = options or MegatronOptions()
        self.shard, self.tp, self.has_optimizer = shard, tp, has_optimizer

    # ---- plan: no collective, no change ----------------------------------------------------------------------------

    def plan(self, context: ParallelizeContext) -> None:
        """Decide everything; raise for a model, option or plan that megatron-fsdp does not support."""
        engine.load()
        self.refuse_options_of_fsdp2(context)
        self.axes = find_axes(context.mesh, self.shard, self.tp)
        # Without an Accelerator FSDP2 takes over, with a warning, as in the reference API.
        if self.axes.data_size(context.mesh) == 1 and not context.sums_after_backward:
            raise ConfigError(
                "backend='megatron_fsdp' with one data-parallel rank: there is nothing for it to shard. Use "
                "backend='fsdp2', or more processes than tp_size."
            )
        if self.axes.data_size(context.mesh) > 1:
            engine.check_device()
        self.check_model(context)
        context.structure = find_structure(context.model, context.layer_classes)
        self.units = unit_classes(context.model, self.options.megatron_fsdp_unit_modules or context.layer_classes)
        if context.tp_mesh is not None:
            self.select_tensor_parallel(context)
            reads = cross_module_reads(context.model, context.structure.layers)
            refuse_cross_module_reads(context.spec, reads)  # type: ignore[arg-type]

    def check_carried_out(self, context: ParallelizeContext) -> None:
        """Nothing: the model is wrapped by megatron-fsdp, not by FSDP2."""

    def refuse_options_of_fsdp2(self, context: ParallelizeContext) -> None:
        """Refuse options of FSDP2 that megatron-fsdp does not have."""
        refuse_for_backend(context.options, "megatron_fsdp")
        asked = {
            "cpu_offload": "CPU" in type(context.fsdp.offload_policy).__name__,
            "ignored_modules": bool(context.fsdp.ignored_parameters),
            "min_num_params": context.fsdp.minimum_unit_size is not None,
            "activation_checkpointing_offload": context.offload_activations,
            "cp_size": context.cp_mesh is not None,
            "state_dict_type=SHARDED_STATE_DICT": context.sharded_checkpoints,
            "init_fsdp_with_meta_device": self.options.init_fsdp_with_meta_device and not context.sums_after_backward,
            "mixed_precision='fp16'": context.fsdp.mp_policy.param_dtype is torch.float16,
        }
        for name, given in asked.items():
            if given:
                raise UnsupportedError(
                    f"{name} cannot be combined with backend='megatron_fsdp'. Leave it out, or use backend='fsdp2'."
                )
        if context.compile_options is not None:
            raise not_available_yet(
                "compile",
                True,
                "megatron-fsdp's hooks would break the graph of each layer; use backend='fsdp2', or compile=False.",
            )

    def check_model(self, context: ParallelizeContext) -> None:
        """Refuse models that megatron-fsdp or tensor parallelism cannot shard."""
        refuse_sharded(context.model)
        check_trainable_as_shards(context.model)
        if quantization_method(context.model) is not None:
            raise UnsupportedError(
                "megatron-fsdp has no place for quantised weights: it takes their bytes for float8. Use "
                "backend='fsdp2', or the model without quantization_config."
            )
        scalars = [name for name, p in context.model.named_parameters() if p.ndim == 0]
        if scalars:
            raise UnsupportedError(
                f"{', '.join(scalars[:4])}: parameters without dimensions cannot be sharded. Give them the shape (1,)."
            )
        if context.tp_mesh is not None:
            refuse_fused_loss(context.model)
        if context.pending is not None and context.pending.values:
            raise UnsupportedError(
                "a model of hf_automodel_parallel.from_pretrained is read into FSDP2's shards; megatron-fsdp fills its "
                "own buffers. Use backend='fsdp2', or load the model with its own class's from_pretrained."
            )
        meta = [name for name, p in context.model.named_parameters() if p.device.type == "meta"]
        if meta and not (self.options.init_fsdp_with_meta_device or context.load_on_rank_zero):
            raise UnsupportedError(
                f"{len(meta)} parameters have no values ({meta[0]}, ...): the model is on the meta device. Load it on "
                f"the CPU, or use init_fsdp_with_meta_device=True if its modules can initialise themselves."
            )
        if meta and self.options.init_fsdp_with_meta_device:
            _check_resettable(context.model, context.tp_mesh is not None)

    def select_tensor_parallel(self, context: ParallelizeContext) -> None:
        """Choose the plan and resolve it on the model; refuse styles that compute with DTensors."""
        check_peft_method(context.model)
        size = context.tp_mesh.size()  # type: ignore[union-attr]
        # Derived plans have been verified with FSDP2 only.
        order = tuple(source for source in context.options.plan_order if source != "derived")
        context.plan = select_plan(
            context.model,
            context.options.tp_plan,
            order,
            size,
            prove=lambda inner, plan: proven_plan(inner, plan, completed=False),
        )
        check_sequence_layouts(context.plan, context.options.sequence_parallel)
        context.spec = resolve(context.model, context.plan, size)
        check_local(context.spec)
        validate(context.model, context.spec, size)

    # ---- apply: the same steps on every rank -----------------------------------------------------------------------

    def apply_data_parallel(self, context: ParallelizeContext) -> None:
        """Wrap with megatron-fsdp; or, with one data-parallel rank, with FSDP2."""
        if self.axes.data_size(context.mesh) == 1:
            if dist.get_rank() == 0:
                logger.warning("there is one data-parallel rank, so megatron-fsdp is not used")
            super().apply_data_parallel(context)
            return
        # Before make_local: a DTensor has the shape of the full tensor.
        shapes = {name: parameter.shape for name, parameter in context.model.named_parameters()}
        if context.spec is not None:
            make_local(context.model, context.spec)
            context.tensor_parallel.local = True  # type: ignore[union-attr]
        managed = shard_with_megatron(
            context.model,
            self.axes.layout(context.mesh),
            self.options,
            self.units,
            context.spec,
            shapes,
            context.device,
            self.has_optimizer,
            context.tensor_parallel,
            context.fsdp.mp_policy.param_dtype,
        )
        refuse_changes(context.model)
        if not context.sums_after_backward:  # with an Accelerator, which saves the state dicts of the model
            managed.states = FullStates(managed)

    def switch_optimizer(
        self,
        context: ParallelizeContext,
        optimizer: torch.optim.Optimizer,
        names: list[list[str]],
        before: dict[str, nn.Parameter],
    ) -> None:
        """Let ``optimizer`` update megatron-fsdp's shards, with megatron-fsdp's own work before and after each step."""
        managed: MegatronModel | None = managed_by_megatron(context.model)
        if managed is None:
            super().switch_optimizer(context, optimizer, names, before)
            return
        managed.adopt(optimizer, names, before, for_dcp=context.sums_after_backward)
        if managed.states is not None:
            managed.states.of_optimizer(optimizer)


def _check_resettable(model: nn.Module, tensor_parallel: bool) -> None:
    if tensor_parallel:
        raise UnsupportedError(
            "init_fsdp_with_meta_device=True with tensor parallelism: each rank would initialise its shard on its own, "
            "and replicated parameters differently. Build the model on the CPU, or use tp=1."
        )
    unable = [
        f"{name or type(module).__name__} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(p.device.type == "meta" for p in module.parameters(recurse=False))
        and not (hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters"))
    ]
    if unable:
        raise UnsupportedError(
            f"init_fsdp_with_meta_device=True: {len(unable)} modules have no reset_parameters() to initialise "
            f"themselves with: {', '.join(unable[:4])}. Add the method, or build the model on the CPU."
        )


# ---- tensor-parallel parameters in the form that megatron-fsdp can shard -------------------------------------------

# megatron-fsdp reads the global shape of a DTensor where it needs the local one: a weight that is sharded on dimension
# 1 gets rows of the wrong length, and its own check fails. So it gets local tensors with Megatron-Core's three
# attributes (tensor_model_parallel, partition_dim, partition_stride), which it also supports.


def make_local(model: nn.Module, spec: ShardingSpec) -> None:
    """Replace each DTensor parameter of ``model`` by its local tensor as a parameter, in place; tied ones stay tied."""
    # With the DTensor as well: if it were freed, a new object could get its id.
    made: dict[int, tuple[DTensor, nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                local = nn.Parameter(local_part(parameter), requires_grad=parameter.requires_grad)
                place = spec.parameters.get(f"{module_name}.{key}" if module_name else key, REPLICATED)
                local.tensor_model_parallel = place.dim is not None  # type: ignore[attr-defined]
                local.partition_dim = -1 if place.dim is None else place.dim  # type: ignore[attr-defined]
                local.partition_stride = 1  # type: ignore[attr-defined]
                made[id(parameter)] = (parameter, local)
            module._parameters[key] = made[id(parameter)][1]


def check_local(spec: ShardingSpec) -> None:
    """Raise :class:`UnsupportedError` if a module of ``spec`` has a torch ``ParallelStyle``, which needs DTensors."""
    for name, module in spec.modules.items():
        if module.native_style is not None:
            raise UnsupportedError(
                f"the tensor-parallel style {type(module.native_style).__name__} of {name!r} cannot be combined with "
                f"megatron-fsdp, which gathers local tensors: it computes with DTensors. Use a style name such as "
                f"'colwise' or 'rowwise' (or a style of torch's that means the same), or leave tp_shard_plan out."
            )


# ---- operations that are refused once the parameters are in megatron-fsdp's buffers --------------------------------


#: Operations of PEFT and transformers that replace parameters, or change which of them are trained. megatron-fsdp made
#: its buffers for the parameters of the moment when it sharded the model.
_CHANGING = (
    "add_adapter",
    "add_weighted_adapter",
    "delete_adapter",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "merge_and_unload",
    "set_adapter",
    "set_requires_grad",
    "unload",
    "unmerge_adapter",
)


def refuse_changes(model: nn.Module) -> None:
    """Replace the operations of :data:`_CHANGING` on ``model`` by functions that raise :class:`UnsupportedError`."""
    inner = ModelView.of(model).inner
    for owner in {id(o): o for o in (model, getattr(model, "base_model", None), inner)}.values():
        for name in _CHANGING:
            if isinstance(owner, nn.Module) and callable(getattr(type(owner), name, None)):
                owner.__dict__[name] = _refusal(name)


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"{name}() on a model that megatron-fsdp manages: it holds parameters and gradients in buffers made for "
            f"those that were there when it was sharded. Do it before, or use backend='fsdp2'."
        )

    return refuse


# ---- units: the classes whose instances megatron-fsdp unshards and reshards together -------------------------------


def unit_classes(model: nn.Module, given: Sequence[str | type[nn.Module]] | None) -> list[type[nn.Module]]:
    """The unit classes of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped.
        given: classes, import paths or class names. None: the classes of the repeated layers, or the class of the model
            if it has no repeated layers.

    Raises:
        ConfigError: no module of the model has such a class.
        UnsupportedError: a unit would contain another one, or a parameter that is also used outside of it.
    """
    if given is None:
        layers = find_structure(model).layers
        # A parameter that is tied to a module outside of a unit would be resharded while that module needs it.
        whole = {id(layer) for layer in separable(model, layers)}
        shared = {type(layer) for layer in layers if id(layer) not in whole}
        classes = [cls for cls in dict.fromkeys(map(type, layers)) if cls not in shared]
        return classes or [type(model)]
    classes = list(dict.fromkeys(_find(model, item) for item in given))
    units = [module for module in model.modules() if isinstance(module, tuple(classes))]
    for unit in units:
        inner = next((m for m in unit.modules() if m is not unit and isinstance(m, tuple(classes))), None)
        if inner is not None:
            raise UnsupportedError(
                f"megatron_fsdp_unit_modules: {type(unit).__name__} contains {type(inner).__name__}; megatron-fsdp "
                f"would free the inner one while the outer one needs it. Name one of the two."
            )
    whole = {id(unit) for unit in separable(model, units)}
    for unit in units:
        if id(unit) not in whole and unit is not model and any(True for _ in unit.parameters()):
            raise UnsupportedError(
                f"megatron_fsdp_unit_modules: a {type(unit).__name__} shares a parameter with modules outside of it, "
                f"which megatron-fsdp would free under them. Leave it out, or untie the parameter."
            )
    return classes


def _find(model: nn.Module, item: str | type[nn.Module]) -> type[nn.Module]:
    """The class that ``item`` names; raises :class:`ConfigError` if no module of ``model`` has it."""
    present = {type(module): None for module in model.modules()}
    if isinstance(item, type):
        if any(issubclass(cls, item) for cls in present):
            return item
    else:
        path, _, name = item.rpartition(".")
        by_name = [cls for cls in present if cls.__name__ == name and path in ("", cls.__module__)]
        if by_name:
            return by_name[0]
        cls = _imported(path, name) if path else None
        if isinstance(cls, type) and any(issubclass(known, cls) for known in present):
            return cls
    shown = item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}"
    names = sorted({cls.__name__ for cls in present})
    near = difflib.get_close_matches(shown.rpartition(".")[2], names, n=3, cutoff=0.4)
    raise ConfigError(
        f"megatron_fsdp_unit_modules names {shown!r}, but {type(model).__name__} has no module of this class"
        + (f"; did you mean {', '.join(near)}?" if near else f". Its classes: {', '.join(names[:8])}.")
    )


def _imported(path: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(path), name, None)
    except ImportError:
        return None
