"""The base class of the families: they differ from the default in a few attributes, and refuse unsupported options."""

from __future__ import annotations

from typing import ClassVar

from ...core.sharding_spec import PLAN_SOURCES
from ...errors import UnsupportedError
from ...fsdp.dtype_groups import wider_parameters
from ..context import ParallelizeContext
from ..default import DefaultParallelizationStrategy


class FamilyParallelizationStrategy(DefaultParallelizationStrategy):
    """The default strategy for a family that differs in these attributes."""

    #: The layers' operator that mixes tokens other than softmax attention, so that a rank with a sequence shard would
    #: compute wrong results under context parallelism; for the message. Empty if there is none.
    mixes_tokens: ClassVar[str] = ""

    #: The reason why sequence parallelism is not available, for the message; empty if the plan decides.
    no_sequence_parallel: ClassVar[str] = ""

    #: Path components of parameters that compute in their stored dtype under every policy.
    keeps_dtype: ClassVar[tuple[str, ...]] = ()

    #: The registry's plan for the family comes before the model's own ``_tp_plan``, unless the user chose an order.
    own_plan_first: ClassVar[bool] = False

    def plan(self, context: ParallelizeContext) -> None:
        """Refuse options that the family does not support, then decide as for every model."""
        family = type(self).__name__.removesuffix("ParallelizationStrategy")
        names = context.mesh.mesh_dim_names or ()
        if self.mixes_tokens and "cp" in names and context.mesh["cp"].size() > 1:
            raise UnsupportedError(
                f"context parallelism (cp of {context.mesh['cp'].size()} ranks) is not available for the {family} "
                f"family: {self.mixes_tokens}, which would need the parts of the sequence on the other ranks. Use "
                f"cp_size=1 and more dp_shard_size or tp_size."
            )
        if context.options.sequence_parallel and self.no_sequence_parallel:
            raise SequenceParallelUnsupportedError(
                f"sequence_parallel=True is not available for the {family} family: {self.no_sequence_parallel}. Use "
                f"sequence_parallel=False; tensor parallelism alone computes the same."
            )
        context.fsdp.own_dtype |= self.own_dtype(context)
        super().plan(context)

    def sources(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The plan sources, the registry first if :attr:`own_plan_first`; an order chosen by the user is kept."""
        return self.plan_order if self.own_plan_first and asked == PLAN_SOURCES else asked

    def own_dtype(self, context: ParallelizeContext) -> frozenset[str]:
        """Names of parameters that keep their dtype under ``context.fsdp.mp_policy``, in addition to the default's."""
        return frozenset(wider_parameters(context.model, context.fsdp.mp_policy.param_dtype, self.keeps_dtype))


class SequenceParallelUnsupportedError(UnsupportedError, AssertionError):
    """Sequence parallelism for a family that does not support it (``AssertionError`` in the reference API)."""
