"""Wan, the video transformer of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper
from ...core.model_view import ModelView
from ...fsdp.dtype_groups import wider_parameters
from ..context import ParallelizeContext
from .video import VideoParallelizationStrategy


class WanParallelizationStrategy(VideoParallelizationStrategy):
    """``WanTransformer3DModel``: blocks, condition embedders and attention by heads are sharded; each block is a unit.

    Modules that diffusers keeps in float32 when it loads the model in bfloat16 (the time embedder, the modulation
    tables, norms) stay in float32 under a bfloat16 policy, and so do the timesteps.
    """

    def own_dtype(self, context: ParallelizeContext) -> frozenset[str]:
        """The parameters that the class lists as kept in float32."""
        listed = getattr(ModelView.of(context.model).inner, "_keep_in_fp32_modules", None) or ()
        return frozenset(wider_parameters(context.model, context.fsdp.mp_policy.param_dtype, listed))

    def finish_layers(self, context: ParallelizeContext) -> None:
        """As for every model; then exempt the timesteps from the policy's cast of inputs."""
        super().finish_layers(context)
        keep_timestep(context.model)


def keep_timestep(model: nn.Module) -> None:
    """Pass the argument ``timestep`` to the model inside of ``model`` in the caller's dtype.

    FSDP2 casts all inputs to the policy's dtype, and in bfloat16 the timesteps 999 and 1000 are equal.

    Args:
        model: the root unit of FSDP2, plain or PEFT-wrapped; call it with ``timestep`` by name or as second argument.
    """
    inner = ModelView.of(model).inner

    def wrap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": _Untouched(kwargs["timestep"])}
        return (args[0], _Untouched(args[1]), *args[2:]) if len(args) > 1 else args, kwargs

    # In front of FSDP2's pre-forward hook, which casts.
    model.register_forward_pre_hook(wrap, prepend=True, with_kwargs=True)
    ForwardStack.of(inner).push(ForwardSlot.DTYPE, _UntouchedForward(next(inner.parameters()).device))


class _Untouched:
    """Hides a tensor from FSDP2's cast, which walks through containers but not through other objects."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _UntouchedForward(ForwardWrapper):
    """A forward whose :class:`_Untouched` arguments are unwrapped and moved to ``device``."""

    as_method = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _tensor(self, value: Any) -> Any:
        return value.tensor.to(self.device) if isinstance(value, _Untouched) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*map(self._tensor, args), **{key: self._tensor(value) for key, value in kwargs.items()})
