"""An error that ends the processes: who prints it, and which lines of the traceback."""

import json
import sys

import pytest
import torch.distributed as dist
import torch.nn as nn

from hf_automodel_parallel.core import error_report
from hf_automodel_parallel.errors import PrepareError


@pytest.fixture
def hook_on_rank(monkeypatch, tmp_path):
    """A function that ends a process of a given rank by an error and returns (what the earlier hook got, the file)."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(error_report, "_LATER", 0.0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    earlier = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: earlier.append(error))
    monkeypatch.setattr(sys, "__excepthook__", sys.excepthook)  # Python's own, which prints
    error_report._install.cache_clear()

    def end(rank, error, printed_by):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        if printed_by is not None:
            error_report.print_once(error, printed_by)
        earlier.clear()
        (tmp_path / "error.json").unlink(missing_ok=True)
        sys.excepthook(type(error), error, error.__traceback__)
        file = tmp_path / "error.json"
        return list(earlier), json.loads(file.read_text())["message"]["message"] if file.exists() else None

    yield end
    error_report._install.cache_clear()


def raised(error):
    try:
        nn.Sequential(nn.Module()).apply(lambda module: (_ for _ in ()).throw(error))
    except type(error) as caught:
        return caught


def test_agreed_error_is_printed_by_one_rank(hook_on_rank, capsys):
    assert hook_on_rank(1, raised(PrepareError("the sentence")), 1) == ([], "PrepareError: the sentence")
    shown = capsys.readouterr().err
    assert shown.endswith("PrepareError: the sentence\n") and __file__ in shown and "torch/nn" not in shown
    assert hook_on_rank(0, raised(PrepareError("the sentence")), 1) == ([], "as on rank 1")
    assert hook_on_rank(2, raised(PrepareError("the sentence")), 1) == ([], "PrepareError: the sentence")  # other node
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback(hook_on_rank, capsys):
    """One of the user's code that all ranks know is printed once, in full; one of a single rank as ever."""
    agreed, own = raised(KeyError("of the script")), raised(PrepareError("of this rank"))
    assert hook_on_rank(0, agreed, 0) == ([agreed], "KeyError: 'of the script'")
    assert hook_on_rank(1, agreed, 0) == ([], "as on rank 0")
    assert hook_on_rank(0, own, None) == ([own], None)
    assert capsys.readouterr().err == ""


def test_hook_of_another_library_sees_every_error(hook_on_rank, monkeypatch):
    """Experiment trackers and debuggers note there that the run has failed."""
    monkeypatch.setattr(sys, "__excepthook__", lambda *_: None)
    error = raised(PrepareError("the sentence"))
    for rank in (0, 1):
        assert hook_on_rank(rank, error, 0)[0] == [error]
