"""The troubleshooting page has an entry for every error class, and quotes messages that exist."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import hf_automodel_parallel
from hf_automodel_parallel import AutoParallelError

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", PAGE, re.S | re.M))


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(one) for one in cls.__subclasses__()))


def test_every_error_class_has_a_section():
    for module in pkgutil.walk_packages(hf_automodel_parallel.__path__, "hf_automodel_parallel."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {
        cls.__name__ for cls in subclasses(AutoParallelError) if cls.__module__.startswith("hf_automodel_parallel.")
    }
    assert set(SECTIONS) == {name for name in ours if not name.startswith("_")}


def literals() -> list[str]:
    """The texts of the package; where a value is filled in, a character that no text has."""
    found = []
    for path in (ROOT / "hf_automodel_parallel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = literals()


@pytest.mark.parametrize("name", SECTIONS)
def test_quoted_messages_exist(name):
    quoted = [row.split(" | ")[0] for row in re.findall(r"^\| (`.*)$", SECTIONS[name], re.M)]
    pieces = [piece for row in quoted for piece in re.findall(r"`([^`]+)`", row)]
    unknown = [piece for piece in pieces if not any(piece in text for text in TEXTS)]
    assert not unknown
