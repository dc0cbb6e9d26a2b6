"""Private names of other libraries: all of them exist, stand in one table, and are used nowhere but where the table
says.
"""

import ast
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import hf_automodel_parallel
from hf_automodel_parallel import compat
from hf_automodel_parallel.compat import names
from hf_automodel_parallel.errors import UnsupportedError

PACKAGE = Path(hf_automodel_parallel.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMPAT = sorted((PACKAGE / "compat").glob("*.py"))
LIBRARIES = {"torch", "transformers", "accelerate", "peft", "trl"}

#: The last part of each name in the table, and the private parts of its modules.
LISTED = {part for module, attribute, _ in compat.PRIVATE_NAMES for part in (*module.split("."), *attribute.split("."))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def own_names() -> set[str]:
    """Names that the package itself defines: functions, classes, variables, attributes of its own objects."""
    names: set[str] = set()
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
    return names


def private_uses(tree: ast.Module, own: set[str]) -> list[tuple[int, str]]:
    """(line, name) of every private attribute of an object that is not ours, read, written, or named in a string."""
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            constant = node.args[1]
            name = constant.value if isinstance(constant, ast.Constant) and isinstance(constant.value, str) else ""
        elif (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            name = node.slice.value  # model.__dict__["_x"]
        else:
            continue
        if is_private(name) and name not in own:
            uses.append((node.lineno, name))
    return uses


def private_imports(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of everything private that is imported from the libraries."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in LIBRARIES and any(map(is_private, name.split("."))):
                found.append((node.lineno, name))
    return found


def module_chains(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of private parts that are reached from an imported library, as in ``torch._dynamo``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            chain, base = [node.attr], node.value
            while isinstance(base, ast.Attribute):
                chain.append(base.attr)
                base = base.value
            if isinstance(base, ast.Name) and base.id in LIBRARIES | {"dist", "nn", "F"}:
                found.append((node.lineno, ".".join([base.id, *reversed(chain)])))
    return found


# ---- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.both_ends
def test_listed_names_exist():
    """Names all that a library dropped, before anything of ours fails strangely."""
    gone = [
        f"{module}.{name}, used for: {why}"
        for module, name, why in compat.PRIVATE_NAMES
        if compat.disappeared(module, name)
    ]
    assert not gone, "these names have disappeared:\n" + "\n".join(gone)


def test_existence_check_can_fail():
    from accelerate import Accelerator

    assert compat.has_name(Accelerator, "_models") and compat.has_name(Accelerator, "prepare")
    assert not compat.has_name(Accelerator, "_no_such_thing")
    assert not compat.has_name(importlib.import_module("torch"), "_no_such_thing")


def test_every_listed_name_has_a_reason_and_stands_once():
    names = [(module, attribute) for module, attribute, _ in compat.PRIVATE_NAMES]
    assert len(names) == len(set(names))
    assert compat.REPLACED.keys() <= {attribute for _, attribute in names}
    assert all(len(reason) > 5 for _, _, reason in compat.PRIVATE_NAMES)


def test_missing_name_of_fsdp_is_said_while_sharding():
    """In one sentence, and not by an AttributeError in the middle of a backward."""

    class FSDPParam:
        _module_info = sharded_param = None
        _unsharded_param: Any

    with pytest.raises(UnsupportedError, match=r"has no FSDPParam\.unsharded_accumulated_grad, which"):
        compat.sharding._check_names(FSDPParam())


def test_version_newer_than_tested_is_reported_with_what_it_lacks(monkeypatch):
    assert compat.newer_than_tested() == [] or compat.torch_version() > compat.TESTED_UP_TO["torch"]
    monkeypatch.setitem(compat.TESTED_UP_TO, "torch", (2, 1))
    monkeypatch.setattr(
        names, "PRIVATE_NAMES", (("torch", "_gone", "a test"), ("torch.nn", "Module._apply", "the same"))
    )
    monkeypatch.setattr(names, "_version", lambda library: "2.16.0a1+cpu" if library == "torch" else None)
    (sentence,) = compat.newer_than_tested()
    assert sentence.startswith("torch 2.16.0a1+cpu: this version of the package was tested up to 2.1. It has no _gone ")


def test_every_listed_name_is_used():
    """What is no longer used is no longer listed."""
    text = "\n".join(path.read_text() for path in FILES if path != PACKAGE / "compat" / "names.py")
    unused = [
        attribute for _, attribute, _ in compat.PRIVATE_NAMES if not re.search(rf"\b{attribute.split('.')[-1]}\b", text)
    ]
    assert not unused


# ---- the package --------------------------------------------------------------------------------------------------


def test_no_other_file_imports_private_names():
    """Neither imported nor reached through a module: that is what compat is for."""
    found = {
        str(path.relative_to(PACKAGE)): private_imports(parse(path)) + module_chains(parse(path))
        for path in FILES
        if path not in COMPAT
    }
    wrong = {path: names for path, names in found.items() if names}
    assert len(found) > 50 and not wrong, f"private names outside of compat, by file (line, name): {wrong}"


def test_private_attributes_of_foreign_objects_are_listed():
    """Attributes of their objects (``accelerator._models``) are in the table too, wherever they are used."""
    allowed = LISTED | {"_getframe", "_exit"}  # Python's
    unlisted = {
        str(path.relative_to(PACKAGE)): [use for use in private_uses(parse(path), own_names()) if use[1] not in allowed]
        for path in FILES
    }
    unlisted = {path: uses for path, uses in unlisted.items() if uses}
    assert not unlisted, f"not in compat.PRIVATE_NAMES, by file (line, name): {unlisted}"


def test_private_imports_of_compat_are_listed():
    unlisted = [
        (path.name, line, name)
        for path in COMPAT
        for line, name in private_imports(parse(path)) + module_chains(parse(path))
        if not any(part in LISTED for part in name.split(".") if is_private(part))
    ]
    assert not unlisted


def test_checks_see_what_they_look_for():
    """Each of them on a few lines that break the rule."""
    tree = ast.parse(
        "import torch._dynamo\n"
        "from torch.distributed._tensor import DTensor\n"
        "from accelerate.utils import _private\n"
        "from ..compat import _ours\n"
        "torch._C.anything\n"
        "model._hidden = 1\n"
        "getattr(model, '_hidden', None)\n"
        "model.__dict__['_hidden']\n"
        "self._own\n"
    )
    assert [name for _, name in private_imports(tree)] == [
        "torch._dynamo",
        "torch.distributed._tensor.DTensor",
        "accelerate.utils._private",
    ]
    assert [name for _, name in module_chains(tree)] == ["torch._C"]
    assert [name for _, name in private_uses(tree, {"_own"})].count("_hidden") == 3
    assert "_own" not in [name for _, name in private_uses(tree, {"_own"})]
