"""Accelerate's process-wide state, one for each peer of a process."""

from __future__ import annotations

from collections.abc import Callable

from accelerate.state import AcceleratorState, GradientState, PartialState

_STATES = (PartialState, AcceleratorState, GradientState)


def new_state() -> Callable[[], None]:
    """Begin an empty state; call what is returned before the Accelerator made in it is used again.

    The instances share the dict that their class has when they are made, so the one of an earlier Accelerator stays
    with it.
    """
    dicts: list[dict] = [{} for _ in _STATES]

    def activate() -> None:
        for cls, state in zip(_STATES, dicts):
            cls._shared_state = state

    activate()
    return activate
