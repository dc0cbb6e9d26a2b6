"""``ParallelizeContext``: one model, its options, and the results of the steps of a strategy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..context_parallel.models import Suitable
from ..core.mesh import MeshAxes
from ..core.model_structure import ModelStructure
from ..core.model_view import ModelView
from ..core.option_fields import compared_values
from ..core.options import ParallelOptions
from ..core.sharding_spec import Plan, ShardingSpec
from ..fsdp.options import ShardingOptions
from ..fsdp.replicas import ReplicaGradients
from ..loading.fill import PendingValues
from ..tensor_parallel.apply import TensorParallelState


@dataclass
class ParallelizeContext:
    """One model on its way through the steps of a strategy.

    Attributes:
        model: the model, changed in place; a strategy may replace it by another object, which is then returned.
        mesh: root mesh with an axis to shard over, and further ones.
        device: device of this rank.
        options: the user's options, frozen.
        fsdp: behaviour of FSDP2 on this model, combined from the options, the ``fsdp_plugin`` and ``mixed_precision``.
        axes: names of the axes of ``mesh``.
        layer_classes: class names of the layers, if the user gave them.
        load_on_rank_zero: only rank 0 has the weights (``cpu_ram_efficient_loading``).
        sharded_checkpoints: each rank writes its own shards of a training checkpoint (``SHARDED_STATE_DICT``).
        checkpointing: "none", "full", "submodule" or "selective", combined from options, plugin and model.
        compile_options: options of ``torch.compile`` for the layers, None for eager.
        offload_activations: keep the inputs of checkpointed layers on the CPU between forward and backward.
        context_parallel: this package shards sequences over cp, in ``accelerator.maybe_context_parallel``.
        sums_after_backward: reduce ``Partial`` gradients at the end of each backward, because there is no Accelerator
            that would do so before clipping and stepping.
        pending: values that are still in files, and are read after sharding; None: the model is in memory.
        plan, spec, structure, cross_module_reads, suitable, tensor_parallel, replicas: results of the steps.
    """

    model: nn.Module
    mesh: DeviceMesh
    device: torch.device
    options: ParallelOptions = field(default_factory=ParallelOptions)
    fsdp: ShardingOptions = field(default_factory=ShardingOptions)
    axes: MeshAxes = field(default_factory=MeshAxes)
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
    replicas: ReplicaGradients | None = None

    @cached_property
    def view(self) -> ModelView:
        """The names of the model, computed once for planning. Not for later steps: sharding replaces parameters."""
        return ModelView(self.model)

    def look_again(self) -> None:
        """Compute :attr:`view` again when it is next asked for, because modules have been replaced."""
        vars(self).pop("view", None)

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """The tp axis, None when it has one rank."""
        return self.axes.tensor_parallel(self.mesh)

    @property
    def cp_mesh(self) -> DeviceMesh | None:
        """The cp axis, None when it has one rank, or when the caller shards sequences itself."""
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
        """The options that decide which collectives run, for the comparison of the ranks. An option that plugins or
        environment can set as well has its combined value.
        """
        return {
            **compared_values(self.options),
            "reshard_after_forward": self.fsdp.reshard_after_forward,
            "forward_prefetch": self.fsdp.forward_prefetch,
            "backward_prefetch": self.fsdp.backward_prefetch,
            "towers": self.fsdp.towers or "root",
            "min_num_params": self.fsdp.minimum_unit_size,
            "transformer_cls_names_to_wrap": sorted(self.layer_classes or []),
            "param_dtype": self.fsdp.mp_policy.param_dtype,
            "reduce_dtype": self.fsdp.mp_policy.reduce_dtype,
            "activation_checkpointing": self.checkpointing,
            "compile": self.compile_options is not None,
        }
