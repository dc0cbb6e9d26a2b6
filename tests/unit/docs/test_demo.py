"""The end of `make demo`: its table is red where losses differ, and its curves are those of the runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hf_automodel_parallel

EXAMPLES = Path(hf_automodel_parallel.__file__).resolve().parents[1] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    yield demo
    for name in ("demo", "finetune_text"):
        sys.modules.pop(name, None)


def result(root: Path, adapter: float) -> Path:
    """The result of a run with this loss of the adapter."""
    history = {"full": {str(step): 7.0 - step / 20 for step in range(1, 61)}, "LoRA": {"1": 4.5, "2": 4.25}}
    record = {"processes": 4, "losses": {"base": 4.5, "adapter": adapter}, "history": history}
    (root / "run.json").write_text(json.dumps(record))
    return root


@pytest.mark.parametrize(
    ("trained", "loaded", "status"),
    [(4.25, 4.25, 0), (4.25, 4.2503, 1), (float("nan"), 4.25, 1)],
    ids=["agree", "differ", "nan"],
)
def test_table(demo, tmp_path, monkeypatch, capsys, trained, loaded, status):
    said = f"a line\n{json.dumps({'base': 4.5, 'adapter': loaded})}\n"
    monkeypatch.setattr(
        demo.finetune_text.subprocess, "run", lambda *args, **more: SimpleNamespace(returncode=0, stdout=said)
    )
    assert demo.finetune_text.compare(result(tmp_path, trained)) == status
    shown = capsys.readouterr().out
    assert f"{loaded:.6f}" in shown and ("agree" in shown) is (status == 0)


def test_curves(demo, tmp_path, monkeypatch, capsys):
    """Two in full training, where the mesh changes after the checkpoint; one of LoRA."""
    drawn = []

    def plot_to_string(xs, ys, legend_labels, **more):
        drawn.append({label: (x[0], x[-1], y[0]) for label, x, y in zip(legend_labels, xs, ys, strict=True)})
        return "a plot"

    monkeypatch.setitem(sys.modules, "uniplot", SimpleNamespace(plot_to_string=plot_to_string))
    demo.plot(result(tmp_path, 4.25))
    assert drawn == [{"tp 2 x FSDP2 2": (1, 20, 6.95), "FSDP2 4": (21, 60, 5.95)}, {"FSDP2 4": (1, 2, 4.5)}]
    assert capsys.readouterr().out.count("a plot") == 2


def test_a_model_under_terms_is_not_fetched_unasked():
    script = [sys.executable, str(EXAMPLES / "gemma_gguf.py")]
    found = subprocess.run(script, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "Gemma Terms of Use" in found.stderr and not found.stdout
