"""Bytes that a forward keeps for its backward, per decoder layer, of tensor parallelism with and without its options.

  python benchmarks/activation_memory.py          # 2 gloo processes
  python benchmarks/activation_memory.py --tp 4

A small Llama, 2 x 256 tokens, float32. What belongs to a layer is the difference between 4 and 2 layers, divided by 2;
"ends" is the rest: embedding, final norm, logits and loss. Counted is the memory that operators of the forward
allocated and that is still alive after it; parameters and inputs are not in it.
"""

from __future__ import annotations

from measure import Storages, Variant, batch, parallel, run

LAYERS = (2, 4)


def measure(variant: Variant, layers: int) -> int:
    """Bytes kept by one forward."""
    model, backward = parallel(variant, layers)
    backward(model(**batch(), use_cache=False).loss)  # a first time, for what is set up once
    inputs = batch()
    with Storages() as storages:
        loss = model(**inputs, use_cache=False).loss
    kept = storages.alive((*model.parameters(), *model.buffers(), *inputs.values(), loss))
    backward(loss)
    return kept


def show(rows: list, tp: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bytes kept for backward on one rank, tp={tp}")
    for column in ("", "layer, KiB", "ends, KiB", "layer, of TP"):
        table.add_column(column, justify="left" if not column else "right")
    base: float | None = None
    for variant, few, many in rows:
        if few is None:
            table.add_row(variant.name, f"cannot run: {many}")
            continue
        layer = (many - few) / (LAYERS[1] - LAYERS[0])
        base = layer if variant.name == "TP" else base
        share = "" if base is None else f"{layer / base:.2f}"
        table.add_row(variant.name, f"{layer / 1024:,.0f}", f"{(few - LAYERS[0] * layer) / 1024:,.0f}", share)
    Console(width=120).print(table)


if __name__ == "__main__":
    run(__file__, __doc__, measure, LAYERS, show)
