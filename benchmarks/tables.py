"""The tables of docs/benchmarks.md, each from the result files of one workload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .counting import KINDS
from .peers import PEERS

Results = dict[str, dict[str, Any]]

MIB = 2**20
GIB = 2**30


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Of Markdown; all columns but the first are figures."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(quartiles: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median (lower - upper quartile)."""
    low, median, high = (f"{value * scale:.{digits}f}" for value in quartiles)
    return f"{median} ({low}-{high})"


def _rows(found: Results) -> list[dict[str, Any]]:
    return [row for result in found.values() for row in result["rows"]]


def _ratio(row: dict[str, Any], peer: str) -> str:
    figures = row["peers"].get(peer, {})
    if "ours_over_it_wall" not in figures:
        return ""
    return f"{spread(figures['ours_over_it_wall'])}; {figures['ours_over_it_cpu'][1]:.2f}"


def compared(rows: list[dict[str, Any]]) -> str:
    """A row for each case: ours in milliseconds, and the ratios to every peer that any row has."""
    peers = [peer for peer in PEERS if peer != "ours" and any(_ratio(row, peer) for row in rows)]
    lines = []
    for row in rows:
        ours = row["peers"].get("ours")
        milliseconds = f"{1e3 * ours['wall_s'][1]:.1f}; {1e3 * ours['cpu_s'][1]:.1f}" if ours else ""
        what = f"{row['mesh']}, {'LoRA' if row['lora'] else 'full'}, {'compiled' if row['compiled'] else 'eager'}"
        size = f"{row['hidden']}, {row['tokens']:,}"
        lines.append([what, size, milliseconds, *(_ratio(row, peer) for peer in peers)])
    return table(["", "hidden, tokens", "ours: ms; of CPU", *(f"ours / {PEERS[peer]}" for peer in peers)], lines)


def step_time(found: Results) -> str:
    rows = sorted(_rows(found), key=lambda row: [row[key] for key in ("dp", "tp", "sequence_parallel", "lora")])
    layers, whole = ([row for row in rows if row["whole"] == value] for value in (False, True))
    text = (
        "Forward and backward of a 4-layer Llama with all gradients complete, no optimizer, float32. The floor is the\n"
        "same arithmetic and the same collectives by hand, with plain local tensors.\n\n"
        "Decoder layers alone; embedding and head are small (vocabulary 1,024) and, over tp, replicated:\n\n"
        + compared(layers)
    )
    if whole:
        text += "\n\nThe whole step with embedding, head and loss, vocabulary 32,768:\n\n" + compared(whole)
    return text


def train_step(found: Results) -> str:
    return (
        "One step of the stock Trainer, vocabulary 32,768: data, forward, backward, clipping, AdamW, logging of every "
        "step.\n\n" + compared(_rows(found))
    )


def traffic(found: Results) -> str:
    rows = []
    for row in _rows(found):
        cells = [f"{row['name']}, tp {row['tp']}"]
        for part in ("layer", "ends"):
            figures = row[part]
            cells.append(" + ".join(f"{figures[kind]:g}" for kind in KINDS))
            cells += [f"{figures['bytes'] / 1024:,.0f}", f"{figures['kept'] / 1024:,.0f}"]
        rows.append(cells)
    columns = [f"{part}: {figure}" for part in ("layer", "ends") for figure in ("collectives", "KiB sent", "KiB kept")]
    return (
        "Counted, not timed: the figures do not depend on the machine. Llama of width 256, 2 x 256 tokens, float32,\n"
        'vocabulary 8,192. Of one decoder layer, and of the "ends": embedding, final norm, head, loss.\n'
        "Collectives are all-reduces + all-gathers + reduce-scatters of forward and backward; KiB sent by one rank\n"
        "with ring algorithms (an all-reduce moves its tensor twice); KiB that the forward keeps for backward,\n"
        "without parameters.\n\n" + table(["", *columns], rows)
    )


def prepare(found: Results) -> str:
    parts = []
    for result in found.values():
        settings = result["settings"]
        if "geometry" in settings:
            depths = sorted({row["layers"] for row in result["rows"]})
            seconds = {(row["options"], row["layers"]): spread(row["cpu_s"]) for row in result["rows"]}
            names = list(dict.fromkeys(row["options"] for row in result["rows"]))
            lines = [[name, *(seconds.get((name, depth), "") for depth in depths)] for name in names]
            about = f"CPU seconds, {settings['geometry']} geometry on {settings['world']:,} simulated ranks (tp "
            about += f"{settings['tp']}), planning and applying on the meta device:"
            parts.append(f"{about}\n\n" + table(["", *(f"{depth} layers" for depth in depths)], lines))
        else:
            lines = [
                [
                    f"{row['parameters'] / 1e6:,.0f} M parameters",
                    *(spread(row[way]["cpu_s"]) for way in ("ours", "accelerate_fsdp")),
                    spread(row["ours_over_it_cpu"]),
                ]
                for row in result["rows"]
            ]
            columns = ["", "ours: s of CPU", "stock Accelerate FSDP2: s of CPU", "ours / it"]
            parts.append("`accelerator.prepare` on two real ranks, FSDP2:\n\n" + table(columns, lines))
    return "\n\n".join(parts)


def imports(found: Results) -> str:
    rows = [[f"`import {row['module']}`", spread(row["wall_s"]), spread(row["cpu_s"])] for row in _rows(found)]
    extra = next(iter(found.values()))["settings"]["beyond_accelerate_cpu_s"]
    return (
        table(["", "wall clock, s", "CPU, s"], rows) + f"\n\nBeyond accelerate's, per round: {spread(extra)} s of CPU."
    )


def load(found: Results) -> str:
    settings = next(iter(found.values()))["settings"]
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(found):
        ways.setdefault(row["way"], []).append(row)
    lines = []
    for way, ranks in ways.items():
        peak, shard, largest = (max(rank[key] for rank in ranks) / 1e6 for key in ("peak", "shard", "largest"))
        bound = shard + largest + settings["slack"] / 1e6
        wall, cpu = max(rank["wall_s"] for rank in ranks), sum(rank["cpu_s"] for rank in ranks)
        lines.append([way, *(f"{value:,.0f}" for value in (peak, shard, largest, bound)), f"{wall:.1f}", f"{cpu:.1f}"])
    about = f"{settings['bytes'] / 1e6:,.0f} MB in {settings['files']} files, loaded as {settings['dtype']} on "
    about += f"{settings['mesh']}: the highest anonymous memory of any rank over what the imports take, MB; seconds of "
    about += "loading and `prepare`, wall clock and the sum of all ranks' CPU."
    columns = ["", "peak", "shard", "largest tensor", "shard + largest + slack", "s", "s of CPU"]
    return f"{about}\n\n" + table(columns, lines)


def checkpoint(found: Results) -> str:
    rows = [
        [
            f"{row['what']}, {row['way']}",
            spread(row["wall_s"]),
            spread(row["cpu_s"]),
            spread(row["over_accelerate_wall"]) if "over_accelerate_wall" in row else "",
        ]
        for row in _rows(found)
    ]
    settings = next(iter(found.values()))["settings"]
    about = f"Weights and AdamW's state of a 4-layer Llama of width {settings['hidden']:,} on FSDP2, two ranks; "
    about += settings.get("state_dict_type", "ours gathers (FULL_STATE_DICT), Accelerate writes shards")
    about += ". A save with `async_save` is the time for which training stands still."
    return f"{about}\n\n" + table(["", "wall clock, s", "CPU, s", "over Accelerate's, wall clock"], rows)


def scale(found: Results) -> str:
    parts = []
    for result in found.values():
        settings = result["settings"]
        lines = []
        for row in result["rows"]:
            cells = [f"{row['world']:,}"]
            for part, unit, digits in (("layer", MIB, 0), ("model", GIB, 1)):
                figures = row[part]
                cells.append(" + ".join(f"{figures[kind]:g}" for kind in KINDS))
                cells.append(f"{figures['bytes'] / unit:,.{digits}f}")
            cells += [f"{row['model'][key] / GIB:,.1f}" for key in ("parameters", "peak")]
            lines.append(cells)
        about = (
            f"{settings['geometry']}, {settings['depth']} layers, tp {settings['tp']}, FSDP2 over the rest, SP, whole "
        )
        about += f"layers checkpointed, {settings['tokens']:,} tokens per data-parallel rank, {settings['dtype']}:"
        columns = ["ranks", "layer: collectives", "layer: MiB sent", "model: collectives", "model: GiB sent"]
        columns += ["GiB of parameters", "GiB at the peak"]
        parts.append(f"{about}\n\n" + table(columns, lines))
    head = (
        "One forward and backward of rank 0 in a process group whose collectives do nothing, on tensors without\n"
        "memory. Collectives are all-reduces + all-gathers + reduce-scatters. Two depths are run, the model's is\n"
        "extrapolated; so is the peak, which is without optimizer state."
    )
    return "\n\n".join([head, *parts])


def gpu(found: Results) -> str:
    """Whatever scalars the rows have."""
    parts = []
    for name, result in found.items():
        rows = result["rows"]
        columns = list(
            dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list)))
        )
        lines = [[_scalar(row.get(column)) for column in columns] for row in rows]
        gpus = ", ".join(result["hardware"].get("gpus", [])) or "no GPU"
        parts.append(f"`{name}` ({gpus}):\n\n" + (table(columns, lines) if columns else "no rows"))
    return "\n\n".join(parts)


def _scalar(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


#: title, prefix of the result files, what makes the text of them
SECTIONS: list[tuple[str, str, Callable[[Results], str]]] = [
    ("Step time", "cpu-step_time", step_time),
    ("The Trainer's step", "cpu-train_step", train_step),
    ("Collectives, bytes and saved activations", "cpu-traffic", traffic),
    ("Prepare", "cpu-prepare", prepare),
    ("Import", "cpu-imports", imports),
    ("Loading", "cpu-load", load),
    ("Checkpoints", "cpu-checkpoint", checkpoint),
    ("Scale, simulated", "scale-", scale),
    ("GPU", "gpu-", gpu),
]

#: What no suite measures.
_NEVER = [
    "NeMo AutoModel 0.7.0 with its own LoRA: it pins transformers 5.18.0, so it needs an environment of its own; the "
    "runner makes none yet",
]


def not_measured(results: Results) -> str:
    """What no suite measures, what has no file, and what the files say, by reason."""
    reasons: dict[str, list[str]] = {}
    for result in results.values():
        for entry in result["not_measured"]:
            reasons.setdefault(entry["why"], []).append(entry["what"])
    entries = [f"{why} ({'; '.join(dict.fromkeys(what))})" for why, what in reasons.items()]
    missing = [
        f"{title}: no result file" for title, prefix, _ in SECTIONS if not any(n.startswith(prefix) for n in results)
    ]
    return "\n".join("* " + " ".join(entry.replace("|", "\\|").split()) for entry in [*_NEVER, *missing, *entries])


def files(results: Results) -> str:
    """Date, commit, machine and command of each."""
    rows = []
    for name, result in results.items():
        hardware = result["hardware"]
        machine = f"{hardware['cores']} cores, {hardware['memory_gib']} GiB, {hardware['processor']}"
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        rows.append([f"`{name}`", result["date"], f"`{result['commit']}`", machine, versions, f"`{result['command']}`"])
    lines = table(["file", "date", "commit", "machine", "versions", "command"], rows)
    return lines.replace("---:", "---", 5)
