"""Expert parallelism is asked for in transformers' own configuration; here it is refused by name, never dropped."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.model_view import ModelView
from ..errors import UnsupportedError


def refuse_expert_parallel(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if the model's ``distributed_config`` asks for experts dealt out over ranks.

    transformers carries that out while it loads a model; on a model that is already built the request would have no
    effect.
    """
    inner = ModelView.of(model).inner
    wanted = getattr(getattr(inner, "config", None), "distributed_config", None)

    def field(name: str) -> Any:
        return wanted.get(name) if isinstance(wanted, dict) else getattr(wanted, name, None)

    size = field("ep_size")
    asked = f"ep_size={size}" if isinstance(size, int) and size > 1 else ""
    asked = asked or ("enable_expert_parallel=True" if field("enable_expert_parallel") is True else "")
    if wanted is not None and asked:
        raise UnsupportedError(
            f"config.distributed_config of {type(inner).__name__} has {asked}: expert parallelism (whole experts dealt "
            f"out over ranks) is not available. Use tp_size, which gives every rank a slice of every expert, so that "
            f"it holds 1/tp_size of their bytes, and remove distributed_config from the config."
        )
