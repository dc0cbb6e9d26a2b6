"""A barrier with a timeout before a save, a stream or a read, and a comparison, over the store of the default group.

``if accelerator.is_main_process: model.save_pretrained(...)`` is a common idiom. On a sharded model this one rank would
wait forever in the first collective. The store needs neither a collective nor a backend, so the wait can time out and
the error can name the missing ranks.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .. import compat
from ..errors import ConfigError, ExportError, UnsupportedError
from .ranks import Difference

#: Environment variable: seconds that a rank waits for the other ranks, which may still be computing.
TIMEOUT_VARIABLE = "HF_AUTOMODEL_PARALLEL_SAVE_TIMEOUT"
_DEFAULT_SECONDS = 60.0
#: Longer where nothing says that the other ranks are close: one may be writing files before it reads.
DEFAULT_SECONDS_OF_READS = 300.0

_TAKE_OUT = "Take it out of `if accelerator.is_main_process:`"
_ONE_WRITES = f"{_TAKE_OUT} (only one rank writes anyway)."
#: The remedy for a call that only reads.
ALL_ITERATE = f"{_TAKE_OUT}; a rank that does not need the result loops with `pass`."

#: Store -> number of rendezvous so far. A rank that missed some catches up at its next one. A new process group has a
#: new store, so that all ranks start at 0 again.
_counts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
#: The same for :func:`wait_for_ranks`: store -> purpose and ranks -> number of calls.
_reads: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


def timeout_seconds(default: float = _DEFAULT_SECONDS) -> float:
    """Seconds that a rank waits for the other ranks: the value of the environment variable, or ``default``.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(
            f"{TIMEOUT_VARIABLE}={text!r}: give the seconds that a rank waits for the others before it saves or reads."
        )
    return seconds


def wait_for_ranks(ranks: list[int], what: str, remedy: str) -> None:
    """Wait until ``ranks``, this one among them, have called this for the same purpose as often.

    Args:
        ranks: global ranks, in the same order on all of them.
        what: what they are about to do, as a clause for the error.
        remedy: a sentence for the error.

    Raises:
        UnsupportedError: a rank is missing after the timeout; the message names it.
        ConfigError: see :func:`timeout_seconds`.
    """
    if compat.ranks_are_simulated():  # their store stores nothing
        return
    root, rank, seconds = compat.rendezvous_store(), dist.get_rank(), timeout_seconds(DEFAULT_SECONDS_OF_READS)
    counts = _reads.setdefault(root, {})
    key = f"{what}/{'-'.join(map(str, ranks))}"
    count = counts[key] = counts.get(key, -1) + 1
    store = dist.PrefixStore(f"hf_automodel_parallel/{key}", root)
    store.set(f"{count}/{rank}", "")
    keys = {other: f"{count}/{other}" for other in ranks}
    if not _waited(store, list(keys.values()), seconds):
        missing = ", ".join(str(other) for other, name in keys.items() if not store.check([name]))
        store.delete_key(f"{count}/{rank}")  # a rank that comes late must not take this one for present
        raise UnsupportedError(
            f"rank {rank} {what}, which is a collective, and rank {missing} did not within {seconds:g} s. {remedy} If "
            f"the ranks are only late, set {TIMEOUT_VARIABLE} to more seconds."
        )
    if count > 0:
        store.delete_key(f"{count - 1}/{rank}")  # all ranks have come here, so they have seen it


def rendezvous(
    what: str,
    details: Mapping[str, Any],
    writes: bool = True,
    default_seconds: float = _DEFAULT_SECONDS,
    remedy: str = _ONE_WRITES,
) -> list[int]:
    """Wait until all ranks have called the same save or stream.

    Args:
        what: the call, as the user writes it.
        details: values that must be the same on all ranks; JSON types.
        writes: this rank asks to write files (``is_main_process``); may differ across ranks.
        default_seconds: how long a rank waits, without the environment variable.
        remedy: a sentence for the error about a missing rank.

    Returns:
        The ranks that write: rank 0 alone if none or all of them asked for it.

    Raises:
        ExportError: a rank is missing after the timeout, or made another call; the message names ranks and remedy.
        ConfigError: see :func:`timeout_seconds`.
    """
    rank, seconds = dist.get_rank(), timeout_seconds(default_seconds)
    mine = json.dumps({"call": what, **details}, sort_keys=True, default=str)
    while True:
        root = compat.rendezvous_store()
        count = _counts.get(root, 0)
        store = dist.PrefixStore(f"hf_automodel_parallel/save/{count}", root)
        store.set(f"here/{rank}", json.dumps([mine, writes]))
        if rank == 0:
            store.set("verdict", json.dumps(_verdict(store, what, mine, writes, seconds, remedy)))
        elif not _waited(store, ["verdict"], 2 * seconds + 5):  # rank 0 itself waits up to `seconds` first
            # Withdraw: a late rank 0 must not count this rank, which leaves with an error.
            store.delete_key(f"here/{rank}")
            raise ExportError(_missing(what, [0], seconds, remedy))
        verdict = json.loads(store.get("verdict"))
        _counts[root] = count + 1
        if rank in verdict["missing"]:
            # The other ranks timed out on this number before this rank came. Try the next number: they may have called
            # the save again since.
            continue
        if verdict["error"]:
            raise ExportError(verdict["error"])
        return verdict["writers"]


#: Store -> number of comparisons so far, by the ranks that compare.
_comparisons: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()


def difference_over_store(value: Any, group: dist.ProcessGroup) -> Difference[Any] | None:
    """Compare ``value`` (JSON types) across ``group`` without a collective; None if all are equal.

    All ranks of the group call it equally often. A rank that does not come within the timeout is left out: whatever
    the ranks do together next waits for it.
    """
    root, rank, members = compat.rendezvous_store(), dist.get_rank(), dist.get_process_group_ranks(group)
    name = "-".join(map(str, members))
    counts = _comparisons.setdefault(root, Counter())
    counts[name] += 1
    count, store = counts[name], dist.PrefixStore(f"hf_automodel_parallel/same/{name}", root)
    store.set(f"{count}/{rank}", json.dumps(value))
    store.delete_key(f"{count - 2}/{rank}")  # all others have read it, or they would not have come to the one after it
    if not _waited(store, [f"{count}/{member}" for member in members], timeout_seconds()):
        return None
    everyone = [json.loads(store.get(f"{count}/{member}")) for member in members]
    ranks = [number for number, theirs in enumerate(everyone) if theirs != everyone[0]]
    return Difference(ranks, everyone[0], everyone[ranks[0]]) if ranks else None


def _verdict(store: Any, what: str, mine: str, writes: bool, seconds: float, remedy: str) -> dict[str, Any]:
    """On rank 0: wait for all other ranks and compare their calls. Returns the writers, missing ranks and an error."""
    world = dist.get_world_size()
    if _waited(store, [f"here/{rank}" for rank in range(world)], seconds):
        missing = []
    else:
        missing = [rank for rank in range(world) if not store.check([f"here/{rank}"])]
    calls = {rank: json.loads(store.get(f"here/{rank}")) for rank in range(world) if rank not in missing}
    other = next((rank for rank, (call, _) in calls.items() if call != mine), None)
    writers = [rank for rank, (_, asked) in calls.items() if asked]
    error = None
    if missing:
        error = _missing(what, missing, seconds, remedy)
    elif other is not None:
        error = f"{what}: rank 0 called {mine}, rank {other} called {calls[other][0]}. All ranks call it alike."
    return {"writers": writers if 0 < len(writers) < world else [0], "missing": missing, "error": error}


def _waited(store: Any, keys: list[str], seconds: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except (RuntimeError, dist.DistStoreError):
        return False
    return True


def _missing(what: str, ranks: list[int], seconds: float, remedy: str) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return (
        f"{what} on a sharded model is called by all ranks, because each holds a shard of the weights; rank {shown} "
        f"did not come within {seconds:g} s. {remedy} If the ranks are there but late, set {TIMEOUT_VARIABLE} to more "
        f"seconds."
    )
