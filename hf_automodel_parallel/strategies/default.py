"""The default strategy: it has the order of the steps; a family overrides the step in which it differs."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy

from .. import compat
from ..activation_checkpointing import (
    FULL,
    checkpoint_module,
    checkpointable_parts,
    layer_policy,
    mode_of_argument,
    shares_keys_and_values,
    switch_cache_off,
)
from ..compile import compile_layers
from ..context_parallel import forward as context_parallel
from ..context_parallel.models import check_model as check_for_context_parallel
from ..core.consistency import check_same_structure, equalize_parameters, synchronize_rng
from ..core.mesh import MeshAxes
from ..core.model_structure import find_structure
from ..core.model_view import ModelView
from ..core.option_fields import meaning_of
from ..core.options import GivenPlan, ParallelOptions
from ..core.output import DETAILS, tell
from ..core.packed_weights import check_shards, shown_unpacked
from ..core.ranks import raise_on_all_ranks
from ..errors import ConfigError, PrepareError, UnsupportedError, not_available_yet
from ..fsdp.adapter_placement import adapters_over_dp
from ..fsdp.dtype_groups import install_param_groups, own_dtype_parameters
from ..fsdp.encoder_placement import placement, replicated_parameters
from ..fsdp.float32_losses import float32_losses
from ..fsdp.options import ShardingOptions, on_device, without_pinning
from ..fsdp.quantized import check_quantized, keep_layout
from ..fsdp.replicas import scalar_parameters
from ..fsdp.shard import check_packed_parameters, shard_data_parallel, wanted_units, without_units_inside
from ..fsdp.unsupported_models import (
    keep_layers_together,
    refuse_layer_drop,
    refuse_other_layouts,
    refuse_own_backward,
    refuse_sparse_gradients,
)
from ..loading.fill import PendingValues
from ..peft.late_adapters import adding
from ..peft.operations import check_trainable_as_shards, manage_adapters
from ..plan.analysis.cross_module_reads import check_cross_module_reads, cross_module_reads
from ..plan.analysis.sequence_parallel import derive, refuse_kept_activations, regather
from ..plan.analysis.skipped_layers import skipped_without_images
from ..plan.analysis.varying_check import complete
from ..plan.describe import plan_lines
from ..plan.hook_views import check_hooks
from ..plan.layer_kinds import check_peft_method
from ..plan.loss_parallel import keep_logits_sharded
from ..plan.resolve import resolve
from ..plan.select import select_plan
from ..plan.torch_styles import check_sequence_layouts
from ..plan.validate import refuse_expert_parallel, validate
from ..plan_search.proof import proven_plan
from ..plan_search.proxy_model import replaced_modules
from ..plan_search.search import derived_plan
from ..tensor_parallel.apply import apply_tensor_parallel, install_local_parameters
from ..tensor_parallel.async_tp import check_async_tensor_parallel, with_async_tensor_parallel
from ..tensor_parallel.dropout_rng import (
    draws_random_numbers,
    install_sharded_dropout,
    install_tp_rng,
    refuse_compiled_dropout,
    synchronize_at_first_forward,
)
from ..tensor_parallel.full_parameter_view import install_full_parameter_views
from ..tensor_parallel.vocab_parallel.fused_head import keep_fused_head_sharded
from .base import ParallelizationStrategy, materialize_empty, refuse_meta, refuse_sharded
from .context import ParallelizeContext
from .replicated import compute_dtypes, join_axes_of_replicas, make_replicas_local

logger = logging.getLogger(__name__)


class DefaultParallelizationStrategy(ParallelizationStrategy):
    """The steps for every Hugging Face model whose family has no strategy of its own.

    :meth:`plan` decides and raises all user errors; it runs no collective and changes nothing. An error of one rank is
    raised on all, then :meth:`compare_ranks` compares the ranks' plans. :meth:`carry_out` changes the model; read it
    first.
    """

    #: Order of the plan sources in :meth:`parallelize`, as in the reference API; ``Accelerator.prepare`` has its own.
    plan_order = ("registry", "hf", "default")

    #: Dtypes of :meth:`parallelize` if no policy is given, as in the reference API.
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

        Create the optimizer afterwards, from ``model.parameters()``. Partial gradients of replicated parameters are
        summed at the end of each backward, so clipping and stepping need nothing special.

        Args:
            model: on the CPU, the device, or meta (then ``model.to_empty(device=...)`` and a checkpoint fill it).
            device_mesh: root mesh with the axes named below; ``pp`` may be one of them.
            mp_policy: dtypes of FSDP2; None: parameters in bfloat16, reduction and output in float32.
            offload_policy: offload policy of FSDP2; None: shards stay on the device.
            sequence_parallel: shard activations along the sequence between attention and MLP blocks.
            activation_checkpointing: False, True (entire layers), "submodule" or "selective".
            tp_shard_plan: explicit plan in any form of ``AutoParallelismConfig.tp_plan``.
            dp_replicate_mesh_name: axis of replicas, used if it has more than one rank.
            dp_shard_cp_mesh_name: axis that FSDP2 shards over.
            tp_mesh_name: axis of tensor parallelism.
            enable_async_tensor_parallel: overlap tensor-parallel collectives with matrix products.
            enable_compile: compile each layer in place.
            enable_fsdp2_prefetch: False switches both prefetch depths off.
            fsdp2_backward_prefetch_depth: FSDP units to all-gather ahead in backward.
            fsdp2_forward_prefetch_depth: FSDP units to all-gather ahead in forward.
            reshard_after_forward: reshard layers after their forward; None: yes, except under pipeline parallelism,
                which would all-gather them again for each micro-batch.
            fully_shard_fn: called in place of ``torch.distributed.fsdp.fully_shard``, with its arguments.

        Raises:
            AutoParallelError: an argument is not supported; on all ranks, before anything is changed.
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
        fsdp = ShardingOptions(
            mp_policy=mp_policy or self.mp_policy,
            offload_policy=without_pinning(offload_policy or OffloadPolicy(), device),
            reshard_after_forward=reshard_after_forward and dp_mesh.size(dp_mesh.ndim - 1) > 1,
            forward_prefetch=fsdp2_forward_prefetch_depth if enable_fsdp2_prefetch else 0,
            backward_prefetch=fsdp2_backward_prefetch_depth if enable_fsdp2_prefetch else 0,
            fully_shard_fn=fully_shard_fn,
        )
        fsdp.own_dtype = frozenset(own_dtype_parameters(model, fsdp.mp_policy.param_dtype))
        pending = PendingValues(model)
        context = ParallelizeContext(
            model=model,
            mesh=device_mesh,
            device=device,
            options=ParallelOptions(
                tp_plan=tp_shard_plan,
                plan_order=self.plan_order,
                sequence_parallel=sequence_parallel,
                async_tensor_parallel=enable_async_tensor_parallel,
                adapters_over_dp="sharded",  # their gradients are reduced by FSDP2, whatever steps the optimizer
            ),
            fsdp=fsdp,
            axes=axes,
            pending=pending,
            checkpointing=mode_of_argument(activation_checkpointing),
            compile_options={} if enable_compile else None,
            sums_after_backward=True,
        )
        with pending:
            with raise_on_all_ranks(f"{type(self).__name__}.parallelize", context.group):
                pending.begin()
                self.plan(context)
            self.compare_ranks(context)
            pending.keep()
            self.carry_out(context)
        manage_adapters(
            model,
            context.tensor_parallel,
            on_unload=lambda plain: None,
            add=lambda original: adding(model, context, original, done=lambda: None),
        )
        return context.model

    # ---- plan: no collective, no change --------------------------------------------------------------------------

    def plan(self, context: ParallelizeContext) -> None:
        """Decide everything; raise at the first option that is not supported for this model."""
        self.check_model(context)
        context.structure = find_structure(context.view, context.layer_classes)
        refuse_other_layouts([context.model, *context.structure.layers])
        refuse_own_backward(context.view.inner, context.structure.layers)
        refuse_sparse_gradients(context.model)
        context.cross_module_reads = cross_module_reads(context.model, context.structure.layers)
        context.fsdp.read_by_other_modules = frozenset(
            name for names in context.cross_module_reads.values() for name in names
        )
        context.fsdp.towers = placement(context.model, context.structure, context.fsdp, context.layer_classes)
        asked = meaning_of(context.options, "adapters_over_dp")
        context.fsdp.replicated_adapters = adapters_over_dp(
            context.model, context.structure, context.fsdp, asked, context.dp_mesh.size()
        )
        if context.dp_mesh.size() > 1:
            if context.structure.towers:
                skipped = skipped_without_images(context.model, context.structure.main_layers)
                context.structure = dataclasses.replace(context.structure, skipped=skipped)
            # An FSDP unit must run on all ranks or on none: its all-gather is a collective.
            refuse_layer_drop(context.model, wanted_units(context.structure, context.fsdp))
        if context.options.async_tensor_parallel:
            check_async_tensor_parallel(
                context.tp_mesh, context.options.sequence_parallel, context.compile_options, context.device
            )
        if context.cp_mesh is not None:
            context.suitable = check_for_context_parallel(
                context.view, context.structure, context.cp_mesh.size(), context.options.sequence_parallel
            )
        if context.tp_mesh is not None:
            with shown_unpacked(context.model) as packed:
                if packed:
                    context.look_again()
                self.select_tensor_parallel(context)
            if packed:
                context.look_again()
                if context.compile_options is not None:
                    raise not_available_yet(
                        "compile",
                        True,
                        "Layers with 4-bit weights under tensor parallelism have not been compared with one process "
                        "when they are compiled: use compile=False, or tp_size=1.",
                    )
                check_shards(context.model, context.spec, context.tp_mesh.size())  # type: ignore[arg-type]

    def check_planned(self, context: ParallelizeContext) -> None:
        """Raise if an overridden step has left out what later steps need: a forgotten call of ``super()``."""
        for step, field, needed in (
            ("plan", "structure", True),
            ("select_tensor_parallel", "spec", context.tp_mesh is not None),
        ):
            if needed and getattr(context, field) is None:
                raise PrepareError(
                    f"{type(self).__name__}.plan has not set context.{field}, which the steps after it need. If it "
                    f"overrides {step}, call super().{step}(context) there."
                )

    def check_carried_out(self, context: ParallelizeContext) -> None:
        """Raise if the model has not been sharded after :meth:`carry_out`: a forgotten call of ``super()``."""
        for step, done in (
            ("apply_tensor_parallel", context.tp_mesh is None or context.tensor_parallel is not None),
            ("apply_data_parallel", isinstance(context.model, FSDPModule)),
        ):
            if not done:
                raise PrepareError(
                    f"{type(self).__name__} has not sharded the model: {step} had no effect. If it overrides carry_out "
                    f"or {step}, call super() there, or do what DefaultParallelizationStrategy.{step} does."
                )

    def check_model(self, context: ParallelizeContext) -> None:
        """Refuse models that FSDP2 or tensor parallelism cannot shard."""
        refuse_sharded(context.model)
        if context.tp_mesh is not None and [name for name, _ in context.model.named_children()] == ["_orig_mod"]:
            raise PrepareError(
                "the model was compiled by torch.compile before prepare, so the graph would be that of the unsharded "
                "model. Pass the model itself and set AutoParallelismConfig(compile=True), or compile what prepare "
                "returns."
            )
        refuse_expert_parallel(context.model)
        check_trainable_as_shards(context.model)
        check_quantized(
            context.model, context.fsdp.mp_policy.param_dtype, context.tp_mesh is not None, context.load_on_rank_zero
        )
        if context.tp_mesh is not None:
            refuse_fused_loss(context.model)
        if not context.sums_after_backward:  # without an Accelerator the model is filled afterwards
            refuse_meta(context)

    def sources(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The plan sources of this family, in order; ``asked`` are those of the config."""
        return asked

    def select_tensor_parallel(self, context: ParallelizeContext) -> None:
        """Choose the tensor-parallel plan and resolve it on the model."""
        check_peft_method(context.model)
        size = context.tp_mesh.size()  # type: ignore[union-attr]
        context.plan = select_plan(
            context.view,
            context.options.tp_plan,
            self.sources(context.options.plan_order),
            size,
            derived_plan,
            proven_plan,
        )
        check_sequence_layouts(context.plan, context.options.sequence_parallel)
        context.spec = resolve(context.view, context.plan, size)
        validate(context.view, context.spec, size)
        layers = context.structure.layers  # type: ignore[union-attr]
        # A derived plan has been verified against one process, but only for the modules that the class itself builds.
        if context.plan.origin != "derived" or replaced_modules(context.view):
            complete(context.view, context.spec, layers, size, context.plan.strict)
        check_cross_module_reads(context.spec, context.cross_module_reads)
        if context.options.sequence_parallel:
            derive(context.view, context.spec, layers)
            refuse_kept_activations(context.plan, context.spec)
        if context.options.sequence_parallel_regather:
            regather(context.view, context.spec, context.checkpointing)
        check_hooks(context.view, context.spec, size)
        keep_logits_sharded(context.view, context.spec, context.options.loss_parallel, context.options.loss_chunk_size)
        if context.compile_options is not None:
            refuse_compiled_dropout(context.model, context.spec)
        # DTensor cannot shard a packed dimension a second time, so FSDP2 needs another dimension of these.
        shapes = {name: p.shape for name, p in context.model.named_parameters()}
        check_packed_parameters(shapes, context.spec, context.dp_mesh.size(-1))
        if context.fsdp.ignored_parameters:
            raise UnsupportedError(
                "ignored_modules of the fsdp_plugin cannot be combined with tensor parallelism yet: every parameter "
                "needs a place on the tp axis. Remove ignored_modules or use tp_size=1."
            )

    # ---- apply: the same steps on every rank ---------------------------------------------------------------------

    def compare_ranks(self, context: ParallelizeContext) -> None:
        """Raise on all ranks unless all hold the same model and planned the same."""
        check_same_structure(context.model, context.spec, context.group, context.choices)
        if context.pending is not None:
            context.pending.compare_ranks(context.group)

    def carry_out(self, context: ParallelizeContext) -> None:
        """Parallelise the model in place. The comments give the reason for the position of each step.

        Every rank takes the same steps. A family may override a step, but not the order.
        """
        # Values first: later steps move and shard them.
        self.load_values(context)
        # Before sharding, after which ranks hold different shards and cannot be compared any more.
        equalize_parameters(context.model, context.group)
        # Before the first forward, in which bitsandbytes may convert the layout of quantised weights.
        keep_layout(context.model)
        # Before any random number is drawn. cp before tp, so that all ranks with the same batch get the random state of
        # the first of them.
        for mesh in (context.cp_mesh, context.tp_mesh):
            if mesh is not None:
                synchronize_rng(mesh)
        # Before FSDP2, which shards the tp-local tensor again and all-gathers over its own axis only.
        if context.tp_mesh is not None:
            self.apply_tensor_parallel(context)
        # After TP, whose DTensors it shards; before the forwards of the layers are wrapped, which needs the FSDP units.
        self.apply_data_parallel(context)
        # After TP and FSDP2, because only now the slices of the files that this rank reads are known.
        self.read_values(context)
        # After TP and FSDP2, so that its hooks on the model are the last to run before the forward.
        self.apply_context_parallel(context)
        # After FSDP2, whose extra param groups are called around the forwards; with checkpointing and compile.
        self.finish_layers(context)
        self.report(context)

    def load_values(self, context: ParallelizeContext) -> None:
        """Give ranks without weights empty tensors, and read the parameters that FSDP2 will not shard."""
        if context.load_on_rank_zero:
            materialize_empty(context.model, context.pending)
        if context.pending is not None:
            replicated = replicated_parameters(context.structure, context.fsdp)  # type: ignore[arg-type]
            scalars = set(scalar_parameters(context.model).values())
            unmanaged = context.fsdp.ignored_parameters | replicated | scalars
            ignored = [name for name, p in context.model.named_parameters() if p in unmanaged]
            context.pending.fill_ignored(
                context.model,
                [name for name in ignored if name in context.pending.values],
                context.device,
                context.fsdp.ignored_parameters,
            )

    def apply_tensor_parallel(self, context: ParallelizeContext) -> None:
        """Make parameters DTensors on the tp axis, register input and output hooks, and set up random numbers."""
        context.tensor_parallel = apply_tensor_parallel(
            context.model,
            context.spec,  # type: ignore[arg-type]
            context.tp_mesh,  # type: ignore[arg-type]
            context.device,
        )
        partial = context.tensor_parallel.partial
        # With an Accelerator for loops that call loss.backward() themselves; accelerator.backward defers the sum.
        # megatron-fsdp completes its gradients later than the backward.
        partial.sums_after_backward = context.sums_after_backward or context.options.backend != "megatron_fsdp"
        partial.resolves = context.sums_after_backward
        if context.options.loss_parallel is not False:
            rows = context.options.loss_chunk_size
            keep_fused_head_sharded(context.model, context.tp_mesh, rows)  # type: ignore[arg-type]
        install_sharded_dropout(context.model, context.spec, context.tp_mesh)  # type: ignore[arg-type]
        if draws_random_numbers(context.model):
            # A compiled layer cannot switch the random state; refuse_compiled_dropout refuses layers that need it.
            if context.compile_options is None:
                numbers = install_tp_rng(
                    context.model,
                    context.spec,  # type: ignore[arg-type]
                    context.tp_mesh,  # type: ignore[arg-type]
                    context.device,
                    context.tensor_parallel.hook,
                )
                if context.tensor_parallel.sequence is not None:
                    context.tensor_parallel.sequence.numbers = numbers
                if context.tensor_parallel.user_hooks is not None:
                    context.tensor_parallel.user_hooks.numbers = numbers
            synchronize_at_first_forward(context.model, context.tp_mesh)  # type: ignore[arg-type]

    def apply_data_parallel(self, context: ParallelizeContext) -> None:
        """Apply FSDP2 or HSDP; with tensor parallelism alone, only where FSDP2 casts or offloads."""
        if context.dp_mesh.size() > 1:
            keep_layers_together(context.model, wanted_units(context.structure, context.fsdp))  # type: ignore[arg-type]
        context.replicas = shard_data_parallel(
            context.model,
            context.structure,  # type: ignore[arg-type]
            context.dp_mesh,
            context.fsdp,
        )
        join_axes_of_replicas(context)
        # After the hooks of tensor parallelism on the head, whose sharded logits are upcast where they are used.
        float32_losses(context.model, context.structure, context.fsdp, context.device)  # type: ignore[arg-type]
        if context.tp_mesh is not None:
            compat.mark_packed_placements(context.model.parameters())

    def read_values(self, context: ParallelizeContext) -> None:
        """Read this rank's shards of the parameters whose values are still in files."""
        if context.pending is None:
            return
        context.pending.fill(context.model, context.fsdp.shard_device(context.device), context.group)
        if context.tp_mesh is not None:
            compat.mark_packed_placements(context.model.parameters())

    def apply_context_parallel(self, context: ParallelizeContext) -> None:
        """Shard sequences over the cp axis, and all-gather keys and values in attention."""
        if context.cp_mesh is None:
            return
        if draws_random_numbers(context.model):
            synchronize_at_first_forward(context.model, context.cp_mesh)
        suitable: Any = context.suitable
        context_parallel.install(context.model, suitable, context.cp_mesh, context.device)

    def finish_layers(self, context: ParallelizeContext) -> None:
        """Wrap the forwards of the layers: local parameters, checkpoints, compile, extra FSDP param groups.

        :class:`~hf_automodel_parallel.core.forward_stack.ForwardSlot` says how they nest, and why.
        """
        layers, mode = without_units_inside(context.structure.layers), context.checkpointing  # type: ignore[union-attr]
        compiled = context.compile_options is not None
        policy = layer_policy(mode, context.options.sequence_parallel_regather, compiled)
        inner = ModelView.of(context.model).inner
        parts: dict[nn.Module, list[nn.Module]] = {}
        if mode == "submodule":
            shares = shares_keys_and_values(inner)
            parts = {layer: checkpointable_parts(layer, shares) for layer in layers}
        # Scopes before compile, which needs them, and before the full-parameter views.
        if context.tensor_parallel is not None:
            context.tensor_parallel.compute_dtypes = compute_dtypes(context)
            # torch would cut a full packed weight into contiguous chunks, but each rank has a slice of every block.
            if context.spec is not None and context.spec.packed():
                context.model.register_load_state_dict_pre_hook(_refuse_loading_packed)
            install_local_parameters(context.model, layers, context.tensor_parallel, parts)
            install_full_parameter_views(context.model, context.cross_module_reads)
        else:
            make_replicas_local(context, layers, [part for group in parts.values() for part in group])
        # Checkpoints of parts are compiled with the layer.
        for part in (part for group in parts.values() for part in group):
            checkpoint_module(part)
        # A selective checkpoint of a compiled layer is part of its graph; every other one is around the layer.
        if compiled:
            options = context.compile_options or {}
            if context.options.async_tensor_parallel:
                options = with_async_tensor_parallel(options, context.tp_mesh.get_group())  # type: ignore[union-attr]
            tell(logger, f"{len(layers)} layers are compiled in their first forward and backward, which takes a while")
            compile_layers(layers, policy, mode == "submodule", **options)
        if policy is not None and (policy is FULL or not compiled):
            for layer in layers:
                checkpoint_module(layer, policy, offload=context.offload_activations)
        install_param_groups(context.model)
        if mode != "none":
            switch_cache_off(inner)

    def report(self, context: ParallelizeContext) -> None:
        """A line per decision, on rank 0, at the verbosity for details."""
        shape = ", ".join(
            f"{n}={s}" for n, s in zip(context.mesh.mesh_dim_names or (), context.mesh.shape, strict=True)
        )
        layers = context.structure.layers  # type: ignore[union-attr]
        tell(logger, f"axes: {shape}; {len(layers)} layers", DETAILS)
        if context.plan is not None and context.spec is not None:
            for line in plan_lines(context.plan, context.spec):
                tell(logger, line, DETAILS)


def check_arguments(depths: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` for a depth that is not a non-negative integer, or a flag that is not a bool."""
    for name, depth in depths.items():
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise ConfigError(f"{name}={depth!r}: give the number of layers to gather ahead, 0 or more.")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"{name}={flag!r}: give True or False.")


def refuse_fused_loss(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if Liger has replaced the model's forward by one with a fused loss.

    Liger's kernel reads ``lm_head.weight`` outside of the output projection's forward. There it is a DTensor under
    tensor parallelism.
    """
    inner = ModelView.of(model).inner
    if str(getattr(inner.forward, "__module__", "")).startswith("liger_kernel"):
        raise UnsupportedError(
            "use_liger_kernel=True under tensor parallelism is not supported: Liger's fused cross entropy reads "
            "lm_head.weight, which is sharded. Use use_liger_kernel=False, "
            "liger_kernel_config={'fused_linear_cross_entropy': False} or tp_size=1."
        )


def _refuse_loading_packed(*_: Any) -> None:
    raise UnsupportedError(
        "loading a checkpoint into a tensor-parallel model with packed projections (fused expert weights) is not "
        "available yet: torch would cut the weights in the wrong places. Load the weights before accelerator.prepare, "
        "or resume with tp_size=1."
    )
