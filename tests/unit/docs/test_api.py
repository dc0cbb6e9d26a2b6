"""The API page has every public name, by the path where it is defined."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import hf_automodel_parallel

PAGE = (Path(hf_automodel_parallel.__file__).resolve().parents[1] / "docs/api.md").read_text()
NAMED = re.findall(r"^::: (\S+)$", PAGE, re.M)


def test_every_public_name_is_on_the_page_once():
    names = [path.rpartition(".")[2] for path in NAMED]
    assert len(names) == len(set(names))
    assert set(hf_automodel_parallel.__all__) <= set(names)


@pytest.mark.parametrize("path", NAMED)
def test_the_path_is_where_it_is_defined(path):
    """mkdocstrings reads the source there and imports nothing: an alias would have no docstring."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert found.__module__ == module and inspect.getdoc(found)
    assert getattr(hf_automodel_parallel, name, found) is found
