"""The default strategy: it owns the order of the steps; a family overrides the one step in which it differs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import compat
from ..activation_checkpointing import (
    checkpoint_module,
    checkpointable_parts,
    shares_keys_and_values,
    switch_cache_off,
)
from ..adapters import check_trainable_as_shards
from ..compile import compile_layers
from ..config import AutoParallelismConfig
from ..errors import PrepareError, UnsupportedError, not_available_yet
from ..fsdp import (
    ShardingOptions,
    check_packed_parameters,
    data_parallel_mesh,
    shard_data_parallel,
    without_units_inside,
)
from ..fsdp_dtypes import install_companions
from ..layers import Anatomy, dissect
from ..plan.explain import plan_lines
from ..plan.layers import check_peft_method
from ..plan.names import unwrapped
from ..plan.resolve import resolve
from ..plan.selection import select_plan
from ..plan.spec import Plan, ShardingSpec
from ..plan.torch_styles import check_sequence_layouts
from ..plan.validate import validate
from ..quantization import check_quantized, keep_layout
from ..synchronize import check_same_structure, equalize_parameters, synchronize_rng
from ..tensor_parallel.apply import TensorParallelState, apply_tensor_parallel, install_regions
from ..tensor_parallel.random import (
    draws_random_numbers,
    install_own_numbers,
    install_sharded_dropout,
    refuse_compiled_dropout,
    synchronize_at_first_forward,
)

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One model on its way through the steps.

    Attributes:
        model: the model, changed in place.
        config: the user's config.
        mesh: root mesh with axes (dp_replicate,) dp_shard (, tp).
        device: where this rank computes.
        options: behaviour of FSDP2.
        layer_classes: class names of the layers if the user gave them.
        load_on_rank_zero: only rank 0 holds the weights (``cpu_ram_efficient_loading``).
        sharded_checkpoints: training checkpoints will be written by each rank for itself (``SHARDED_STATE_DICT``).
        checkpointing: "none", "full", "submodule" or "selective".
        compile_options: options of ``torch.compile`` for the layers, None for eager.
        offload_activations: keep the inputs of checkpointed layers on the CPU between forward and backward.
        plan, spec, anatomy, tensor_parallel: results of the steps.
    """

    model: nn.Module
    config: AutoParallelismConfig
    mesh: DeviceMesh
    device: torch.device
    options: ShardingOptions
    layer_classes: list[str] | None = None
    load_on_rank_zero: bool = False
    sharded_checkpoints: bool = False
    checkpointing: str = "none"
    compile_options: dict[str, Any] | None = None
    offload_activations: bool = False
    plan: Plan | None = None
    spec: ShardingSpec | None = None
    anatomy: Anatomy | None = None
    tensor_parallel: TensorParallelState | None = None

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """The tp axis, None when it has one rank."""
        return self.mesh["tp"] if "tp" in (self.mesh.mesh_dim_names or ()) else None

    @property
    def dp_mesh(self) -> DeviceMesh:
        """The axes that FSDP2 works on."""
        return data_parallel_mesh(self.mesh)


class DefaultStrategy:
    """The flow for every Hugging Face model without one of its own.

    :meth:`plan` only reads and raises everything a user can have got wrong; :meth:`carry_out` changes the model. Between
    the two the ranks agree that nobody failed, so an error on one of them is an error on all.
    """

    # ---- deciding: no collective, no change ----------------------------------------------------------------------

    def plan(self, job: Job) -> None:
        """Select, resolve and validate everything; raises on the first thing that cannot be honoured."""
        self.check_model(job)
        job.anatomy = dissect(job.model, job.layer_classes)
        if job.tp_mesh is not None:
            self.select_tensor_parallel(job)

    def check_model(self, job: Job) -> None:
        """Refuse models that cannot be sharded from here."""
        refuse_sharded(job.model)
        check_trainable_as_shards(job.model)
        check_quantized(job.model, job.options.mp_policy.param_dtype, job.tp_mesh is not None, job.load_on_rank_zero)
        scalars = [name for name, p in job.model.named_parameters() if p.ndim == 0]
        if scalars:
            raise UnsupportedError(
                f"{', '.join(scalars[:4])}: FSDP2 cannot shard parameters without dimensions. Give them the shape (1,)."
            )
        if job.tp_mesh is not None:
            refuse_fused_loss(job.model)
        meta = [name for name, p in job.model.named_parameters() if p.device.type == "meta"]
        if meta and not job.load_on_rank_zero:
            raise not_available_yet(
                "device", "meta", f"{len(meta)} parameters have no values ({meta[0]}, ...); load the model on the CPU."
            )

    def select_tensor_parallel(self, job: Job) -> None:
        """Choose the plan and resolve it on the model."""
        check_peft_method(job.model)
        size = job.tp_mesh.size()  # type: ignore[union-attr]
        job.plan = select_plan(job.model, job.config.tp_plan, job.config.plan_order)
        check_sequence_layouts(job.plan, job.config.sequence_parallel)
        job.spec = resolve(job.model, job.plan, size)
        validate(job.model, job.spec, size)
        if job.compile_options is not None:
            refuse_compiled_dropout(job.model, job.spec)
        shapes = {name: p.shape for name, p in job.model.named_parameters()}
        check_packed_parameters(shapes, job.spec, job.config.dp_shard_size)
        packed = job.spec.packed()
        if packed and job.sharded_checkpoints:
            raise UnsupportedError(
                f"state_dict_type SHARDED_STATE_DICT cannot save {packed[0]} (and {len(packed) - 1} others) correctly: it packs "
                f"several projections, and torch.distributed.checkpoint takes each shard for one contiguous piece. Use "
                f"state_dict_type FULL_STATE_DICT."
            )
        if job.options.ignored_parameters:
            raise UnsupportedError(
                "ignored_modules of the fsdp_plugin cannot be combined with tensor parallelism yet: every parameter needs a "
                "place on the tp axis. Remove ignored_modules or use tp_size=1."
            )

    # ---- carrying out: the same steps on every rank --------------------------------------------------------------

    def compare_ranks(self, job: Job) -> None:
        """Raise on all ranks unless they hold the same model and planned the same."""
        check_same_structure(job.model, job.spec)

    def carry_out(self, job: Job) -> None:
        """Shard the model, in place, in the order tp -> FSDP2 -> regions."""
        self.load_values(job)
        equalize_parameters(job.model)
        keep_layout(job.model)
        if job.tp_mesh is not None:
            synchronize_rng(job.tp_mesh)
            self.apply_tensor_parallel(job)
        self.apply_data_parallel(job)
        self.finish_layers(job)
        self.report(job)

    def load_values(self, job: Job) -> None:
        """Give ranks without weights empty tensors; :func:`equalize_parameters` then fills them from rank 0."""
        if not job.load_on_rank_zero:
            return
        made: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # a tied tensor stays one; the old one keeps its id taken
        for module in job.model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is None or tensor.device.type != "meta":
                        continue
                    if id(tensor) not in made:
                        empty = torch.empty_like(tensor, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = (
                            tensor,
                            nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty,
                        )
                    store[name] = made[id(tensor)][1]
        tie_weights = getattr(job.model, "tie_weights", None)
        if callable(tie_weights):
            tie_weights()

    def apply_tensor_parallel(self, job: Job) -> None:
        """Turn parameters into DTensors on the tp axis and hook the boundaries in."""
        job.tensor_parallel = apply_tensor_parallel(job.model, job.spec, job.tp_mesh, job.device)  # type: ignore[arg-type]
        install_sharded_dropout(job.model, job.spec, job.tp_mesh)  # type: ignore[arg-type]
        if draws_random_numbers(job.model):
            if job.compile_options is None:
                install_own_numbers(job.model, job.spec, job.tp_mesh, job.device, job.tensor_parallel.hook)  # type: ignore[arg-type]
            synchronize_at_first_forward(job.model, job.tp_mesh)  # type: ignore[arg-type]

    def apply_data_parallel(self, job: Job) -> None:
        """Apply FSDP2 or HSDP; with tensor parallelism alone, on a ``dp_shard`` axis of one rank."""
        shard_data_parallel(job.model, job.anatomy, job.dp_mesh, job.options)  # type: ignore[arg-type]
        if job.tp_mesh is not None:
            compat.mark_packed_placements(job.model.parameters())

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
        if job.tensor_parallel is not None:
            if job.spec is not None and job.spec.packed():
                job.model.register_load_state_dict_pre_hook(_refuse_loading_packed)
            install_regions(job.model, layers, job.tensor_parallel, parts)
        for part in (part for group in parts.values() for part in group):
            checkpoint_module(part)
        if job.compile_options is not None:
            compile_layers(layers, mode, **job.compile_options)
        if mode == "full" or (mode == "selective" and job.compile_options is None):
            for layer in layers:
                checkpoint_module(layer, selective=mode == "selective", offload=job.offload_activations)
        install_companions(job.model)
        if mode != "none":
            switch_cache_off(inner)

    def report(self, job: Job) -> None:
        """One log line per decision, on rank 0."""
        if torch.distributed.get_rank() != 0:
            return
        shape = ", ".join(f"{n}={s}" for n, s in zip(job.mesh.mesh_dim_names or (), job.mesh.shape, strict=True))
        logger.info("mesh: %s; %d layers as FSDP2 units", shape, len(job.anatomy.layers))  # type: ignore[union-attr]
        if job.plan is not None and job.spec is not None:
            for line in plan_lines(job.plan, job.spec):
                logger.info("%s", line)


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


def refuse_sharded(model: nn.Module) -> None:
    """Raise :class:`PrepareError` if somebody else has sharded ``model`` already."""
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        by = "transformers' DistributedConfig" if getattr(model, "_device_mesh", None) is not None else "other code"
        raise PrepareError(
            f"the model is already sharded by {by} ({len(sharded)} DTensor parameters, for example {sharded[0]}). Load it "
            f"without distributed_config / tp_plan and let AutoParallelismConfig shard it, or train it without "
            f"AutoParallelismConfig."
        )


def _refuse_loading_packed(*_: Any) -> None:
    raise UnsupportedError(
        "loading a checkpoint into a tensor-parallel model with packed projections (fused expert weights) is not available "
        "yet: torch would cut the weights in the wrong places. Load the weights before accelerator.prepare, or resume with "
        "tp_size=1."
    )


def strategy_for(model: nn.Module) -> DefaultStrategy:
    """The strategy for ``model``."""
    return DefaultStrategy()
