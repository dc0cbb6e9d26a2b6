"""Arguments that a model's own forward gets in training, and that the trial of its plan did not give it.

What such an argument switches on (a mask of heads, a norm over all features) was not compared with one process.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger(__name__)

#: Arguments that add tokens, labels or outputs, and switch no other arithmetic in the layers.
_USUAL = frozenset(
    "input_ids inputs_embeds attention_mask position_ids labels use_cache past_key_values cache_position return_dict "
    "output_hidden_states num_items_in_batch logits_to_keep token_type_ids decoder_attention_mask".split()
)


def warn_of_untried(model: nn.Module, tried: frozenset[str]) -> None:
    """Warn once for each argument of ``model``'s forward that is given and was not among those ``tried``."""
    signature = inspect.signature(model.forward)
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    model.register_forward_pre_hook(
        functools.partial(_compare, known=set(_USUAL | tried), names=names), with_kwargs=True
    )


def _compare(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: set[str], names: list[str]
) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    new = kwargs.keys() - known
    if len(args) > 1:
        new = new | (set(names[: len(args)]) - known)
    if not new:
        return
    values = dict(zip(names, args)) | kwargs
    given = sorted(name for name in new if values[name] is not None and values[name] is not False)
    known.update(given)
    if given and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.warning(
            "the forward of %s, code of its own, is given %s, which the trial of its tensor-parallel plan did not "
            "give: what it switches on was not compared with one process. Compare loss and gradients of a first step, "
            "or leave the layers concerned out with a tp_plan.",
            type(model).__name__,
            ", ".join(given),
        )
