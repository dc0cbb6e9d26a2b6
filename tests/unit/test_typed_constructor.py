"""The constructor of AutoParallelismConfig that type checkers read has the fields that there are; tests/typing has what
mypy says to wrong ones.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

from hf_automodel_parallel import config


def test_it_is_the_one_of_the_dataclass():
    tree = ast.parse(Path(inspect.getfile(config)).read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "AutoParallelismConfig")
    written = next(n for n in ast.walk(cls) if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    arguments = written.args.args[1:]
    defaults = [eval(ast.unparse(node), vars(config) | _names()) for node in written.args.defaults]
    fields = dataclasses.fields(config.AutoParallelismConfig)
    assert [a.arg for a in arguments] == [f.name for f in fields]
    assert defaults == [f.default for f in fields]
    ours = {f.name: f.type for f in dataclasses.fields(config.OptionFields)}
    types = {a.arg: ast.unparse(a.annotation).replace("'", '"') for a in arguments}
    assert {name: types[name] for name in ours} == ours


def _names():
    from hf_automodel_parallel.core.sharding_spec import PLAN_SOURCES

    return {"PLAN_SOURCES": PLAN_SOURCES}
