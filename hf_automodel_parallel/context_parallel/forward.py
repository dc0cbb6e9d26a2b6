"""The hooks of a forward inside of ``maybe_context_parallel``: they check its inputs, set the mask and scale the loss.

The ranks of a cp group hold different tokens of the same sequences. FSDP2 averages gradients over ``dp_shard_cp``, so
the loss that a rank differentiates has to be ``size`` times its contribution to the mean over all tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ConfigError, UnsupportedError
from ..tensor_parallel.collectives import all_reduce
from ..tensor_parallel.dropout_rng import TPRngTracker
from . import attention
from .buffers import Active, active, raise_together
from .layout import Layout
from .models import Suitable

logger = logging.getLogger(__name__)

_IGNORED = -100

#: Offset between the random streams of cp ranks, apart from the TP-local RNG of :mod:`..tensor_parallel.dropout_rng`.
_OWN_NUMBERS = 1 << 20


def install(model: nn.Module, suitable: Suitable, mesh: DeviceMesh, device: torch.device) -> None:
    """Let ``model`` compute on sequence shards inside of ``maybe_context_parallel``; outside it is unchanged.

    Args:
        model: the sharded model, after the hooks of tensor parallelism and FSDP2.
        suitable: from :func:`~.models.check_model`.
        mesh: the cp axis.
        device: that the model computes on.
    """
    layout = Layout(mesh.get_local_rank(), mesh.size())
    attention.install(suitable.attention, attention.Place(layout, mesh.get_group()))
    hooks = _Hooks(suitable, layout, mesh.get_group(), device)
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after)
    # always_call: a forward that raises must not leave the cp rank's random state behind.
    model.register_forward_hook(hooks.numbers.leave, always_call=True)


class _Hooks:
    def __init__(self, suitable: Suitable, layout: Layout, group: dist.ProcessGroup, device: torch.device) -> None:
        self.suitable, self.layout, self.group = suitable, layout, group
        self.numbers = TPRngTracker((layout.rank + 1) * _OWN_NUMBERS, device)
        self.warned = False

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check the inputs, raising on all ranks, and set the mask and the number of tokens of the full sequence."""
        context = active()
        if context is None:
            self._note_full_sequences(model)
            return None
        error: Exception | None = None
        try:
            kwargs = self._prepared(model, context, args, kwargs)
        except Exception as caught:
            error = caught
        # A rank that raised alone would leave the others in the collectives of the forward.
        raise_together(error)
        shift = kwargs.get("shift_labels")
        if shift is not None and kwargs.get("num_items_in_batch") is None:
            # The model divides the sum over this rank's tokens by num_items_in_batch. With the mean number of valid
            # tokens per rank, its loss is `size` times its contribution to the mean over all tokens.
            valid = shift.ne(kwargs.get("ignore_index", _IGNORED)).sum()
            kwargs["num_items_in_batch"] = all_reduce(valid.float(), self.group) / self.layout.size
        # Dropout masks of different tokens are independent, so each cp rank draws from a stream of its own.
        self.numbers.enter()
        return args, kwargs

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Return the loss of the full sequences on every rank; the gradient stays that of this rank's loss."""
        if active() is None:
            return output
        loss = output.get("loss") if hasattr(output, "get") else output[0] if isinstance(output, tuple) else None
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            return output
        average = _Average.apply(loss, self.group, self.layout.size)
        if isinstance(output, tuple):
            return (average, *output[1:])
        output["loss"] = average
        return output

    def _note_full_sequences(self, model: nn.Module) -> None:
        if self.warned or not (model.training and torch.is_grad_enabled()):
            return
        self.warned = True
        if dist.get_rank() == 0:
            logger.warning(
                "cp_size=%d: a training forward outside of accelerator.maybe_context_parallel(buffers=...). It is "
                "right, but each rank of a cp group computes the full sequences.",
                self.layout.size,
            )

    def _prepared(
        self, model: nn.Module, context: Active, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        size = self.layout.size
        where = f"a forward inside of maybe_context_parallel (cp_size={size})"
        if len(args) > 1:
            raise ConfigError(f"{where}: pass all arguments but the first by name.")
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        length = context.length // size
        if tokens is None or tokens.ndim < 2 or tokens.shape[1] != length:
            shape = None if tokens is None else tuple(tokens.shape)
            raise ConfigError(
                f"{where}: the input has the shape {shape}, but a rank holds {length} of {context.length} tokens. Put "
                f"the tensor that you pass to the model into buffers."
            )
        self._check_positions(where, kwargs.get("position_ids"), tokens, length)
        self._check_mask(where, context, kwargs)
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(
                    f"{where}: {name} holds keys of other sequences. Generate outside of the context."
                )
        for name in ("use_cache", "output_attentions", "output_router_logits", "logits_to_keep", "num_logits_to_keep"):
            value = kwargs.get(name)
            if isinstance(value, torch.Tensor) or value:
                raise UnsupportedError(f"{where}: {name}={value!r} is not supported on a sequence shard. Leave it out.")
        self._check_labels(where, kwargs, length)
        for module in self.suitable.attention:
            if getattr(module.config, "_attn_implementation", None) != attention.NAME:
                raise ConfigError(f"{where}: the attention implementation was changed after accelerator.prepare.")
        if any(getattr(module, "neftune_noise_alpha", None) for module in model.modules()) and model.training:
            raise UnsupportedError(
                f"{where}: NEFTune scales its noise by the length of the sequence, of which an embedding sees a part. "
                f"Leave out neftune_noise_alpha."
            )
        cache = {"use_cache": False} if "use_cache" in self.suitable.takes else {}
        return {**kwargs, **cache, "attention_mask": attention.mark(length, size, tokens.device)}

    def _check_positions(self, where: str, positions: Any, tokens: torch.Tensor, length: int) -> None:
        if positions is None:
            raise ConfigError(
                f"{where}: position_ids are missing, and the model would count from 0 on every rank. Pass position_ids "
                f"of the full sequences, torch.arange(length).expand(batch, -1), and put them into buffers."
            )
        expected = self.layout.positions(length, positions.device)
        if positions.shape[-1] != length or not bool((positions == expected).all()):
            raise UnsupportedError(
                f"{where}: position_ids of shape {tuple(positions.shape)} are not those of one full sequence per row, "
                f"0, 1, 2, ..., split as the inputs are. Put position_ids into buffers; sequences that were packed "
                f"into one row or padded at the start are not supported."
            )

    def _check_mask(self, where: str, context: Active, kwargs: dict[str, Any]) -> None:
        """Raise unless the loss is the same without the mask: it hides nothing, or padding at the end that has no
        labels (under causal attention no token sees what comes after it).
        """
        given = kwargs.get("attention_mask")
        if given is None:
            return
        mask, labels = context.full(given, 1), context.full(kwargs.get("shift_labels"), 1)
        if mask is None and isinstance(given, torch.Tensor) and given.ndim == 2 and bool(given.bool().all()):
            return
        if mask is None or mask.ndim != 2 or not bool((mask[:, 1:].bool() <= mask[:, :-1].bool()).all()):
            raise UnsupportedError(
                f"{where}: the attention_mask hides tokens that are followed by others, and only causal attention with "
                f"padding at the end is supported. Pad at the end (padding_side='right'), or pack or cut the sequences."
            )
        hidden = ~mask.bool()
        if bool(hidden.any()) and (labels is None or not bool(labels[hidden].eq(_IGNORED).all())):
            raise UnsupportedError(
                f"{where}: the attention_mask hides tokens at the end that have labels, or there are no labels. Set "
                f"labels of the padding to {_IGNORED} before they are shifted; without labels leave attention_mask "
                f"out: causal attention does not need it."
            )

    def _check_labels(self, where: str, kwargs: dict[str, Any], length: int) -> None:
        labels, shift = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None and shift is None:
            return
        if labels is None:
            raise UnsupportedError(
                f"{where}: shift_labels without labels, so the model computes no loss. Whoever computes one outside of "
                f"it (label_smoothing_factor or compute_loss_func of the Trainer) would shift the labels of each part. "
                f"Leave that out; in a loop of your own pass both, or neither and use shift_labels yourself."
            )
        if shift is None:
            raise ConfigError(
                f"{where}: labels without shift_labels, and the model would shift them within each part. Shift them "
                f"before: shift_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:], put them into "
                f"buffers and pass them too."
            )
        if shift.shape[1] != length:
            raise ConfigError(f"{where}: shift_labels have the shape {tuple(shift.shape)}. Put them into buffers.")
        if self.suitable.no_loss:
            raise UnsupportedError(
                f"{where}: {self.suitable.no_loss}, so it cannot be used with labels that were shifted before. Pass no "
                f"labels and compute the loss from the logits and your own shift_labels."
            )


class _Average(torch.autograd.Function):
    """The mean over ``group``; backward is the identity, since FSDP2 averages the gradients of parameters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
        return all_reduce(x, group) / size

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient, None, None
