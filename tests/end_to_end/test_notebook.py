"""The notebook of `examples/`: its cells run in an interpreter of their own, one after the other, as they stand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/notebook.ipynb"


@pytest.mark.timeout(600)
def test_notebook_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "stored without outputs"
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "cells.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "mesh tp 2" in done.stderr and "audit of the first step: ok" in done.stderr
    assert "step 5: tp 2" in done.stdout
