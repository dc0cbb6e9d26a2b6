"""``generate`` on a prepared model: the ranks that compute together draw the same tokens and run equally many
forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from ..core.consistency import fingerprint, synchronize_rng
from ..core.model_view import ModelView
from ..core.ranks import communication_device, gather_objects, raise_on_all_ranks
from ..errors import PrepareError
from ..strategies.context import ParallelizeContext

_GUARDED = "_automodel_parallel_generate"

#: What a decoder reads tokens from; the first one that is there.
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


def guard_generation(model: nn.Module, context: ParallelizeContext) -> None:
    """Make ``model.generate`` safe on every mesh, on this instance alone; a model that cannot generate is left as it
    is.

    * The ranks of a tp group need one prompt and one random state: with tokens of their own, each would go on with a
      cache that fits another text, and the first to stop would leave the others waiting. A script may have seeded each
      process by its index (Accelerate's ``set_seed(..., device_specific=True)``).
    * Data-parallel ranks that share parameters run equally many forwards, however long their texts get; and where a
      rank fails between two forwards (a logits processor of the user's), so do those that compute with it. See
      :class:`_Together`.

    Args:
        model: the prepared model, PEFT-wrapped or not.
        context: how it was prepared.
    """
    inner = ModelView.of(model).inner
    if not hasattr(inner, "generate") or _GUARDED in inner.__dict__:
        return
    if hasattr(model, "generate"):
        # The root of FSDP2 gathers what is its own in front of its forward. generate() comes past it: PEFT's wrapper
        # hands it to the model inside, and an encoder is called alone, whose embedding is tied to the decoder's.
        register_fsdp_forward_method(model, "generate")
    data_parallel = context.dp_mesh
    shared_parameters = data_parallel.size(data_parallel.ndim - 1) > 1
    tp_mesh = context.tp_mesh
    # All ranks meet in a generation that gathers parameters; otherwise each tp group generates when it likes to.
    group = context.group if shared_parameters or tp_mesh is None else tp_mesh.get_group()
    together = _Together(inner, group) if shared_parameters or tp_mesh is not None else None
    original: Callable[..., Any] = inner.generate  # type: ignore[assignment]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if tp_mesh is not None:
            with raise_on_all_ranks("generate", group):
                _check_same_prompt([*enumerate(args), *kwargs.items()], tp_mesh)
            synchronize_rng(tp_mesh)
        if together is None:
            return original(*args, **kwargs)
        return together.run(original, *args, **(kwargs | {"synced_gpus": False}))

    inner.generate = generate  # type: ignore[assignment]
    inner.__dict__[_GUARDED] = True


#: What a rank says in front of a forward.
_DONE, _WRITES, _FAILED = 0, 1, 2


class _OtherRankFailed(PrepareError):
    """So that a rank which only learnt of a failure does not tell of it again."""


class _Together:
    """Equally many forwards on all ranks, because each of them gathers parameters that the ranks share or reduces over
    tp.

    In front of each forward of a generation the ranks ask each other who still writes. A rank that has finished joins
    in with forwards of one token until nobody does. transformers' ``synced_gpus`` is meant for this, but lets a rank
    that has finished go on with its own cache and mask, which a static cache and ``use_cache=False`` do not survive
    (5.24).
    """

    def __init__(self, inner: nn.Module, group: dist.ProcessGroup | None) -> None:
        self._inner, self._group = inner, group
        self._writing = False
        self._inputs: dict[str, Any] | None = None
        # In front of FSDP2's own hook, which gathers.
        inner.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)

    def run(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``generate`` returns, once all ranks are done."""
        self._writing, self._inputs = True, None
        try:
            result = generate(*args, **kwargs)
        except _OtherRankFailed as failed:
            raise PrepareError(str(failed)) from None
        except Exception:
            self._tell(_FAILED)  # the others wait in front of their next forward, or at the end
            raise
        finally:
            self._writing = False
        with torch.no_grad():
            while self._anybody(writes=False):
                self._inner(**(self._inputs or {}))
        self._inputs = None
        return result

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._writing:
            return
        if self._inputs is None:
            self._inputs = _one_token(args, kwargs)
        self._anybody(writes=True)

    def _anybody(self, writes: bool) -> bool:
        said = self._tell(_WRITES if writes else _DONE)
        if said == _FAILED:
            raise _OtherRankFailed(
                "generate() failed on another rank, whose message says why; the ranks generate together, because they "
                "share the parameters or compute one text."
            )
        return said == _WRITES

    def _tell(self, mine: int) -> int:
        """The most that any rank says."""
        said = torch.tensor(mine, device=communication_device())
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group)
        return int(said.item())


def _one_token(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a forward like this one, without a cache, for the first token of each row."""
    inputs: dict[str, Any] = {}
    name = next((name for name in _TOKENS if kwargs.get(name) is not None), None)
    if name is not None:
        inputs[name] = kwargs[name][:, :1].clone()
    elif args:
        inputs["input_ids"] = args[0][:, :1].clone()
    if kwargs.get("encoder_outputs") is not None:
        inputs["encoder_outputs"] = kwargs["encoder_outputs"]
        inputs["attention_mask"] = kwargs.get("attention_mask")
    if "use_cache" in kwargs:
        inputs["use_cache"] = False
    return inputs


def _check_same_prompt(arguments: list[tuple[int | str, Any]], tp_mesh: DeviceMesh) -> None:
    mine = {
        "inputs" if name == 0 else str(name): (tuple(value.shape), fingerprint(value))
        for name, value in arguments
        if isinstance(value, torch.Tensor)
    }
    everyone = gather_objects(mine, tp_mesh.get_group())
    names = sorted({name for theirs in everyone for name in theirs})
    differ = [name for name in names if any(theirs.get(name) != everyone[0].get(name) for theirs in everyone)]
    if differ:
        shapes = [theirs.get(differ[0], ("absent",))[0] for theirs in everyone]
        raise PrepareError(
            f"generate() was given different {', '.join(differ)} on the ranks of one tp group (shapes {shapes}): they "
            f"compute one text together. Deal the prompts by data-parallel rank (a data loader that went through "
            f"accelerator.prepare does), not by process_index."
        )
