"""Full weights of a sharded model for another program, such as an inference server, one tensor at a time.

All ranks iterate together and each gets every tensor. After each tensor they exchange one number: whether a rank left
its loop. So a consumer that breaks or raises on one rank ends the iteration on all ranks, instead of letting them wait.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .. import compat
from ..core.lazy_graph import Recording, StreamingEvaluator
from ..core.model_view import ModelView
from ..core.ranks import communication_device, gather_objects
from ..core.rendezvous import ALL_ITERATE, DEFAULT_SECONDS_OF_READS, rendezvous
from ..errors import ConfigError, ExportError, UnsupportedError
from .adapters import full_prompts
from .gathering import (
    Fetch,
    Shapes,
    cast_shard,
    file_dtypes,
    full_tensor,
    full_tensor_by_shards,
    shapes_of,
    sharded_tensors,
)
from .merged import MergedWeights
from .pretrained import as_saved

_CALL = "stream_weights()"
#: Tensors of less than this part of the largest one are gathered by DTensor's all-gathers, which need up to 2.5 times
#: their memory.
_SMALL_PART = 1 / 3


def stream_weights(
    model: nn.Module, adapters_only: bool = False, merged: bool = False, dtype: torch.dtype | None = None
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Iterate over the full weights of ``model``, gathered one at a time when they are asked for. Collective.

    For an inference server that gets new weights while the model trains (vLLM's ``load_weights``, TRL's vLLM client).
    Names, shapes, values and dtypes are those of the files that one process saves. All ranks iterate alike, and all get
    all tensors; a rank that does not need them loops with ``pass``. The model is not changed, and no copy of it is
    held: beside the tensor that the caller has, the next one and a sixteenth of it; with ``merged=True`` also what
    PEFT's merge of one layer needs. The weights should not be trained meanwhile.

    If a rank leaves its loop early (``break``, an error, ``close()``), the others get an :class:`ExportError` that
    names it at their next tensor; if all leave at the same one, nothing is raised. Python closes a generator when its
    last reference is gone: write it into the ``for`` statement, or close it (``contextlib.closing``), since a rank that
    keeps a stream without going on lets the others wait.

    Args:
        model: a prepared or unsharded model of transformers, or a ``PeftModel``.
        adapters_only: the active adapter's weights, named as in ``adapter_model.safetensors``; a base may be quantised.
        merged: of a ``PeftModel``, the weights of ``merge_and_unload()``. By default the base weights without adapters.
        dtype: cast floating-point tensors; None for the dtypes of saved files.

    Yields:
        The name and the tensor, of full shape, contiguous, on the device of the process group (of an unsharded model
        where it is). It may be memory of the model: copy it before changing it.

    Raises:
        ConfigError: options that contradict each other or the model.
        UnsupportedError: weights that have no full-precision files: quantised ones, and adapters that cannot be merged.
        ExportError: another rank left, called something else, or did not come in time.
    """
    _check(model, adapters_only, merged, dtype)
    details = {"adapters_only": adapters_only, "merged": merged, "dtype": str(dtype)}
    return _stream(lambda: _Weights(model, adapters_only, merged, dtype), details)


def _check(model: nn.Module, adapters_only: bool, merged: bool, dtype: torch.dtype | None) -> None:
    peft = compat.is_peft_model(model)
    inner = ModelView.of(model).inner
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedError(
            f"{_CALL} needs a model of transformers, or a PeftModel of one; this is a {type(inner).__name__}, whose "
            f"names in files are its own. Iterate over model.named_parameters() and gather each with full_tensor()."
        )
    own = not peft and compat.carries_adapters(model)
    if adapters_only and merged:
        raise ConfigError("stream_weights(adapters_only=True, merged=True): choose one.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"stream_weights(dtype={dtype!r}): give a floating-point torch.dtype, or None.")
    if adapters_only and not peft and not own:
        raise ConfigError(f"stream_weights(adapters_only=True): this {type(model).__name__} has no adapter.")
    if merged and not peft:
        raise ConfigError(
            f"stream_weights(merged=True) needs a PeftModel; this is a {type(model).__name__}."
            + ("" if own else " Leave it out.")
        )
    if adapters_only:
        active: Any = model.active_adapters() if own else model.active_adapters  # type: ignore[operator]
        if len(active) != 1:
            raise ConfigError(
                f"stream_weights(adapters_only=True) with the active adapters {list(active)}: their files have equal "
                f"names. Activate one with model.set_adapter(name)."
            )
        return
    if getattr(inner, "hf_quantizer", None) is not None:
        raise UnsupportedError(
            "stream_weights() of quantised weights: their files need the scales of whole weights. Stream the adapter "
            "(adapters_only=True); the quantised base is what it was loaded from."
        )
    if own:
        raise UnsupportedError(
            f"stream_weights() of a {type(model).__name__} with adapters from add_adapter(): its base is not told "
            f"apart. Stream the adapter (adapters_only=True), or wrap the model with peft.get_peft_model."
        )
    if peft and not merged and any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ConfigError(
            "stream_weights() of a PeftModel whose adapters are merged into its weights: they are not the base "
            "weights. Call unmerge_adapter() first, or give merged=True."
        )


class _Weights:
    """The tensors to yield, and how to compute them.

    Attributes:
        tensors: name -> tensor on the meta device that ``recording`` knows, or one with values.
    """

    def __init__(self, model: nn.Module, adapters_only: bool, merged: bool, dtype: torch.dtype | None) -> None:
        self._state = sharded_tensors(model)
        shapes = shapes_of(self._state, file_dtypes(model))
        wanted = {
            name: (shape, dtype if dtype is not None and kept.is_floating_point else kept)
            for name, (shape, kept) in shapes.items()
        }
        # Adapters are merged in the dtypes of training, as in one process, and the result is cast.
        self._dtypes = {name: value.dtype if merged else wanted[name][1] for name, value in self._state.items()}
        self._sizes = {n: math.prod(shape) * self._dtypes[n].itemsize for n, (shape, _) in shapes.items()}
        self._small = _SMALL_PART * max(self._sizes.values(), default=0)
        self.recording = Recording()
        self.tensors: dict[str, torch.Tensor]
        fetch: Fetch = self._fetch
        if adapters_only:
            self.tensors = _adapter(model, wanted, self.recording, fetch)
        elif compat.is_peft_model(model):
            weights = MergedWeights(model, merge=merged, call=_CALL)
            plain = weights.plain_model()
            of_plain = {name: wanted[weights.sources[name]] for name in plain.state_dict()}
            fetch = _cast(weights.value, self._fetch, of_plain)
            self.tensors = as_saved(plain, of_plain, self.recording)
        else:
            self.tensors = as_saved(model, wanted, self.recording)
        nodes = [self.recording.node(tensor) for tensor in self.tensors.values() if tensor.is_meta]
        self._evaluator = StreamingEvaluator(nodes, fetch)

    def compute(self, name: str) -> torch.Tensor:
        """The tensor ``name`` with its values. Collective."""
        tensor = self.tensors[name]
        return (self._evaluator.compute(self.recording.node(tensor)) if tensor.is_meta else tensor).contiguous()

    def _fetch(self, name: str) -> torch.Tensor:
        tensor = cast_shard(self._state[name], self._dtypes[name])
        if isinstance(tensor, DTensor) and self._sizes[name] > self._small:
            return full_tensor_by_shards(tensor)
        return full_tensor(tensor)


def _cast(value: Callable[[str, Fetch], torch.Tensor], fetch: Fetch, shapes: Shapes) -> Fetch:
    return lambda name: value(name, fetch).to(shapes[name][1])


def _adapter(model: nn.Module, shapes: Shapes, recording: Recording, fetch: Fetch) -> dict[str, torch.Tensor]:
    """The weights of the active adapter, as in its file; of a learned prompt its values."""
    state = recording.declare(shapes)
    if not compat.is_peft_model(model):
        cls: Any = type(model)
        with recording:
            own = cls.get_adapter_state_dict(model, state_dict=state)
        return {f"base_model.model.{name}": tensor for name, tensor in own.items()}  # as in transformers' files
    adapter: str = model.active_adapters[0]  # type: ignore[index,assignment]
    with full_prompts(model, fetch, [adapter]), recording, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compat.adapter_state(model, state, adapter, "auto")


def _stream(
    make: Callable[[], _Weights], details: Mapping[str, Any]
) -> Generator[tuple[str, torch.Tensor], None, None]:
    together = dist.is_available() and dist.is_initialized()
    if together:
        rendezvous(_CALL, details, default_seconds=DEFAULT_SECONDS_OF_READS, remedy=ALL_ITERATE)
    # An error in what follows is not told to the others: they may be within a gather, which must not meet another
    # collective. Where all ranks fail alike, as by a refusal, each raises its own.
    weights = make()
    names = list(weights.tensors)
    for name in names:
        value = weights.compute(name)
        try:
            yield name, value
        except GeneratorExit:
            # Also when Python shuts down, after the process group is gone.
            if together and dist.is_initialized():
                _go_on(None if name == names[-1] else f"its loop ended at {name}, by break or by an error there")
            return
        del value  # before the next one is gathered
        if together:
            _go_on(None)


def _go_on(reason: str | None) -> None:
    """Tell the other ranks whether this one goes on (None) or why not. Collective.

    Raises:
        ExportError: this rank goes on and another one does not.
    """
    stopped = torch.tensor([reason is not None], dtype=torch.int64, device=communication_device())
    dist.all_reduce(stopped, op=dist.ReduceOp.MAX)
    if not stopped.item():
        return
    reasons = gather_objects(reason)
    if reason is None:
        rank, text = next((number, text) for number, text in enumerate(reasons) if text is not None)
        # Not marked as known to all ranks: the one that stopped may go on.
        raise ExportError(f"{_CALL} stopped on rank {rank}: {text}. The weights are not complete.")
