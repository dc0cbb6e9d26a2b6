"""``generate`` on a prepared model: a tp group draws the same tokens, and all ranks that share parameters run the
same number of forwards.
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

#: Arguments that hold a decoder's tokens; the first one that is present counts.
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


def guard_generation(model: nn.Module, context: ParallelizeContext) -> None:
    """Make ``model.generate`` safe on every mesh, on this instance alone. A model without ``generate`` is unchanged.

    * The ranks of a tp group need one prompt and one random state. If they drew different tokens, each would continue
      with a cache of another text, and the first rank to stop would leave the others in a collective. A script may have
      seeded each process by its index (Accelerate's ``set_seed(..., device_specific=True)``), so the random state is
      synchronised.
    * Data-parallel ranks that shard the same parameters run the same number of forwards, whatever the lengths of their
      texts. If a rank fails between two forwards (in a user's logits processor), all of them raise. See
      :class:`_Together`.

    Args:
        model: the prepared model, PEFT-wrapped or not.
        context: how it was prepared.

    Raises:
        PrepareError: from ``generate``, on all ranks of a tp group: their prompts differ; or on the other ranks, if
            one rank fails.
    """
    inner = ModelView.of(model).inner
    if not hasattr(inner, "generate") or _GUARDED in inner.__dict__:
        return
    if hasattr(model, "generate"):
        # FSDP2 unshards the root's own parameters in the root's forward, which generate() bypasses: PEFT's wrapper
        # delegates to the inner model, and an encoder (whose embedding is tied to the decoder's) is called alone.
        register_fsdp_forward_method(model, "generate")
    data_parallel = context.dp_mesh
    shared_parameters = data_parallel.size(data_parallel.ndim - 1) > 1
    tp_mesh = context.tp_mesh
    # If FSDP2 all-gathers parameters in generate(), all ranks take part; otherwise each tp group generates alone.
    group = context.group if shared_parameters or tp_mesh is None else tp_mesh.get_group()
    together = _Together(inner, group) if shared_parameters or tp_mesh is not None else None
    original: Callable[..., Any] = inner.generate  # type: ignore[assignment]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if tp_mesh is not None:
            with raise_on_all_ranks("generate", group):
                # Before the random state is synchronised: different prompts are an error, different seeds are
                # repaired.
                _check_same_prompt([*enumerate(args), *kwargs.items()], tp_mesh)
            synchronize_rng(tp_mesh)
        if together is None:
            return original(*args, **kwargs)
        # _Together takes the place of synced_gpus.
        return together.run(original, *args, **(kwargs | {"synced_gpus": False}))

    inner.generate = generate  # type: ignore[assignment]
    inner.__dict__[_GUARDED] = True


#: What a rank contributes to the all-reduce (MAX) in front of a forward.
_DONE, _WRITES, _FAILED = 0, 1, 2


class _OtherRankFailed(PrepareError):
    """Another rank reported a failure; a class of its own, so that this rank does not report it again."""


class _Together:
    """The same number of forwards on all ranks, because each forward all-gathers parameters or reduces over tp.

    Before each forward of a generation one all-reduce finds out whether any rank still generates. A rank that has
    finished runs forwards of one token until all have. transformers' ``synced_gpus`` has this purpose, but it lets a
    finished rank continue with its own cache and mask, which fails with a static cache and with ``use_cache=False``
    (5.24).
    """

    def __init__(self, inner: nn.Module, group: dist.ProcessGroup | None) -> None:
        self._inner, self._group = inner, group
        self._writing = False
        self._inputs: dict[str, Any] | None = None
        # Before FSDP2's own pre-forward hook, which all-gathers.
        inner.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)

    def run(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``generate``, run one-token forwards until all ranks are done, and return its result."""
        self._writing, self._inputs = True, None
        try:
            result = generate(*args, **kwargs)
        except _OtherRankFailed as failed:
            raise PrepareError(str(failed)) from None
        except Exception:
            self._tell(_FAILED)  # the other ranks wait before their next forward, or at the end
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
        # Forwards outside of generate() (training, evaluation) need no agreement.
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
        """All-reduce (MAX) of the ranks' values."""
        said = torch.tensor(mine, device=communication_device())
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group)
        return int(said.item())


def _one_token(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a forward like this one for the first token of each row, without a cache."""
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
    gathered = gather_objects(mine, tp_mesh.get_group())
    names = sorted({name for theirs in gathered for name in theirs})
    differ = [name for name in names if any(theirs.get(name) != gathered[0].get(name) for theirs in gathered)]
    if differ:
        shapes = [theirs.get(differ[0], ("absent",))[0] for theirs in gathered]
        raise PrepareError(
            f"generate() was given different {', '.join(differ)} on the ranks of one tp group (shapes {shapes}): they "
            f"compute one text together. Deal the prompts by data-parallel rank (a data loader that went through "
            f"accelerator.prepare does), not by process_index."
        )
