"""The benchmarks' result files and the page that is made of them; ``make bench-smoke`` runs the suites."""

import sys
from pathlib import Path

import pytest
import torch

import hf_automodel_parallel

# The benchmarks are not installed.
sys.path.insert(0, str(Path(hf_automodel_parallel.__file__).resolve().parents[1]))

from benchmarks import report, run, tables, timing
from benchmarks.recorder import KEYS, RESULTS, Recorder, read_results


def test_the_page_is_made_of_the_results():
    """docs/benchmarks.md is what ``python -m benchmarks.report`` makes of the committed result files."""
    assert report.PAGE.read_text() == report.render(read_results(RESULTS))


def test_every_result_file_says_where_it_comes_from():
    results = read_results(RESULTS)
    assert results
    for name, result in results.items():
        assert tuple(result) == KEYS, name
        assert name.startswith(f"{result['suite']}-{result['workload']}")
        assert result["command"].startswith("python -m benchmarks.run --suite")
        assert {"python", "torch", "transformers"} <= set(result["versions"])
        assert result["hardware"]["cores"]
        assert len(result["commit"].removesuffix("+changes")) == 12, name


def test_a_result_file_has_all_keys(tmp_path):
    recorder = Recorder(tmp_path, "cpu", "python -m benchmarks.run --suite cpu")
    path = recorder.record("nothing", [{"a": 1}], {"rounds": 2}, [{"what": "b", "why": "c"}], case="tp2")
    assert path.name == "cpu-nothing-tp2.json"
    result = read_results(tmp_path)["cpu-nothing-tp2"]
    assert tuple(result) == KEYS
    assert result["versions"]["torch"] == torch.__version__
    assert result["rows"] == [{"a": 1}] and result["settings"] == {"rounds": 2}
    assert "* c (b)" in tables.not_measured({"cpu-nothing-tp2": result})


def test_a_smoke_run_fails_where_ours_is_missing(tmp_path):
    recorder = Recorder(tmp_path, "cpu", "", smoke=True)
    recorder.record("step_time", [{"peers": {"ours": {}}}])
    for rows in ([], [{"peers": {"floor": {}}}]):
        with pytest.raises(SystemExit, match="ours was not measured"):
            recorder.record("step_time", rows)


def test_ratios_are_of_rounds():
    """The median of the ratios, not the ratio of the medians; over ranks the longest wall clock and the sum of CPU."""
    ranks = [
        {"floor": ([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), "ours": ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])},
        {"floor": ([0.5, 2.0, 4.0], [1.0, 1.0, 1.0]), "ours": ([1.0, 2.0, 2.0], [1.0, 2.0, 3.0])},
    ]
    figures = timing.compared(timing.over_ranks(ranks))
    assert figures["floor"]["ours_over_it_wall"] == [0.75, 1.0, 1.5]
    assert figures["floor"]["ours_over_it_cpu"] == [1.5, 2.0, 2.5]
    assert figures["floor"]["cpu_s"] == [2.0, 2.0, 2.0]
    assert "ours_over_it_wall" not in figures["ours"]


def test_in_turn():
    order = []

    class Step:
        def __init__(self, name):
            self.name = name

        def prepare(self):
            order.append(f"prepare {self.name}")

        def __call__(self):
            order.append(self.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.dist, "barrier", lambda: order.append("barrier"))
        times = timing.in_turn({name: Step(name) for name in "ab"}, rounds=2, warmup=0)
    assert order == ["prepare a", "barrier", "a", "prepare b", "barrier", "b"] * 2
    assert [len(part) for name in "ab" for part in times[name]] == [2] * 4


@pytest.mark.parametrize("suite", ["cpu", "scale"])
def test_help(suite, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--suite", suite, "--help"])
    assert end.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "cpu", "--only", "nonsense"], "--only nonsense: choose from step_time"),
        (["--suite", "cpu", "--only", "step_time", "--peers", "nobody"], "--peers nobody: choose from floor"),
    ],
)
def test_unknown_names(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run.main([*arguments, "--out", str(tmp_path)])


def test_plots_without_matplotlib(monkeypatch, tmp_path):
    from benchmarks import plots

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"need matplotlib: pip install -e '\.\[bench\]'"):
        plots.draw({}, tmp_path)
