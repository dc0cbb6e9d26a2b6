"""The interface of a strategy, which families and third parties implement, and the checks of all strategies."""

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

from .. import compat
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
    """Parallelises the models of one family. Subclass it and register the subclass with
    :func:`~hf_automodel_parallel.register_parallel_strategy`.

    A family that differs from the default in one step should subclass
    :class:`~hf_automodel_parallel.strategies.default.DefaultParallelizationStrategy` and override that step. A strategy
    with other steps implements :meth:`parallelize` alone. ``Accelerator.prepare`` then compares the ranks, calls
    :meth:`parallelize` with the user's options, and gives the optimizer the sharded parameters.
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
            model: the model, with equal values on all ranks.
            device_mesh: root mesh.
            mp_policy: dtypes of FSDP2; None: the strategy's default.
            offload_policy: offload policy of FSDP2; None: shards stay on the device.
            sequence_parallel: shard activations between tensor-parallel blocks along the sequence.
            activation_checkpointing: False, True (entire layers) or the name of a mode ("submodule", "selective").
            tp_shard_plan: explicit tensor-parallel plan in any form of ``AutoParallelismConfig.tp_plan``.
            dp_replicate_mesh_name: axis of replicas.
            dp_shard_cp_mesh_name: axis to shard over.
            tp_mesh_name: axis of tensor parallelism.
            kwargs: further options; a strategy raises for one that it does not support.
        """

    # ---- the steps that Accelerator.prepare takes ----------------------------------------------------------------

    def plan(self, context: ParallelizeContext) -> None:
        """Decide everything, and raise all user errors. Runs no collective and changes nothing."""
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

    # A strategy without steps has no results to check, so these two are not abstract.
    def check_planned(self, context: ParallelizeContext) -> None:  # noqa: B027
        """Raise if :meth:`plan` has left out what later steps need."""

    def check_carried_out(self, context: ParallelizeContext) -> None:  # noqa: B027
        """Raise if :meth:`carry_out` has not sharded the model."""

    def compare_ranks(self, context: ParallelizeContext) -> None:
        """Raise on all ranks unless they hold the same model."""
        check_same_structure(context.model, context.spec, context.group, context.choices)

    def carry_out(self, context: ParallelizeContext) -> None:
        """Parallelise ``context.model``; the same collectives on every rank."""
        if context.load_on_rank_zero:
            materialize_empty(context.model)
        # Before sharding, after which ranks hold different shards and cannot be compared any more.
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
        """Give ``optimizer`` the sharded parameters, in place.

        Args:
            context: the context after :meth:`carry_out`.
            optimizer: the user's optimizer.
            names: ``names[group][i]``, the names of its parameters before sharding.
            before: name -> parameter before sharding.
        """
        switch_parameters(optimizer, names, context.model, before)

    def _asked_for(self, context: ParallelizeContext) -> dict[str, tuple[Any, Any]]:
        """Argument of :meth:`parallelize` -> (value, its value if the user did not set the option)."""
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
            "enable_compile": (False, False),  # carry_out compiles afterwards, with the user's backend and mode
            "fsdp2_backward_prefetch_depth": (fsdp.backward_prefetch, 2),
            "fsdp2_forward_prefetch_depth": (fsdp.forward_prefetch, 1),
            "reshard_after_forward": (fsdp.reshard_after_forward, fsdp.reshard_after_forward),
        }


def call_arguments(function: Callable[..., Any], asked: dict[str, tuple[Any, Any]], name: str) -> dict[str, Any]:
    """The keyword arguments for a call of ``function``.

    Args:
        function: a strategy's ``parallelize``; without ``**kwargs`` it gets only the arguments in its signature.
        asked: argument -> (value, its value if the user did not set the option).
        name: name of the strategy, for the message.

    Raises:
        UnsupportedError: the user set an option for which ``function`` has no argument.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {key: value for key, (value, _) in asked.items()}
    for key, (value, nothing) in asked.items():
        if key not in parameters and value != nothing:
            raise UnsupportedError(f"{key}={value!r} cannot be honoured: {name}.parallelize does not take {key}.")
    return {key: value for key, (value, _) in asked.items() if key in parameters}


def refuse_sharded(model: nn.Module) -> None:
    """Raise :class:`PrepareError` if transformers or other code has already sharded ``model``."""
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        by = "transformers' DistributedConfig" if getattr(model, "_device_mesh", None) is not None else "other code"
        raise PrepareError(
            f"the model is already sharded by {by} ({len(sharded)} DTensor parameters, for example {sharded[0]}). Load "
            f"it without distributed_config / tp_plan and let AutoParallelismConfig shard it, or train it without "
            f"AutoParallelismConfig."
        )


def refuse_meta(context: ParallelizeContext) -> None:
    """Raise :class:`UnsupportedError` unless the model, its files, or rank 0 has values for all parameters.

    Simulated ranks (the planner's) train nothing, so their model needs no values.
    """
    if compat.ranks_are_simulated():
        return
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
    """Replace meta tensors of ``model`` by empty ones on the CPU, which :func:`equalize_parameters` fills from rank 0.

    Parameters with values in ``pending`` are not changed.
    """
    names = pending.values if pending is not None else {}
    skip = {id(p) for name, p in model.named_parameters() if name in names}
    # By id, so that tied tensors stay tied. With the old tensor: if it were freed, a new object could get its id.
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
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
