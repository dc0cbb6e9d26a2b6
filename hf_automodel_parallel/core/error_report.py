"""How an error that all ranks agreed on ends the processes: it is printed once, last and short.

Each rank raises such an error, and each would print its traceback; under torchrun the lines of all ranks mix, and the
summary at the end knows no reason. The hook is set when the first such error is raised, and leaves all other errors to
the hook that was there before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from ..errors import AutoParallelError

_PACKAGE = str(Path(__file__).resolve().parents[1])
_STANDARD = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))

#: Attribute of an error: the rank that prints it.
_PRINTED_BY = "printed_by_rank"

#: Seconds after which the other ranks end. A launcher kills all ranks when the first one ends: that has to be the one
#: that prints.
_LATER = 1.0


def print_once(error: BaseException, rank: int) -> None:
    """Let rank ``rank`` alone print ``error``, which all ranks raise, if it ends the processes."""
    setattr(error, _PRINTED_BY, rank)
    _install()


@functools.cache
def _install() -> None:
    previous = sys.excepthook
    # Python's own, or torch.distributed's, which puts the rank in front of each line: they would print once more.
    prints = previous is sys.__excepthook__ or str(getattr(previous, "__module__", "")).partition(".")[0] == "torch"

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        rank = getattr(error, _PRINTED_BY, None)
        if rank is None or not dist.is_initialized():
            previous(kind, error, trace)
            return
        _record(error, rank)
        if rank != dist.get_rank():
            time.sleep(_LATER)
        elif isinstance(error, AutoParallelError):
            sys.stderr.write(_short(kind, error, trace))  # in one piece: other ranks may write, too
        if not prints or (rank == dist.get_rank() and not isinstance(error, AutoParallelError)):
            previous(kind, error, trace)  # an experiment tracker notes there that the run has failed
        sys.stderr.flush()

    sys.excepthook = hook


def _short(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str:
    """The traceback with the user's own frames alone: neither libraries nor this package can be changed by them."""
    frames = [frame for frame in traceback.extract_tb(trace) if _is_users(frame.filename)]
    lines = (
        ["Traceback (of all ranks, without the lines of libraries):\n", *traceback.format_list(frames)]
        if frames
        else []
    )
    return "".join([*lines, *traceback.format_exception_only(kind, error)])


def _is_users(file: str) -> bool:
    path = os.path.abspath(file)
    library = "site-packages" in path or "dist-packages" in path or path.startswith((_PACKAGE + os.sep, *_STANDARD))
    return not (library or file.startswith("<"))


def _record(error: BaseException, printed_by: int) -> None:
    """Write the sentence where torchrun looks for the reason of a failure, for its summary; nothing without torchrun.

    torch's own ``record`` decorator writes the whole traceback; if the script uses it, this replaces it. The summary
    takes the earliest failure for the root cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    sentence, now = f"{type(error).__name__}: {error}", int(time.time())
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if dist.get_rank() != printed_by:
        now += 1
        if dist.get_rank() // ranks_per_node == printed_by // ranks_per_node:  # else torchrun's summary is another one
            sentence = f"as on rank {printed_by}"
    details = {"py_callstack": sentence, "timestamp": str(now)}
    with contextlib.suppress(OSError):  # the error itself is printed all the same
        Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))
