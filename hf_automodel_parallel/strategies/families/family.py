"""What the families have in common: they differ from the default in data, and refuse what would be wrong for them."""

from __future__ import annotations

from typing import ClassVar

from ...core.sharding_spec import PLAN_SOURCES
from ...errors import UnsupportedError
from ...fsdp.dtype_groups import wider_parameters
from ..context import ParallelizeContext
from ..default import DefaultParallelizationStrategy


class FamilyParallelizationStrategy(DefaultParallelizationStrategy):
    """The default flow for a family that differs in what these attributes say."""

    #: What in the model's layers mixes tokens in another way than softmax attention does, so that a rank with a part of
    #: the sequence would compute something else; empty if there is no such thing.
    mixes_tokens: ClassVar[str] = ""

    #: Why activations cannot be sharded along the sequence; empty if the plan decides.
    no_sequence_parallel: ClassVar[str] = ""

    #: Path components of parameters that compute in the dtype they are stored in, whatever the policy says.
    keeps_dtype: ClassVar[tuple[str, ...]] = ()

    #: The plan written for the family comes before the one that the model brings, unless the user chose an order.
    own_plan_first: ClassVar[bool] = False

    def plan(self, context: ParallelizeContext) -> None:
        """Refuse what the family cannot honour, then decide as for every model."""
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
        """The plan written for the family first where it is the better one; an order of the user's own is kept."""
        return self.plan_order if self.own_plan_first and asked == PLAN_SOURCES else asked

    def own_dtype(self, context: ParallelizeContext) -> frozenset[str]:
        """Names of parameters that keep their dtype under ``context.fsdp.mp_policy``, beyond those of every
        model.
        """
        return frozenset(wider_parameters(context.model, context.fsdp.mp_policy.param_dtype, self.keeps_dtype))


class SequenceParallelUnsupportedError(UnsupportedError, AssertionError):
    """Sequence parallelism for a family that cannot have it (the reference API promises AssertionError)."""
