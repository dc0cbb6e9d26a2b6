"""Wrap a model, tensor parallel or not, with megatron-fsdp, and clip its sharded gradients.

Outside of forward and backward the module tree has the sharded parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ... import compat
from ...core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper, Replacement
from ...core.model_view import ModelView
from ...core.ranks import gather_objects
from ...core.sharding_spec import ShardingSpec
from ...errors import AutoParallelError
from ...optim.gradient_norm import clip_
from ...tensor_parallel.apply import TensorParallelState
from . import engine
from .mesh import Layout
from .options import MegatronOptions
from .shards import RowShards, local_part

logger = logging.getLogger(__name__)

_MANAGED = "_megatron_model"


class NonFiniteGradientError(AutoParallelError, ArithmeticError):
    """A gradient is infinite or NaN, and ``check_for_nan_in_grad`` is on."""


@dataclass
class MegatronModel:
    """One model that megatron-fsdp manages.

    The model keeps its class, names and methods: calls, ``generate`` and saving work as before. The ``MegatronFSDP``
    around it is only needed for calls of megatron-fsdp's own API.

    Attributes:
        model: the user's model.
        wrapper: the ``MegatronFSDP`` around it.
        layout: the mesh and the names of its axes.
        options: the user's options.
        row_shards: which rows of each parameter this rank holds.
        tensor_parallel: state of tensor parallelism on the model, None without it.
        states: gathers its state dicts (:class:`.state.FullStates`); None: they are megatron-fsdp's own.
        began: the backward of the last forward has begun.
        reduced: the last backward reduced gradients, so it completed an optimizer step.
        depth: nesting of the running forwards of the model.
    """

    model: nn.Module
    wrapper: Any
    layout: Layout
    options: MegatronOptions
    row_shards: RowShards
    tensor_parallel: TensorParallelState | None = None
    states: Any = None
    began: bool = field(default=False, repr=False)
    reduced: bool = field(default=True, repr=False)
    depth: int = field(default=0, repr=False)

    # ---- before and after a forward --------------------------------------------------------------------------------

    def _before(self, *_: Any) -> None:
        if self.depth == 0:
            self.began = False
            engine.show_raw(self.wrapper)
        self.depth += 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let megatron-fsdp prepare at the start of backward; without a backward, show the sharded parameters."""
        self.depth -= 1
        if self.depth > 0:
            return
        waiting = [tensor for tensor in _tensors_in(output) if tensor.requires_grad]
        if not waiting:
            engine.show_sharded(self.wrapper)
        for tensor in waiting:
            # megatron-fsdp returns views. An in-place `loss *= n`, as in the Trainer, bypasses the hooks of a view, but
            # not those of its base.
            source = compat.base_of(tensor)
            source.register_hook(self._begin_backward)

    def _begin_backward(self, _: torch.Tensor) -> None:
        """Before the first gradient of a backward: clear megatron-fsdp's buffers if all gradients are None.

        ``optimizer.zero_grad()`` clears the buffers. ``model.zero_grad()``, which the Trainer calls, and
        ``p.grad = None`` do not; then the next backward would add to the gradients of the last step. Between
        micro-batches without a reduction every gradient is None, too, but the buffers must be kept.
        """
        if not self.began:
            self.began = True
            if self.reduced and all(parameter.grad is None for parameter in self.parameters.values()):
                self.wrapper.zero_grad_buffer()
            self.reduced = bool(self.wrapper.model_auto_sync)
        engine.start_backward(self.wrapper)

    def watch(self) -> None:
        """Hook the forwards of the model, and of the model inside of PEFT's wrapper."""
        roots = {self.model, ModelView.of(self.model).inner}
        for root in roots:
            root.register_forward_pre_hook(self._before, prepend=True)
            root.register_forward_hook(self._after, always_call=True)
        # megatron-fsdp 0.5 calls `module.forward`, which bypasses the hooks of the root.
        ForwardStack.of(self.wrapper).push(ForwardSlot.COMPUTATION, Replacement(self.model.__call__))
        for module in (self.model, self.wrapper):
            module.__dict__[_MANAGED] = self

    # ---- gradients -------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The sharded parameters by name."""
        return engine.sharded_parameters(self.wrapper)

    def flush(self) -> None:
        """All-reduce the partial gradients of replicated parameters over tp, if that has not been done yet."""
        if self.tensor_parallel is not None:
            self.tensor_parallel.partial.flush()

    def set_gradient_sync(self, sync: bool) -> None:
        """Set whether the next backward reduces gradients, that is, whether it completes an optimizer step.

        If gradients are not sharded, a reduction in each micro-batch would reduce already reduced gradients again.
        """
        self.wrapper.is_last_microbatch = sync
        self.wrapper.set_model_auto_sync(sync)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, parameters: Iterable[Any] | None = None
    ) -> torch.Tensor:
        """Clip the gradients of ``parameters`` (None: all) in place; returns the norm before clipping. Collective."""
        self.flush()
        chosen = list(self.parameters.values() if parameters is None else parameters)
        return clip_(chosen, max_norm, norm_type, self.layout.mesh)

    @torch.no_grad()
    def check_gradients(self) -> None:
        """Raise :class:`NonFiniteGradientError` on all ranks if a gradient is not finite on one of them."""
        bad = [
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and not bool(torch.isfinite(local_part(parameter.grad)).all())
        ]
        flag = torch.tensor(len(bad), device=self.row_shards.device)
        dist.all_reduce(flag)
        if not int(flag):
            return
        names = sorted({name for theirs in gather_objects(bad) for name in theirs})
        raise NonFiniteGradientError(
            f"{len(names)} gradients are not finite ({', '.join(names[:4])}). The optimizer has not stepped. Lower the "
            f"learning rate or look at the data; check_for_nan_in_grad=False steps nevertheless."
        )

    # ---- optimizers and state ----------------------------------------------------------------------------------------

    def adopt(
        self,
        optimizer: torch.optim.Optimizer,
        names: list[list[str]],
        old: dict[str, nn.Parameter],
        for_dcp: bool = True,
    ) -> None:
        """Give ``optimizer`` the sharded parameters, by name, in place; groups, their settings and existing state stay.

        Args:
            optimizer: the torch optimizer.
            names: ``names[group][i]``, the names of its parameters.
            old: name -> the parameter in its groups so far.
            for_dcp: its state dict has megatron-fsdp's shards, prepared for ``torch.distributed.checkpoint``.
        """
        new = self.parameters
        state = dict(optimizer.state)
        optimizer.state.clear()
        for group, group_names in zip(optimizer.param_groups, names, strict=True):
            group["params"][:] = [new[name] for name in group_names]
            for name in group_names:
                values = state.get(old[name])
                if values is not None:
                    optimizer.state[new[name]] = {key: self.sharded(name, value) for key, value in values.items()}
        if any(group["params"] for group in optimizer.param_groups):
            engine.wrap_optimizer(optimizer, for_dcp)
        optimizer.register_step_pre_hook(lambda *_: self.flush())
        if self.options.check_for_nan_in_grad:
            optimizer.register_step_pre_hook(lambda *_: self.check_gradients())
        optimizer.register_step_post_hook(lambda *_: engine.show_sharded(self.wrapper))

    def sharded(self, name: str, value: Any) -> Any:
        """``value`` sharded like the parameter ``name`` if it has the parameter's full shape; else unchanged."""
        shard, parameter = self.row_shards.by_name[name], self.parameters[name]
        if not isinstance(value, torch.Tensor) or not value.ndim or value.shape != shard.shape:
            return value
        value = value.full_tensor() if isinstance(value, DTensor) else value
        local = self.row_shards.local(name, value).to(shard.device, copy=True).contiguous()
        return DTensor.from_local(
            local,
            parameter.device_mesh,  # type: ignore[attr-defined]
            parameter.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def shard_with_megatron(
    model: nn.Module,
    layout: Layout,
    options: MegatronOptions,
    units: list[type[nn.Module]],
    spec: ShardingSpec | None,
    shapes: dict[str, torch.Size],
    device: torch.device,
    has_optimizer: bool,
    tensor_parallel: TensorParallelState | None = None,
    autocast: torch.dtype | None = None,
) -> MegatronModel:
    """Wrap ``model`` with megatron-fsdp, in place.

    A tensor-parallel parameter is a DTensor on the tp axis. During forward megatron-fsdp keeps it so, with the
    unsharded data inside; local-parameter scopes then make it local as under FSDP2. Between forwards it is a DTensor on
    both axes.

    Args:
        model: on one device, or on meta with ``init_fsdp_with_meta_device``.
        layout: see :meth:`.mesh.Axes.layout`.
        options: see :class:`MegatronOptions`.
        units: see :func:`.strategy.unit_classes`.
        spec: the resolved tensor-parallel plan, or None.
        shapes: shapes of the full parameters, by name.
        device: device of the shards.
        has_optimizer: an optimizer is prepared as well.
        tensor_parallel: state of tensor parallelism on the model, None without it.
        autocast: compute in this dtype under autocast; parameters and gradients keep their dtype. None: no autocast.
    """
    package = engine.load()
    hybrid = {} if layout.replicas is None else {"dp_outer_dim": layout.replicas, "hybrid_fsdp_group": layout.reducing}
    if layout.replicas is not None:
        hybrid["hybrid_fsdp_expt_group"] = layout.reducing
    if autocast is not None:
        ForwardStack.of(model).push(ForwardSlot.DTYPE, _AutocastForward(device.type, autocast))
    wrapper = package.fully_shard_model(
        model,
        device_mesh=layout.mesh,
        dp_shard_dim=layout.shard,
        tp_dim=layout.tp,
        # megatron-fsdp treats every parameter below a module called "experts" as expert parallel, on this mesh. Ours
        # are sharded like all other parameters, so it gets the same mesh.
        expt_device_mesh=layout.mesh,
        device=device,
        **hybrid,
        **engine.translate(options, units, has_optimizer),
    )
    if layout.tp_mesh is not None:
        names = (layout.replicas, layout.shard, layout.tp) if layout.replicas else (layout.shard, layout.tp)
        engine.put_on_one_mesh(wrapper, layout.mesh[names])
    row_shards = RowShards(layout, engine.sharded_parameters(wrapper), shapes, spec, options.zero_dp_strategy != 0)
    managed = MegatronModel(model, wrapper, layout, options, row_shards, tensor_parallel)
    managed.watch()
    return managed


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a model's output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


class _AutocastForward(ForwardWrapper):
    """A forward like that of Accelerate's mixed precision without FSDP: under autocast, with float32 outputs."""

    as_method = False

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        from accelerate.utils import convert_to_fp32

        self.device_type, self.dtype, self.convert = device_type, dtype, convert_to_fp32

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            return self.convert(self.inner(*args, **kwargs))


def managed_by_megatron(model: nn.Module) -> MegatronModel | None:
    """The :class:`MegatronModel` of ``model`` (the user's model or its wrapper), None if there is none."""
    return model.__dict__.get(_MANAGED)
