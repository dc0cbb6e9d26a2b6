"""Collectives and bytes per decoder layer and step, of tensor parallelism with and without its options.

  python benchmarks/collectives.py                # 2 gloo processes
  python benchmarks/collectives.py --tp 4

Forward and backward of one batch of a small Llama. What belongs to a layer is the difference between 4 and 2 layers,
divided by 2; "ends" is the rest: embedding, final norm, head and loss. KiB are what one rank sends in float32 with ring
algorithms: an all-reduce moves its tensor twice, an all-gather or a reduce-scatter once.
"""

from __future__ import annotations

from measure import Collectives, Variant, batch, parallel, run

LAYERS = (2, 4)
KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def measure(variant: Variant, layers: int) -> dict[str, tuple[int, int]]:
    """kind -> (number, bytes) of one forward and backward."""
    model, backward = parallel(variant, layers)
    loss = model(**batch(), use_cache=False).loss  # a first time, for what is set up once
    backward(loss)
    with Collectives() as seen:
        backward(model(**batch(), use_cache=False).loss)
    return {kind: (seen.count[kind], seen.bytes[kind]) for kind in KINDS}


def show(rows: list, tp: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"collectives of one step, forward and backward, tp={tp}")
    table.add_column("")
    for part in ("layer", "ends"):
        for kind in KINDS:
            table.add_column(f"{part}: {kind}", justify="right")
        table.add_column(f"{part}: KiB", justify="right")
    for variant, few, many in rows:
        if few is None:
            table.add_row(variant.name, f"cannot run: {many}")
            continue
        span = LAYERS[1] - LAYERS[0]
        layer = {kind: [(m - f) / span for m, f in zip(many[kind], few[kind], strict=True)] for kind in KINDS}
        ends = {kind: [f - LAYERS[0] * x for f, x in zip(few[kind], layer[kind], strict=True)] for kind in KINDS}
        cells = []
        for part in (layer, ends):
            cells += [f"{part[kind][0]:g}" for kind in KINDS]
            cells.append(f"{sum(part[kind][1] for kind in KINDS) / 1024:,.0f}")
        table.add_row(variant.name, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    run(__file__, __doc__, measure, LAYERS, show)
