"""Wan, the video transformer of diffusers."""

from __future__ import annotations

from ..fsdp_dtypes import wider_parameters
from ..plan.names import unwrapped
from .base import Job
from .video import VideoParallelizationStrategy


class WanParallelizationStrategy(VideoParallelizationStrategy):
    """``WanTransformer3DModel``: blocks, condition embedders and attention sharded by heads; each block one FSDP2 unit.

    What diffusers keeps in float32 when it loads the model in bfloat16 (the time embedder, the modulation tables, norms) stays
    in float32 under a bfloat16 policy.
    """

    def own_dtype(self, job: Job) -> frozenset[str]:
        """The parameters that the class lists as kept in float32."""
        listed = getattr(unwrapped(job.model)[0], "_keep_in_fp32_modules", None) or ()
        return frozenset(wider_parameters(job.model, job.options.mp_policy.param_dtype, listed))
