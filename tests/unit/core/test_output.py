"""What a run prints by itself: one line on rank 0, as verbose, the environment and logging say."""

from __future__ import annotations

import logging

import pytest

from hf_automodel_parallel import AutoParallelismConfig, ConfigError
from hf_automodel_parallel.core import output
from hf_automodel_parallel.core.output import (
    DETAILS,
    SUMMARY,
    VERBOSE_VARIABLE,
    level_of_name,
    set_verbosity,
    tell,
    verbosity,
)

LOGGER = logging.getLogger("hf_automodel_parallel.of_this_test")


@pytest.fixture(autouse=True)
def plain_logging(monkeypatch):
    """As in a script that has not configured logging."""
    monkeypatch.delenv(VERBOSE_VARIABLE, raising=False)
    monkeypatch.setattr(output, "_level", SUMMARY)


@pytest.mark.parametrize(("level", "expected"), [(None, "summary"), (0, ""), (1, "summary"), (2, "summary detail")])
def test_levels(level, expected, capsys):
    set_verbosity(level)
    tell(LOGGER, "summary")
    tell(LOGGER, "detail", DETAILS)
    shown = capsys.readouterr()
    assert shown.err.replace("hf_automodel_parallel: ", "").split() == expected.split() and not shown.out


def test_no_level_keeps_the_level_that_was_given(capsys):
    """A second Accelerator or Trainer that says nothing about it."""
    set_verbosity(0)
    set_verbosity(None)
    tell(LOGGER, "summary")
    assert not capsys.readouterr().err


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    tell(LOGGER, "summary")
    assert not capsys.readouterr().err


def test_records_where_logging_shows_info(caplog, capsys):
    """Not both, and whatever the verbosity."""
    set_verbosity(0)
    with caplog.at_level(logging.INFO):
        tell(LOGGER, "detail", DETAILS)
    assert [record.getMessage() for record in caplog.records] == ["detail"] and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf_automodel_parallel", ""])
def test_levels_of_loggers_silence(name, capsys):
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        tell(LOGGER, "summary")
    finally:
        logger.setLevel(before)
    assert not capsys.readouterr().err


def test_where_the_level_comes_from(monkeypatch):
    """The option, then the environment, then the Trainer's log level."""
    assert verbosity(None) is None and verbosity(0) == 0
    assert [level_of_name(name) for name in ("passive", "debug", "info", "warning", "error")] == [None, 2, 1, 0, 0]
    monkeypatch.setenv(VERBOSE_VARIABLE, "2")
    assert verbosity(None) == 2 and verbosity(0) == 0
    monkeypatch.setenv(VERBOSE_VARIABLE, "loud")
    with pytest.raises(ConfigError, match=f"{VERBOSE_VARIABLE}='loud': give 0 "):
        AutoParallelismConfig(tp_size=2)
    assert AutoParallelismConfig(tp_size=2, verbose=1).verbose == 1, "wins"
    with pytest.raises(ConfigError, match="verbose=3: give 0, 1 or 2"):
        AutoParallelismConfig(tp_size=2, verbose=3)


def test_a_progress_bar_stays_whole(capsys):
    """A line does not end in the middle of a bar."""
    from tqdm import tqdm

    with tqdm(total=2) as bar:
        bar.update()
        tell(LOGGER, "summary")
    last = capsys.readouterr().err.rpartition("hf_automodel_parallel: summary\n")[0].rpartition("\r")[2]
    assert not last.strip()
