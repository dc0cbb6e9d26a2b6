"""Repeated layers: how many of them are run, and what that says about all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.model_structure import find_structure
from ..core.model_view import ModelView
from ..core.sharding_spec import ShardingSpec
from ..plan.analysis.equal_layers import EqualLayers

#: The first two layers are different from others, as are the last two: FSDP2 gathers two layers ahead, and does not
#: reshard the last one.
_AT_ONE_END = 2
_LEAST = 2 * _AT_ONE_END


def depths(kinds: list[Any]) -> tuple[int, int] | None:
    """Two depths at which a stack is run; every depth in steps of their difference is then known.

    Layers may differ at the beginning (dense before experts), and repeat with a period (sliding before full attention).
    Both depths end like the whole stack.

    Args:
        kinds: equal for layers that compute the same.

    Returns:
        (few, many); None: run all layers.
    """
    total = len(kinds)
    best: tuple[int, int] | None = None
    for period in range(1, total // 2 + 1):
        start = next((i for i in range(total - period, 0, -1) if kinds[i - 1] != kinds[i - 1 + period]), 0)
        # FSDP2 gathers ahead while the last layers' backward runs: not yet layers of another kind at the beginning.
        ahead = _AT_ONE_END if start else 0
        least = max(start + max(period, _AT_ONE_END) + ahead, _LEAST)
        few = least + (total - least) % period
        if few + period < total and (best is None or few + period < best[1]):
            best = (few, few + period)
    return best


def stack_of(model: nn.Module) -> tuple[nn.ModuleList, list[Any]] | None:
    """The list that holds all layers of ``model``, and the kind of each; None if they are in several places."""
    view = ModelView.of(model)
    layers = find_structure(view).layers
    names = {module: name for name, module in model.named_modules()}
    holders = [m for m in model.modules() if isinstance(m, nn.ModuleList) and layers and list(m) == layers]
    if len(holders) != 1:
        return None
    equal = EqualLayers(model, ShardingSpec(), layers, names)
    return holders[0], [equal.first.get(names[layer], names[layer]) for layer in layers]


def shorten(model: nn.Module, layers: int) -> None:
    """Keep the first ``layers`` layers of ``model``, in place."""
    found = stack_of(model)
    if found is not None:
        del found[0][layers:]


def extrapolate(few: Any, many: Any, steps: int) -> Any:
    """The figures of a stack of ``few``'s depth plus ``steps`` times the difference to ``many``'s.

    Numbers grow by their difference. Of the peaks of layers' backwards the first and the last layers are known, between
    which they grow evenly, so the highest is among these.
    """
    if isinstance(few, dict):
        result = {}
        for key in [*few, *(key for key in many if key not in few)]:
            if key == "peaks":
                result[key] = _peaks(few[key], many[key], steps)
            elif key == "layer":
                result[key] = many[key]  # one of those that repeat
            else:
                zero: Any = [0, 0, 0]
                result[key] = extrapolate(few.get(key, zero), many.get(key, zero), steps)
        return result
    if isinstance(few, list):
        return [extrapolate(a, b, steps) for a, b in zip(few, many)]
    return few + steps * (many - few)


_OF_LAYER = "backward of layer "


def _peaks(few: dict[str, int], many: dict[str, int], steps: int) -> dict[str, int]:
    result: dict[str, int] = {}
    depth, deeper = (1 + max((_index(n) for n in found if n.startswith(_OF_LAYER)), default=0) for found in (few, many))
    # With a period of one the last two layers are the ones of the end, else a whole period is.
    begin = depth - max(deeper - depth, _AT_ONE_END)
    for name, peak in few.items():
        other, phase = name, name
        if name.startswith(_OF_LAYER):
            phase = "layers' backward"
            if _index(name) >= begin:
                other = f"{_OF_LAYER}{_index(name) + deeper - depth}"
        highest = peak + steps * (many.get(other, peak) - peak)
        result[phase] = max(result.get(phase, 0), highest)
    return result


def _index(name: str) -> int:
    return int(name.removeprefix(_OF_LAYER))
