"""The flow with megatron-fsdp in the place of FSDP2: the same steps, plans and checks, for every Hugging Face model."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn

from ...core.model_structure import find_structure
from ...core.option_fields import refuse_for_backend
from ...errors import ConfigError, UnsupportedError, not_available_yet
from ...fsdp.quantized import quantization_method
from ...peft.operations import check_trainable_as_shards
from ...plan.analysis.cross_module_reads import cross_module_reads, refuse_cross_module_reads
from ...plan.layer_kinds import check_peft_method
from ...plan.resolve import resolve
from ...plan.select import select_plan
from ...plan.torch_styles import check_sequence_layouts
from ...plan.validate import validate
from ...strategies.base import refuse_sharded
from ...strategies.context import ParallelizeContext
from ...strategies.default import DefaultParallelizationStrategy, refuse_fused_loss
from . import engine
from .changes import refuse_changes
from .mesh import find_axes
from .options import MegatronOptions
from .sharding import MegatronModel, managed_by_megatron, shard_with_megatron
from .state import FullStates
from .tensor_parallel import check_local, make_local
from .units import unit_classes

logger = logging.getLogger(__name__)


class MegatronFsdpStrategy(DefaultParallelizationStrategy):
    """Tensor parallelism as everywhere, then megatron-fsdp.

    With one data-parallel rank there is nothing for megatron-fsdp to do; FSDP2 on an axis of one rank takes its place,
    as it does in the default strategy.

    Args:
        options: behaviour of megatron-fsdp.
        shard: axis of the mesh to shard over; one that is flattened of several, too.
        tp: axis of tensor parallelism, None if the mesh has none.
        has_optimizer: an optimizer is handed over with the model.
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

    # ---- deciding --------------------------------------------------------------------------------------------------

    def plan(self, context: ParallelizeContext) -> None:
        """Like the default strategy's, with what megatron-fsdp can do."""
        engine.load()
        self.refuse_options_of_fsdp2(context)
        self.axes = find_axes(context.mesh, self.shard, self.tp)
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

    def refuse_options_of_fsdp2(self, context: ParallelizeContext) -> None:
        """Refuse what the user asked of FSDP2 and megatron-fsdp does not have."""
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
        """Refuse models that cannot be sharded from here."""
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
        """Choose the plan and resolve it on the model; styles that need DTensors in flight are refused."""
        check_peft_method(context.model)
        size = context.tp_mesh.size()  # type: ignore[union-attr]
        # Derived plans have been compared under FSDP2 alone; the refusal names the sources that were asked.
        order = tuple(source for source in context.options.plan_order if source != "derived")
        context.plan = select_plan(context.model, context.options.tp_plan, order, size)
        check_sequence_layouts(context.plan, context.options.sequence_parallel)
        context.spec = resolve(context.model, context.plan, size)
        check_local(context.spec)
        validate(context.model, context.spec, size)

    # ---- carrying out ----------------------------------------------------------------------------------------------

    def apply_data_parallel(self, context: ParallelizeContext) -> None:
        """Wrap with megatron-fsdp; or, with one data-parallel rank, with FSDP2."""
        if self.axes.data_size(context.mesh) == 1:
            if dist.get_rank() == 0:
                logger.warning("there is one data-parallel rank, so megatron-fsdp is not used")
            super().apply_data_parallel(context)
            return
        shapes = {
            name: parameter.shape for name, parameter in context.model.named_parameters()
        }  # of DTensors: the whole ones
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
        if not context.sums_after_backward:  # with an Accelerator, which saves by state dicts
            managed.states = FullStates(managed)

    def switch_optimizer(
        self,
        context: ParallelizeContext,
        optimizer: torch.optim.Optimizer,
        names: list[list[str]],
        before: dict[str, nn.Parameter],
    ) -> None:
        """Let ``optimizer`` work on megatron-fsdp's shards, and do megatron-fsdp's part in each step."""
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
