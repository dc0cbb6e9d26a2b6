"""``python -m sweep.record`` (from tests/): try the plans of transformers' classes, for the package's record.

Each type with a plan is tried by values as ``prepare`` does with code that it does not know. What is found is added to
the record of other releases, see :mod:`hf_automodel_parallel.plan_search.proven_record`. Exits 1 if a plan computes
something else; such a plan is not in the record. ``make record`` runs it with both supported ends of transformers.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

# Before anything imports torch or a library of Hugging Face: they read these when they are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_automodel_parallel.errors import AutoParallelError, first_line
from hf_automodel_parallel.plan.select import select_plan
from hf_automodel_parallel.plan_search import proof
from hf_automodel_parallel.plan_search.code_origin import running_code
from hf_automodel_parallel.plan_search.proven_record import RECORD, file_digest, layer_plans
from sweep.cells import case_fields
from sweep.tiny import VARIANTS, tiny_config

#: Modules of transformers beside ``models``, whose classes are parts of models.
SHARED = ("activations", "modeling_layers", "pytorch_utils")
#: Classes of a type, of which the first one with a plan that can be tried stands for its layers.
KINDS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "")
EMPTY: dict[str, dict[str, Any]] = {"files": {}, "plans": {}, "untried": {}}


def main(
    only: Annotated[str, typer.Option(help="Only types whose name contains this; commas separate alternatives.")] = "",
    fresh: Annotated[bool, typer.Option(help="Forget what is in the record, also of other releases.")] = False,
) -> None:
    """Try the plans of all types of the installed transformers on tiny proxy models, and add them to the record."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    record = EMPTY if fresh or not RECORD.exists() else json.loads(RECORD.read_text())
    wanted = [part for part in only.split(",") if part]
    cases = [c for c in (*sorted(CONFIG_MAPPING), *VARIANTS) if not wanted or any(part in c for part in wanted)]
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    wrong: list[str] = []
    add_files(record)
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case)
            wrong += [f"{case}: {problem}" for problem in try_case(case, record)]
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            progress.advance(task)
    counts = {table: sum(map(len, record[table].values())) for table in record}
    console.print(f"{RECORD.name}: {counts}, transformers {transformers.__version__} added")
    for problem in wrong:
        console.print(f"[red]wrong[/] {problem}")
    raise typer.Exit(bool(wrong))


def try_case(case: str, record: dict[str, dict[str, Any]]) -> list[str]:
    """Try the plans of one type and add what is proven to ``record``; returns what is wrong."""
    model_type, fields = case_fields(case)
    for model in models_of(model_type, fields):
        try:
            plan = select_plan(model)
        except AutoParallelError:
            continue
        found = [(m, d) for m, d in layer_plans(model, plan) if m.startswith("transformers.")]
        new = [(m, d) for m, d in found if d not in record["plans"].get(m, ())]
        if not new or running_code(model).own:
            continue
        failure, reason = None, ""
        try:
            with proof._undisturbed():
                failure = proof._Trial(model, running_code(model), completed=True).failure(plan)
        except Exception as error:  # code of the model
            reason = first_line(error)[:100]
        if failure is not None:
            return [f"{type(model).__name__}: {failure}"]
        for module, digest in new:
            if reason:
                record["untried"].setdefault(module, {})[digest] = f"{type(model).__name__}: {reason}"
            else:
                record["plans"].setdefault(module, {})[digest] = type(model).__name__
                record["untried"].get(module, {}).pop(digest, None)
    return []


def models_of(model_type: str, fields: dict[str, Any]) -> Any:
    """Tiny models of a type without memory, of its classes as in :data:`KINDS`; what cannot be built is left out."""
    for kind in KINDS:
        names = getattr(modeling_auto, f"MODEL_{f'FOR_{kind}_' if kind else ''}MAPPING_NAMES", {})
        for name in [names[model_type]] if isinstance(names.get(model_type), str) else names.get(model_type, ()):
            try:
                cls = getattr(transformers, name)
                with torch.device("meta"):
                    model = cls(tiny_config(model_type, **fields))
            except Exception:  # the classes of some types need what is not installed, or sizes of their own
                continue
            yield model


def add_files(record: dict[str, dict[str, Any]]) -> None:
    """Add the sources of the installed release: all modeling code, and what its classes share."""
    root = Path(transformers.__file__).parent
    files = [*root.glob("models/*/modeling_*.py"), *(root / f"{name}.py" for name in SHARED)]
    files += [root / f"integrations/{f.__module__.rpartition('.')[2]}.py" for f in ALL_ATTENTION_FUNCTIONS.values()]
    for path in sorted(set(files)):
        name = ".".join(("transformers", *path.relative_to(root).with_suffix("").parts))
        releases = record["files"].setdefault(name, {}).setdefault(file_digest(str(path)), [])
        releases += [transformers.__version__] if transformers.__version__ not in releases else []


if __name__ == "__main__":
    typer.run(main)
