"""docs/architectures.md from the outcomes of a sweep."""

from __future__ import annotations

import datetime
import os
from collections import Counter

from sweep.cells import MESHES, ROUNDING, Outcome, cells

_SHORT = {"refused": "refused", "failed": "**fails**", "wrong": "**WRONG**", "one process": "-"}


def report(outcomes: list[Outcome], versions: str, seconds: float) -> str:
    """The page: counts, one row per type, and the reason for everything that is not at parity."""
    cases: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        cases.setdefault(outcome.model_type, []).append(outcome)
    runnable = {c: rows for c, rows in cases.items() if any(o.status != "one process" for o in rows)}
    planned = {c: r for c, r in runnable.items() if any(o.plan for o in r)}
    sources = Counter(next(o.plan for o in r if o.plan) for r in planned.values())
    columns = [(k, m) for m in MESHES for k in cells(m)]
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Every causal language model of transformers",
        "",
        f"Written by `make sweep` on {today}: {versions}; {os.cpu_count()} CPU cores, gloo, float32.",
        f"The cells took {seconds / 60:.0f} minutes.",
        "",
        f"{len(cases)} types and variants, of which {len(runnable)} run in one process with a tiny configuration; "
        f"{len(planned)} of these get a tensor-parallel plan "
        f"({', '.join(f'{s}: {n}' for s, n in sorted(sources.items()))}).",
        "",
        "| | parity | refused in `prepare` | fails later | **wrong** |",
        "|---|---|---|---|---|",
    ]
    for kind, mesh in columns:
        tried = planned if "tp" in mesh else runnable
        count = Counter(o.status for rows in tried.values() for o in rows if (o.mesh, o.kind) == (mesh, kind))
        if count:
            numbers = " | ".join(str(count[s]) for s in ("parity", "refused", "failed", "wrong"))
            lines.append(f"| {kind}, {mesh} | {numbers} |")
    lines += [
        "",
        "A cell compares loss (1e-6) and every gradient (1e-5 of its own norm + 1e-8 of the norm of all) with the same "
        "model in",
        "one process, at equal random weights. The number is the worst gradient's error in units of its bound. A "
        "number over 1",
        f"was rounding: at most {ROUNDING:g} bounds, and within the bound when all is computed in float64, or no more "
        "than",
        "twice what gradients of one process move when its weights move in their last bit. LoRA is on all linear "
        "layers,",
        'and on fused experts where PEFT\'s "all-linear" knows them (`init_lora_weights=False`);',
        "sp is sequence parallelism with full fine-tuning.",
        "",
        "| type | class | plan | " + " | ".join(f"{k}, {m}" for k, m in columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for case, rows in sorted(runnable.items()):
        by = {(o.mesh, o.kind): o for o in rows}
        about = next((o for o in rows if o.class_name), rows[0])
        plan = next((o.plan for o in rows if o.plan), "")
        numbers = " | ".join(_cell(by.get((m, k))) for k, m in columns)
        lines.append(f"| {case} | {about.class_name} | {plan} | {numbers} |")
    lines += [
        "",
        "## Mixtures of experts",
        "",
        "Every rank holds 1 / tp of the bytes of every expert. A layer costs two all-reduces on the tp axis in forward "
        "(for its",
        "attention and experts) and three in backward (attention, and the experts' hidden states and routing weights), "
        "as",
        "`tests/ranks/tensor_parallel/test_experts.py` counts for Mixtral and Qwen3-MoE. "
        "Into how many blocks a fused weight is cut is checked numerically on small experts.",
        "Expert parallelism (experts distributed over ranks) is refused by name.",
    ]
    lines += ["", "## What is not at parity, and why", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for case, rows in sorted(runnable.items()):
        for o in rows:
            if o.status not in ("parity", "one process") and (case in planned or o.mesh == "fsdp2"):
                places = reasons.setdefault((f"{case}, {o.kind}: {o.status}", _escaped(o.detail)), [])
                places.append(o.mesh)
    lines += [f"* **{what}** ({', '.join(meshes)}): {detail}" for (what, detail), meshes in reasons.items()]
    lines += [
        "",
        "## Types that are refused under tensor parallelism",
        "",
        "Without a plan: give a `tp_plan`, or use FSDP2.",
        "",
    ]
    for case in sorted(set(runnable) - set(planned)):
        lines.append(
            f"* {case}: {_escaped(next((o.detail for o in runnable[case] if o.status == 'refused'), 'not tried'))}"
        )
    lines.append("")
    lines += ["## Types that do not run in one process with a tiny configuration", ""]
    for case, rows in sorted(cases.items()):
        if case not in runnable:
            lines.append(f"* {case}: {_escaped(rows[0].detail)[:200]}")
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return f"{outcome.in_bounds:.2f}" if outcome.status == "parity" else _SHORT[outcome.status]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
