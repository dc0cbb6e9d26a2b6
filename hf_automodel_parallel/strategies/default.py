"""The default strategy: it owns the order of the steps; a family overrides the one step in which it differs."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from .. import compat
from ..activation_checkpointing import (
    checkpoint_module,
    checkpointable_parts,
    mode_of_argument,
    shares_keys_and_values,
    switch_cache_off,
    what_is_kept,
)
from ..compile import compile_layers
from ..context_parallel import forward as context_parallel
from ..context_parallel.models import check_model as check_for_context_parallel
from ..core.consistency import check_same_structure, equalize_parameters, synchronize_rng
from ..core.mesh import MeshAxes
from ..core.model_structure import dissect
from ..core.module_names import unwrapped
from ..core.ranks import agreement
from ..errors import ConfigError, UnsupportedError
from ..fsdp.dtype_groups import install_companions, own_dtype_parameters
from ..fsdp.encoder_placement import placement, replicated_parameters
from ..fsdp.options import ShardingOptions, on_device, without_pinning
from ..fsdp.quantized import check_quantized, keep_layout
from ..fsdp.reversible import refuse_own_backward
from ..fsdp.shard import check_packed_parameters, shard_data_parallel, wanted_units, without_units_inside
from ..fsdp.unsupported_models import keep_layers_together, refuse_layer_drop
from ..loading.fill import ValuesSetAside
from ..peft.late_adapters import adding
from ..peft.operations import check_trainable_as_shards, manage_adapters
from ..plan.analysis.cross_module_reads import check_outside_reads, outside_reads
from ..plan.analysis.replication_check import complete
from ..plan.analysis.sequence_parallel import derive, regather
from ..plan.analysis.skipped_layers import skipped_without_images
from ..plan.describe import plan_lines
from ..plan.expert_parallel import refuse_expert_parallel
from ..plan.layer_kinds import check_peft_method
from ..plan.loss_parallel import keep_logits_sharded
from ..plan.resolve import resolve
from ..plan.select import select_plan
from ..plan.torch_styles import check_sequence_layouts
from ..plan.validate import validate
from ..plan_search.proxy_model import replaced_modules
from ..tensor_parallel.apply import apply_tensor_parallel, install_regions
from ..tensor_parallel.async_tp import check_async_tensor_parallel, with_async_tensor_parallel
from ..tensor_parallel.dropout_rng import (
    draws_random_numbers,
    install_own_numbers,
    install_sharded_dropout,
    refuse_compiled_dropout,
    synchronize_at_first_forward,
)
from ..tensor_parallel.full_parameter_view import install_outside_reads
from .base import ParallelizationStrategy, materialize_empty, refuse_meta, refuse_sharded
from .context import GivenPlan, Job

logger = logging.getLogger(__name__)


class DefaultParallelizationStrategy(ParallelizationStrategy):
    """The flow for every Hugging Face model without one of its own.

    :meth:`plan` only reads and raises everything a user can have got wrong; :meth:`carry_out` changes the model. Between
    the two the ranks agree that nobody failed, so an error on one of them is an error on all.
    """

    #: Order in which :meth:`parallelize` looks for a plan, that of the reference API. ``Accelerator.prepare`` has its own.
    plan_order = ("registry", "hf", "default")

    #: What :meth:`parallelize` computes in if no policy is given, that of the reference API.
    mp_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)

    def parallelize(  # type: ignore[override]
        self,
        model: nn.Module,
        device_mesh: DeviceMesh,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: OffloadPolicy | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: bool | str | None = False,
        tp_shard_plan: GivenPlan = None,
        dp_replicate_mesh_name: str = "dp_replicate",
        dp_shard_cp_mesh_name: str = "dp_shard_cp",
        tp_mesh_name: str = "tp",
        enable_async_tensor_parallel: bool = False,
        enable_compile: bool = False,
        enable_fsdp2_prefetch: bool = True,
        fsdp2_backward_prefetch_depth: int = 2,
        fsdp2_forward_prefetch_depth: int = 1,
        reshard_after_forward: bool | None = None,
        fully_shard_fn: Any = None,
    ) -> nn.Module:
        """Parallelise ``model`` in place without an Accelerator, and return it. Collective over ``device_mesh``.

        Create the optimizer afterwards, from ``model.parameters()``. Partial gradients of replicated parameters are summed at
        the end of each backward, so clipping and stepping need nothing special.

        Args:
            model: on the CPU, the device, or meta (then ``model.to_empty(device=...)`` and a checkpoint fill it).
            device_mesh: root mesh with the axes named below; ``pp`` may be one of them.
            mp_policy: dtypes of FSDP2; None: parameters in bfloat16, reduction and output in float32.
            offload_policy: FSDP2's; None keeps shards on the device.
            sequence_parallel: shard activations between the boundaries along the sequence.
            activation_checkpointing: False, True (whole layers), "submodule" or "selective".
            tp_shard_plan: explicit plan in any form of ``AutoParallelismConfig.tp_plan``.
            dp_replicate_mesh_name: axis of replicas, used if it has more than one rank.
            dp_shard_cp_mesh_name: axis that FSDP2 shards over.
            tp_mesh_name: axis of tensor parallelism.
            enable_async_tensor_parallel: overlap tensor-parallel collectives with matrix products.
            enable_compile: compile each layer in place.
            enable_fsdp2_prefetch: False switches both prefetch depths off.
            fsdp2_backward_prefetch_depth: units to gather ahead in backward.
            fsdp2_forward_prefetch_depth: units to gather ahead in forward.
            reshard_after_forward: free gathered layers after forward; None: yes, except under pipeline parallelism, which
                would gather them again for each micro-batch.
            fully_shard_fn: called in place of ``torch.distributed.fsdp.fully_shard``, with its arguments.

        Raises:
            AutoParallelError: what cannot be honoured, on all ranks alike, before anything has changed.
        """
        axes = MeshAxes(dp_replicate_mesh_name, dp_shard_cp_mesh_name, tp_mesh_name)
        axes.check(device_mesh)
        check_arguments(
            {"fsdp2_backward_prefetch_depth": fsdp2_backward_prefetch_depth}
            | {"fsdp2_forward_prefetch_depth": fsdp2_forward_prefetch_depth},
            {"sequence_parallel": sequence_parallel, "enable_async_tensor_parallel": enable_async_tensor_parallel}
            | {"enable_compile": enable_compile, "enable_fsdp2_prefetch": enable_fsdp2_prefetch},
        )
        device = on_device(device_mesh.device_type)
        if reshard_after_forward is None:
            reshard_after_forward = axes.pipeline_size(device_mesh) == 1
        dp_mesh = axes.data_parallel(device_mesh)
        options = ShardingOptions(
            mp_policy=mp_policy or self.mp_policy,
            offload_policy=without_pinning(offload_policy or OffloadPolicy(), device),
            reshard_after_forward=reshard_after_forward and dp_mesh.size(dp_mesh.ndim - 1) > 1,
            forward_prefetch=fsdp2_forward_prefetch_depth if enable_fsdp2_prefetch else 0,
            backward_prefetch=fsdp2_backward_prefetch_depth if enable_fsdp2_prefetch else 0,
            fully_shard_fn=fully_shard_fn,
        )
        options.own_dtype = frozenset(own_dtype_parameters(model, options.mp_policy.param_dtype))
        pending = ValuesSetAside(model)
        job = Job(
            model=model,
            mesh=device_mesh,
            device=device,
            options=options,
            axes=axes,
            pending=pending,
            tp_plan=tp_shard_plan,
            plan_order=self.plan_order,
            sequence_parallel=sequence_parallel,
            async_tensor_parallel=enable_async_tensor_parallel,
            checkpointing=mode_of_argument(activation_checkpointing),
            compile_options={} if enable_compile else None,
            sums_after_backward=True,
        )
        with pending:
            with agreement(f"{type(self).__name__}.parallelize", job.group):
                pending.begin()
                self.plan(job)
            self.compare_ranks(job)
            pending.keep()
            self.carry_out(job)
        manage_adapters(
            model,
            job.tensor_parallel,
            on_unload=lambda plain: None,
            add=lambda original: adding(model, job, original, done=lambda: None),
        )
        return job.model

    # ---- deciding: no collective, no change ----------------------------------------------------------------------

    def plan(self, job: Job) -> None:
        """Select, resolve and validate everything; raises on the first thing that cannot be honoured."""
        self.check_model(job)
        job.anatomy = dissect(job.model, job.layer_classes)
        refuse_own_backward(unwrapped(job.model)[0], job.anatomy.layers)
        job.outside_reads = outside_reads(job.model, job.anatomy.layers)
        job.options.read_outside = frozenset(name for names in job.outside_reads.values() for name in names)
        job.options.towers = placement(job.model, job.anatomy, job.options, job.layer_classes)
        if job.dp_mesh.size() > 1:
            if job.anatomy.towers:
                skipped = skipped_without_images(job.model, job.anatomy.main_layers)
                job.anatomy = dataclasses.replace(job.anatomy, skipped=skipped)
            refuse_layer_drop(job.model, wanted_units(job.anatomy, job.options))
        if job.async_tensor_parallel:
            check_async_tensor_parallel(job.tp_mesh, job.sequence_parallel, job.compile_options, job.device)
        if job.cp_mesh is not None:
            job.suitable = check_for_context_parallel(job.model, job.anatomy, job.cp_mesh.size(), job.sequence_parallel)
        if job.tp_mesh is not None:
            self.select_tensor_parallel(job)

    def check_model(self, job: Job) -> None:
        """Refuse models that cannot be sharded from here."""
        refuse_sharded(job.model)
        refuse_expert_parallel(job.model)
        check_trainable_as_shards(job.model)
        check_quantized(job.model, job.options.mp_policy.param_dtype, job.tp_mesh is not None, job.load_on_rank_zero)
        scalars = [name for name, p in job.model.named_parameters() if p.ndim == 0]
        if scalars:
            raise UnsupportedError(
                f"{', '.join(scalars[:4])}: FSDP2 cannot shard parameters without dimensions. Give them the shape (1,)."
            )
        if job.tp_mesh is not None:
            refuse_fused_loss(job.model)
        if not job.sums_after_backward:  # without an Accelerator the model is filled afterwards
            refuse_meta(job)

    def sources(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The order of sources of plans for this family, where the config asks for ``asked``."""
        return asked

    def select_tensor_parallel(self, job: Job) -> None:
        """Choose the plan and resolve it on the model."""
        check_peft_method(job.model)
        size = job.tp_mesh.size()  # type: ignore[union-attr]
        job.plan = select_plan(job.model, job.tp_plan, self.sources(job.plan_order), size)
        check_sequence_layouts(job.plan, job.sequence_parallel)
        job.spec = resolve(job.model, job.plan, size)
        validate(job.model, job.spec, size)
        if job.plan.origin != "derived" or replaced_modules(job.model):  # a derived one is proven with values, for the class
            complete(job.model, job.spec, job.anatomy.layers, size, job.plan.strict)  # type: ignore[union-attr]
        check_outside_reads(job.spec, job.outside_reads)
        if job.sequence_parallel:
            derive(job.model, job.spec, job.anatomy.layers)  # type: ignore[union-attr]
        if job.sequence_parallel_regather:
            regather(job.model, job.spec, job.checkpointing)
        keep_logits_sharded(job.model, job.spec, job.loss_parallel, job.loss_chunk_size)
        if job.compile_options is not None:
            refuse_compiled_dropout(job.model, job.spec)
        shapes = {name: p.shape for name, p in job.model.named_parameters()}
        check_packed_parameters(shapes, job.spec, job.dp_mesh.size(-1))
        if job.options.ignored_parameters:
            raise UnsupportedError(
                "ignored_modules of the fsdp_plugin cannot be combined with tensor parallelism yet: every parameter needs a "
                "place on the tp axis. Remove ignored_modules or use tp_size=1."
            )

    # ---- carrying out: the same steps on every rank --------------------------------------------------------------

    def compare_ranks(self, job: Job) -> None:
        """Raise on all ranks unless they hold the same model and planned the same."""
        check_same_structure(job.model, job.spec, job.group, job.choices)
        if job.pending is not None:
            job.pending.compare_ranks(job.group)

    def carry_out(self, job: Job) -> None:
        """Shard the model, in place, in the order tp -> FSDP2 -> regions."""
        self.load_values(job)
        equalize_parameters(job.model, job.group)
        keep_layout(job.model)
        if job.cp_mesh is not None:
            synchronize_rng(job.cp_mesh)  # before tp, so that all ranks with one batch have the state of their first
        if job.tp_mesh is not None:
            synchronize_rng(job.tp_mesh)
            self.apply_tensor_parallel(job)
        self.apply_data_parallel(job)
        self.read_values(job)
        self.apply_context_parallel(job)
        self.finish_layers(job)
        self.report(job)

    def load_values(self, job: Job) -> None:
        """Give ranks without weights empty tensors, to be filled from rank 0."""
        if job.load_on_rank_zero:
            materialize_empty(job.model, job.pending)
        if job.pending is not None:
            unmanaged = job.options.ignored_parameters | replicated_parameters(job.anatomy, job.options)  # type: ignore[arg-type]
            ignored = [name for name, p in job.model.named_parameters() if p in unmanaged]
            job.pending.fill_whole(job, [name for name in ignored if name in job.pending.values])

    def apply_tensor_parallel(self, job: Job) -> None:
        """Turn parameters into DTensors on the tp axis and hook the boundaries in."""
        job.tensor_parallel = apply_tensor_parallel(job.model, job.spec, job.tp_mesh, job.device)  # type: ignore[arg-type]
        job.tensor_parallel.partial.sums_after_backward = job.sums_after_backward
        install_sharded_dropout(job.model, job.spec, job.tp_mesh)  # type: ignore[arg-type]
        if draws_random_numbers(job.model):
            if job.compile_options is None:
                numbers = install_own_numbers(
                    job.model,
                    job.spec,  # type: ignore[arg-type]
                    job.tp_mesh,  # type: ignore[arg-type]
                    job.device,
                    job.tensor_parallel.hook,
                )
                if job.tensor_parallel.sequence is not None:
                    job.tensor_parallel.sequence.numbers = numbers
            synchronize_at_first_forward(job.model, job.tp_mesh)  # type: ignore[arg-type]

    def apply_data_parallel(self, job: Job) -> None:
        """Apply FSDP2 or HSDP; with tensor parallelism alone, on a ``dp_shard`` axis of one rank."""
        if job.dp_mesh.size() > 1:
            keep_layers_together(job.model, wanted_units(job.anatomy, job.options))  # type: ignore[arg-type]
        shard_data_parallel(job.model, job.anatomy, job.dp_mesh, job.options)  # type: ignore[arg-type]
        if job.tp_mesh is not None:
            compat.mark_packed_placements(job.model.parameters())

    def read_values(self, job: Job) -> None:
        """Let each rank read its part of what is still in files, now that it is known."""
        if job.pending is None:
            return
        job.pending.fill(job)
        if job.tp_mesh is not None:
            compat.mark_packed_placements(job.model.parameters())

    def apply_context_parallel(self, job: Job) -> None:
        """Let attention see whole sequences where a rank holds a part of each. After the other hooks of the model."""
        if job.cp_mesh is None:
            return
        if draws_random_numbers(job.model):
            synchronize_at_first_forward(job.model, job.cp_mesh)
        context_parallel.install(job.model, job.suitable, job.cp_mesh, job.device)  # type: ignore[arg-type]

    def finish_layers(self, job: Job) -> None:
        """Regions, checkpoints and compilation of the layers, from the inside out.

        A checkpoint stands around what is compiled; only the selective one stands inside, where the compiler can see which
        operators to keep. Either way no DTensor is inside of the graph.
        """
        layers, mode = without_units_inside(job.anatomy.layers), job.checkpointing  # type: ignore[union-attr]
        inner, _ = unwrapped(job.model)
        parts: dict[nn.Module, list[nn.Module]] = {}
        if mode == "submodule":
            shares = shares_keys_and_values(inner)
            parts = {layer: checkpointable_parts(layer, shares) for layer in layers}
        keep = what_is_kept(mode, job.sequence_parallel_regather, job.compile_options is not None)
        if job.tensor_parallel is not None:
            if job.spec is not None and job.spec.packed():
                job.model.register_load_state_dict_pre_hook(_refuse_loading_packed)
            install_regions(job.model, layers, job.tensor_parallel, parts)
            install_outside_reads(job.model, job.outside_reads)
        for part in (part for group in parts.values() for part in group):
            checkpoint_module(part)
        if job.compile_options is not None:
            options = job.compile_options
            if job.async_tensor_parallel:
                options = with_async_tensor_parallel(options, job.tp_mesh.get_group())  # type: ignore[union-attr]
            compile_layers(layers, mode, keep, **options)
        if mode == "full" or (mode == "selective" and job.compile_options is None):
            for layer in layers:
                checkpoint_module(layer, keep, offload=job.offload_activations)
        install_companions(job.model)
        if mode != "none":
            switch_cache_off(inner)

    def report(self, job: Job) -> None:
        """One log line per decision, on rank 0."""
        if dist.get_rank() != 0:
            return
        shape = ", ".join(f"{n}={s}" for n, s in zip(job.mesh.mesh_dim_names or (), job.mesh.shape, strict=True))
        logger.info("mesh: %s; %d layers as FSDP2 units", shape, len(job.anatomy.layers))  # type: ignore[union-attr]
        if job.plan is not None and job.spec is not None:
            for line in plan_lines(job.plan, job.spec):
                logger.info("%s", line)


def check_arguments(depths: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` for a depth that is no whole number of units, or a flag that is neither true nor false."""
    for name, depth in depths.items():
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise ConfigError(f"{name}={depth!r}: give the number of layers to gather ahead, 0 or more.")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"{name}={flag!r}: give True or False.")


def refuse_fused_loss(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if Liger has replaced the model's own forward.

    Its loss multiplies hidden states with ``lm_head.weight`` in a kernel of its own, beside the head's forward, where under
    tensor parallelism the weight is a DTensor.
    """
    inner, _ = unwrapped(model)
    if str(getattr(inner.forward, "__module__", "")).startswith("liger_kernel"):
        raise UnsupportedError(
            "use_liger_kernel=True under tensor parallelism is not supported: Liger's fused cross entropy reads lm_head.weight, "
            "which is sharded. Use use_liger_kernel=False, liger_kernel_config={'fused_linear_cross_entropy': False} or "
            "tp_size=1."
        )


def _refuse_loading_packed(*_: Any) -> None:
    raise UnsupportedError(
        "loading a checkpoint into a tensor-parallel model with packed projections (fused expert weights) is not available "
        "yet: torch would cut the weights in the wrong places. Load the weights before accelerator.prepare, or resume with "
        "tp_size=1."
    )
