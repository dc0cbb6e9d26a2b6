"""What a run says by itself: short lines of rank 0, on stderr, or as records of ``logging`` where that shows INFO.

The option ``verbose`` decides which lines are printed. Under a progress bar of tqdm a line does not break the bar.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError

#: Environment variable with the value of the option ``verbose`` where a config does not set it.
VERBOSE_VARIABLE = "HF_AUTO_PARALLEL_VERBOSE"

#: Values of ``verbose``: nothing; what a run is and does, in a few lines; each entry of the plan as well.
QUIET, SUMMARY, DETAILS = 0, 1, 2

_PACKAGE = __name__.partition(".")[0]

_level = SUMMARY


def verbosity(option: int | None) -> int | None:
    """The level that the option ``verbose`` or the environment asks for; None if neither says anything.

    Raises:
        ConfigError: the environment variable is no such level.
    """
    text = os.environ.get(VERBOSE_VARIABLE, "").strip()
    if option is not None or not text:
        return option
    if text not in ("0", "1", "2"):
        raise ConfigError(
            f"the environment variable {VERBOSE_VARIABLE}={text!r}: give 0 (nothing), 1 (a summary) or 2 (each entry "
            "of the plan, too)."
        )
    return int(text)


def set_verbosity(level: int | None) -> None:
    """Set which lines this process prints, :data:`SUMMARY` at first; None: as before."""
    global _level
    if level is not None:
        _level = level


def level_of_name(name: str) -> int | None:
    """The level for the Trainer's ``log_level``; None for its default, "passive"."""
    return {"debug": DETAILS, "detail": DETAILS, "info": SUMMARY}.get(name, None if name == "passive" else QUIET)


def size_text(size: float) -> str:
    """Bytes with three digits and a binary unit: "1.48 GiB"."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            value = size / factor
            return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{size:.0f} B"


def tell(logger: logging.Logger, line: str, level: int = SUMMARY) -> None:
    """Print ``line`` on rank 0 if the verbosity is at least ``level``.

    Where ``logger`` has handlers for INFO, they get the line instead. A level of the logger above INFO that the user
    has set for the package, or above WARNING for all, silences it.
    """
    if (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) != 0:
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
        return
    own = logging.getLogger(_PACKAGE).level
    if own > logging.INFO or logger.getEffectiveLevel() > logging.WARNING:
        return
    if _level >= level:
        _print(f"{_PACKAGE}: {line}\n")


def _print(text: str) -> None:
    tqdm: Any = sys.modules.get("tqdm")
    try:
        if tqdm is None or sys.stderr is None:
            print(text, end="", file=sys.stderr, flush=True)
        else:
            tqdm.tqdm.write(text, file=sys.stderr, end="")  # moves a progress bar out of the way
    except (OSError, ValueError):
        pass  # nobody reads: a pipe whose reader has gone, a stream that was closed. The training goes on.
