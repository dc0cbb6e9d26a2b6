"""What a strategy is: the interface that families and third parties implement, and the job that the steps share."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from ..compile import compile_finished_layer
from ..core.consistency import check_same_structure, equalize_parameters
from ..core.model_structure import find_layers
from ..core.model_view import ModelView
from ..core.option_fields import options_of
from ..core.options import GivenPlan
from ..errors import PrepareError, UnsupportedError
from ..loading.fill import PendingValues
from ..optim.handoff import switch_parameters
from .context import ParallelizeContext


class ParallelizationStrategy(ABC):
    """How models of one family are parallelised. Subclass it and register the subclass with
    :func:`~hf_automodel_parallel.register_parallel_strategy`.

    A family that differs from the default in a step should subclass
    :class:`~hf_automodel_parallel.strategies.default.DefaultParallelizationStrategy` and override that step. A strategy
    with its own flow implements :meth:`parallelize` alone; ``Accelerator.prepare`` then compares the ranks before,
    calls it with what the user asked for, and hands the optimizer over to the sharded parameters after it.
    """

    @abstractmethod
    def parallelize(
        self,
        model: nn.Module,
        device_mesh: DeviceMesh,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: OffloadPolicy | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: bool = False,
        tp_shard_plan: GivenPlan = None,
        dp_replicate_mesh_name: str = "dp_replicate",
        dp_shard_cp_mesh_name: str = "dp_shard_cp",
        tp_mesh_name: str = "tp",
        **kwargs: Any,
    ) -> nn.Module:
        """Parallelise ``model`` and return it (or what replaces it); the root of the result is an ``FSDPModule``.

        Args:
            model: the model with equal values on all ranks.
            device_mesh: root mesh.
            mp_policy: dtypes of FSDP2; None means the strategy's default.
            offload_policy: FSDP2's, None to keep shards where they are.
            sequence_parallel: shard activations between the tensor-parallel boundaries along the sequence.
            activation_checkpointing: False, True (whole layers) or the name of a mode ("submodule", "selective").
            tp_shard_plan: explicit tensor-parallel plan in any form.
            dp_replicate_mesh_name: axis of replicas.
            dp_shard_cp_mesh_name: axis to shard over.
            tp_mesh_name: axis of tensor parallelism.
            kwargs: further options; one that cannot be honoured is refused, not ignored.
        """

    # ---- the steps that Accelerator.prepare takes ----------------------------------------------------------------

    def plan(self, context: ParallelizeContext) -> None:
        """Decide, and raise everything that a user can have got wrong. No collective, no change."""
        refuse_sharded(context.model)
        name = type(self).__name__
        asked = {
            "ignored_modules": bool(context.fsdp.ignored_parameters),
            "min_num_params": context.fsdp.minimum_unit_size is not None,
            "transformer_cls_names_to_wrap": context.layer_classes is not None,
            "activation_checkpointing_offload": context.offload_activations,
            "cp_size": context.cp_mesh is not None,
            "hf_automodel_parallel.from_pretrained": context.pending is not None and bool(context.pending.values),
        }
        for option in options_of(context.options):
            if option.by_strategy and option.argument is None:
                asked[option.name] = getattr(context.options, option.name) != option.default
        for field_name, given in asked.items():
            if given:
                raise UnsupportedError(
                    f"{field_name} cannot be honoured for {type(context.model).__name__}: it is parallelised by "
                    f"{name}, a strategy with a flow of its own that does not take it. Leave {field_name} out."
                )
        call_arguments(self.parallelize, self._asked_for(context), name)

    def compare_ranks(self, context: ParallelizeContext) -> None:
        """Raise on all ranks unless they hold the same model."""
        check_same_structure(context.model, context.spec, context.group, context.choices)

    def carry_out(self, context: ParallelizeContext) -> None:
        """Parallelise ``context.model``; the same collectives on every rank."""
        if context.load_on_rank_zero:
            materialize_empty(context.model)
        equalize_parameters(context.model, context.group)
        arguments = call_arguments(self.parallelize, self._asked_for(context), type(self).__name__)
        result = self.parallelize(context.model, context.mesh, **arguments)
        if not isinstance(result, FSDPModule):
            raise PrepareError(
                f"{type(self).__name__}.parallelize returned a {type(result).__name__} that FSDP2 does not manage. End "
                f"it with torch.distributed.fsdp.fully_shard(model, mesh=...) on the whole model, and return the model."
            )
        context.model = result
        if context.compile_options is not None:
            for layer in find_layers(ModelView.of(result).inner):
                compile_finished_layer(layer, context.compile_options)

    def switch_optimizer(
        self,
        context: ParallelizeContext,
        optimizer: torch.optim.Optimizer,
        names: list[list[str]],
        before: dict[str, nn.Parameter],
    ) -> None:
        """Let ``optimizer`` work on the sharded parameters: ``names[group][i]`` as they were called before sharding."""
        switch_parameters(optimizer, names, context.model, before)

    def _asked_for(self, context: ParallelizeContext) -> dict[str, tuple[Any, Any]]:
        """Argument of :meth:`parallelize` -> (value, the value that asks for nothing)."""
        fsdp = context.fsdp
        mode: Any = {"none": False, "full": True}.get(context.checkpointing, context.checkpointing)
        return {
            **{
                option.argument: (getattr(context.options, option.name), option.default)
                for option in options_of(context.options)
                if option.argument is not None
            },
            "mp_policy": (fsdp.mp_policy, MixedPrecisionPolicy()),
            "offload_policy": (None if type(fsdp.offload_policy) is OffloadPolicy else fsdp.offload_policy, None),
            "activation_checkpointing": (mode, False),
            "dp_replicate_mesh_name": (context.axes.replicate, "dp_replicate"),
            "dp_shard_cp_mesh_name": (context.axes.shard, "dp_shard_cp"),
            "tp_mesh_name": (context.axes.tp, "tp"),
            "enable_compile": (False, False),  # prepare compiles afterwards, with the user's backend and mode
            "fsdp2_backward_prefetch_depth": (fsdp.backward_prefetch, 2),
            "fsdp2_forward_prefetch_depth": (fsdp.forward_prefetch, 1),
            "reshard_after_forward": (fsdp.reshard_after_forward, fsdp.reshard_after_forward),
        }


def call_arguments(function: Callable[..., Any], asked: dict[str, tuple[Any, Any]], name: str) -> dict[str, Any]:
    """The keyword arguments to call ``function`` with.

    Args:
        function: a strategy's ``parallelize``; one without ``**kwargs`` gets what its signature names.
        asked: argument -> (value, the value that asks for nothing).
        name: of the strategy, for the message.

    Raises:
        UnsupportedError: something was asked for that ``function`` does not take.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {key: value for key, (value, _) in asked.items()}
    for key, (value, nothing) in asked.items():
        if key not in parameters and value != nothing:
            raise UnsupportedError(f"{key}={value!r} cannot be honoured: {name}.parallelize does not take {key}.")
    return {key: value for key, (value, _) in asked.items() if key in parameters}


def refuse_sharded(model: nn.Module) -> None:
    """Raise :class:`PrepareError` if somebody else has sharded ``model`` already."""
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        by = "transformers' DistributedConfig" if getattr(model, "_device_mesh", None) is not None else "other code"
        raise PrepareError(
            f"the model is already sharded by {by} ({len(sharded)} DTensor parameters, for example {sharded[0]}). Load "
            f"it without distributed_config / tp_plan and let AutoParallelismConfig shard it, or train it without "
            f"AutoParallelismConfig."
        )


def refuse_meta(context: ParallelizeContext) -> None:
    """Raise unless the model has values, or files have them, or rank 0 has them for all."""
    pending = context.pending.values if context.pending is not None else {}
    meta = [name for name, p in context.model.named_parameters() if p.device.type == "meta" and name not in pending]
    if meta and not context.load_on_rank_zero:
        raise UnsupportedError(
            f"device='meta': {len(meta)} parameters have no values and no files to read them from ({meta[0]}, ...). To "
            f"let each rank read its slices, load with model = "
            "hf_automodel_parallel.from_pretrained(AutoModelForCausalLM, path); to train from scratch, build the "
            "model on the CPU, outside of torch.device('meta') and init_empty_weights."
        )


def materialize_empty(model: nn.Module, pending: PendingValues | None = None) -> None:
    """Give a rank without weights empty tensors; :func:`equalize_parameters` then fills them from rank 0.

    What has its values in ``pending`` stays as it is.
    """
    names = pending.values if pending is not None else {}
    skip = {id(p) for name, p in model.named_parameters() if name in names}
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a tied tensor stays one; the old one keeps its id taken
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None or tensor.device.type != "meta" or id(tensor) in skip:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = (tensor, nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty)
                store[name] = made[id(tensor)][1]
    tie_weights = getattr(model, "tie_weights", None)
    if callable(tie_weights) and made:
        tie_weights()
