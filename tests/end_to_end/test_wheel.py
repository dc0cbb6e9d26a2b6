"""What a wheel and an sdist hold, and that an installed wheel runs in an empty folder."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hf_automodel_parallel import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["accelerate_configs", "docs", "examples", "hf_automodel_parallel"]
BUILD = "import setuptools.build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"

USE = """
from hf_automodel_parallel.cli import app, config

print("configs in", config.folder_of("accelerate_configs"))
app(["env"])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist, and the environment that the wheel was installed in, over the one of the tests."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / name for name in ("LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py")),
    ]:
        shutil.copy(path, folder)
    run([sys.executable, "-W", "ignore", "-c", BUILD], folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    target = folder / "installed"
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel], folder)
    return sdist, target


def run(command: list, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_installed_wheel(built, tmp_path):
    _, target = built
    names = {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    package = target / "hf_automodel_parallel"
    assert {path.name for path in (package / "accelerate_configs").iterdir()} == names
    assert (package / "examples" / "finetune_text.py").is_file() and (package / "py.typed").is_file()
    assert (package / "planner" / "page.html").is_file()
    assert (target / "bin" / "hf-automodel-parallel").is_file()
    shown = run([sys.executable, "-c", USE], tmp_path, PYTHONPATH=str(target))
    assert f"configs in {package}/accelerate_configs\n" in shown
    assert f"- hf-automodel-parallel: {__version__} ({package})" in shown


def test_sdist(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"accelerate_configs/cpu_tp2.yaml", "examples/finetune_text.py", "setup.py", "LICENSE"} <= names
    assert {"hf_automodel_parallel/plan_search/proven_record.json", "docs/install.md"} <= names
