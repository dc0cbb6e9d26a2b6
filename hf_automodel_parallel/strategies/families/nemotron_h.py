"""Nemotron-H: decoder layers that are either Mamba, attention, an MLP or experts."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ...core.model_view import ModelView
from ...errors import UnsupportedError
from .family import FamilyParallelizationStrategy


class NemotronHParallelizationStrategy(FamilyParallelizationStrategy):
    """``NemotronHForCausalLM``: Mamba mixers are replicated over tp, all other layers are sharded
    (:func:`~hf_automodel_parallel.plan.sources.families.nemotron_h`).

    :meth:`parallelize` computes in the stored dtypes if no policy is given.
    """

    mp_policy = MixedPrecisionPolicy()
    mixes_tokens = "its Mamba mixers carry a state along the sequence"
    no_sequence_parallel = "its Mamba mixers carry a state along the sequence, and are replicated on every rank"
    own_plan_first = True


def nemotronh_decoder_blocks(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The decoder blocks of a Nemotron-H model, in order, and their container.

    Args:
        model: a ``NemotronHForCausalLM``, plain or PEFT-wrapped, with its layers at ``backbone.layers`` or
            ``model.layers``.

    Returns:
        ``(container, blocks)``: an ``nn.ModuleList``, or an ``nn.ModuleDict`` whose values are the blocks.

    Raises:
        UnsupportedError: there is no such container.
    """
    inner = ModelView.of(model).inner
    base = getattr(inner, "backbone", None) or getattr(inner, "model", None)
    container = getattr(base, "layers", None)
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        raise UnsupportedError(
            f"{type(inner).__name__} has no layers at backbone.layers or model.layers, where a Nemotron-H model has "
            f"them; give a NemotronHForCausalLM."
        )
    return container, list(container.values() if isinstance(container, nn.ModuleDict) else container)
