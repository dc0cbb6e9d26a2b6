"""One model on its way through the steps of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..context_parallel.models import Suitable
from ..core.mesh import MeshAxes
from ..core.model_structure import ModelStructure
from ..core.sharding_spec import PLAN_SOURCES, Plan, ShardingSpec
from ..fsdp.options import ShardingOptions
from ..loading.fill import PendingValues
from ..tensor_parallel.apply import TensorParallelState

#: Forms in which a tensor-parallel plan can be given; see ``AutoParallelismConfig.tp_plan``.
GivenPlan = str | Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None


@dataclass
class ParallelizeContext:
    """One model on its way through the steps.

    Attributes:
        model: the model, changed in place; a strategy may also put another object here, which is then used instead.
        mesh: root mesh with an axis to shard over, and further ones.
        device: where this rank computes.
        options: behaviour of FSDP2.
        axes: what the axes of ``mesh`` are called.
        tp_plan: explicit tensor-parallel plan, or None.
        plan_order: sources of plans to try without an explicit one.
        sequence_parallel: shard activations between the boundaries along the sequence.
        sequence_parallel_regather: gather the inputs of attention and MLP again in backward, instead of keeping them
        whole.
        loss_parallel: keep logits sharded over the vocabulary; None: where that is possible.
        loss_chunk_size: rows whose logits the loss has in float32 at a time; None: the loss decides.
        async_tensor_parallel: overlap the collectives of tensor parallelism with matrix products.
        layer_classes: class names of the layers if the user gave them.
        load_on_rank_zero: only rank 0 holds the weights (``cpu_ram_efficient_loading``).
        sharded_checkpoints: training checkpoints will be written by each rank for itself (``SHARDED_STATE_DICT``).
        checkpointing: "none", "full", "submodule" or "selective".
        compile_options: options of ``torch.compile`` for the layers, None for eager.
        offload_activations: keep the inputs of checkpointed layers on the CPU between forward and backward.
        context_parallel: forwards inside of ``accelerator.maybe_context_parallel`` see parts of sequences.
        pending: values that are still in files, and read when the model is sharded; None: the model is in memory.
        sums_after_backward: nobody else sums partial gradients before clipping and stepping, so each backward does.
        plan, spec, structure, cross_module_reads, suitable, tensor_parallel: results of the steps.
    """

    model: nn.Module
    mesh: DeviceMesh
    device: torch.device
    options: ShardingOptions = field(default_factory=ShardingOptions)
    axes: MeshAxes = field(default_factory=MeshAxes)
    tp_plan: GivenPlan = None
    plan_order: tuple[str, ...] = PLAN_SOURCES
    sequence_parallel: bool = False
    sequence_parallel_regather: bool = False
    loss_parallel: bool | None = None
    loss_chunk_size: int | None = None
    async_tensor_parallel: bool = False
    layer_classes: list[str] | None = None
    load_on_rank_zero: bool = False
    sharded_checkpoints: bool = False
    checkpointing: str = "none"
    compile_options: dict[str, Any] | None = None
    offload_activations: bool = False
    context_parallel: bool = False
    sums_after_backward: bool = False
    pending: PendingValues | None = None
    plan: Plan | None = None
    spec: ShardingSpec | None = None
    structure: ModelStructure | None = None
    cross_module_reads: dict[str, list[str]] = field(default_factory=dict)
    suitable: Suitable | None = None
    tensor_parallel: TensorParallelState | None = None

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """The tp axis, None when it has one rank."""
        return self.axes.tensor_parallel(self.mesh)

    @property
    def cp_mesh(self) -> DeviceMesh | None:
        """The cp axis, None when it has one rank or the sequences are somebody else's business."""
        return self.axes.context_parallel(self.mesh) if self.context_parallel else None

    @property
    def dp_mesh(self) -> DeviceMesh:
        """The axes that FSDP2 works on."""
        return self.axes.data_parallel(self.mesh)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold this model; None means all."""
        return self.axes.holders(self.mesh)

    @property
    def choices(self) -> dict[str, object]:
        """What decides, beside model and plan, which collectives run: whoever asked for it (config, plugins,
        environment).
        """
        options, policy = self.options, self.options.mp_policy
        return {
            "reshard_after_forward": options.reshard_after_forward,
            "forward_prefetch": options.forward_prefetch,
            "backward_prefetch": options.backward_prefetch,
            "towers": options.towers or "root",
            "min_num_params": options.minimum_unit_size,
            "transformer_cls_names_to_wrap": sorted(self.layer_classes or []),
            "param_dtype": policy.param_dtype,
            "reduce_dtype": policy.reduce_dtype,
            "activation_checkpointing": self.checkpointing,
            "compile": self.compile_options is not None,
            "async_tensor_parallel": self.async_tensor_parallel,
        }
