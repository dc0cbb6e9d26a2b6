"""Wan, the video transformer of diffusers."""

from __future__ import annotations

from ...core.model_view import ModelView
from ...fsdp.dtype_groups import wider_parameters
from ...fsdp.float32_losses import keep_dtype_of_arguments
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
        # In bfloat16 the timesteps 999 and 1000 are equal.
        keep_dtype_of_arguments(context.model, ("timestep",), context.device)
