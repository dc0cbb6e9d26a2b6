"""Uses of sharded parameters that DTensor does not support, each explained in one sentence.

* ``parameter.data = value``: DTensor keeps its shard, and the assignment has no effect.
* A parameter that is read where it is a DTensor (another module's forward, a penalty over ``parameters()``) and
  combined with plain tensors. :mod:`..plan.analysis.cross_module_reads` shows those in full that the source of a
  forward names; torch raises at the others, in forward or backward.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import compat
from ..errors import PrepareError, UnsupportedError

_MIXED = "mixed torch.Tensor and DTensor"
_REMEDY = (
    "Read it with hf_automodel_parallel.full_parameter(parameter), in penalties over parameters(), too; or name it in "
    "the forward as an attribute of self (self.lm_head.weight), which is found and shown in full; or let its own "
    "module compute with it."
)


class AssignedData:
    """Finds parameters whose ``.data`` was assigned since ``prepare``.

    The assignment replaces the memory behind the wrapper, which a DTensor does not use, and leaves its shard.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = {
            name: (parameter, parameter.untyped_storage(), weakref.ref(_local(parameter)))
            for name, parameter in model.named_parameters()
            if isinstance(parameter, DTensor)
        }

    def check(self) -> None:
        """Raise :class:`PrepareError` if there are any."""
        assigned = []
        for name, (parameter, storage, shard) in self._known.items():
            now = parameter.untyped_storage()
            if now is not storage:
                if _local(parameter) is shard():
                    assigned.append(name)
                else:  # replaced as a whole, shard included (torch.utils.swap_tensors; model.to() of another device)
                    self._known[name] = (parameter, now, weakref.ref(_local(parameter)))
        if assigned:
            raise PrepareError(
                f"{', '.join(assigned[:4])}{', ...' if len(assigned) > 4 else ''}: parameter.data was assigned since "
                f"accelerator.prepare, which has no effect on a sharded parameter. Write into it instead, under "
                f"torch.no_grad(): parameter.copy_(value) with a DTensor of the same placements "
                f"(torch.distributed.tensor.distribute_tensor(full, parameter.device_mesh, parameter.placements)), or "
                f"assign before prepare."
            )


def _local(parameter: DTensor) -> torch.Tensor:
    """The shard itself (``to_local`` returns a view of a parameter's), by torch's protocol for tensor subclasses."""
    return getattr(parameter, parameter.__tensor_flatten__()[0][0])  # type: ignore[no-untyped-call]


def explain_reads(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook (always called): explain an error of DTensor, and refuse a loss that is a DTensor, at which the
    backward would fail.
    """
    error = sys.exc_info()[1]
    if error is not None:
        explain(error)
    elif any(isinstance(x, DTensor) and x.ndim == 0 for x in compat.tree_leaves(_values(output))):
        raise UnsupportedError(
            f"the forward of {type(model).__name__} returned a loss that is a DTensor: it combines a sharded "
            f"parameter with activations outside of the parameter's module. {_REMEDY}"
        )


def _values(output: Any) -> Any:
    return list(output.values()) if isinstance(output, dict) else output


def explain(error: BaseException) -> None:
    """Put the reason in front of the message of ``error``, in place, if it is DTensor's."""
    if not isinstance(error, RuntimeError) or _MIXED not in str(error) or _REMEDY in str(error):
        return
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_user(frame.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    error.args = (
        f"a sharded parameter was read outside of its own module's forward and combined with plain tensors{where}. "
        f"{_REMEDY} [{error}]",
    )


def _is_of_user(file: str) -> bool:
    roots = [Path(module.__file__ or "").parent for module in (torch, sys.modules[__package__.partition(".")[0]])]
    return not file.startswith("<") and not any(root in Path(file).parents for root in roots)
