"""Read by mypy, never run: what an editor says to a wrong name or value. `make lint` fails if one of the lines marked
as errors is none (warn_unused_ignores).
"""

from __future__ import annotations

from hf_automodel_parallel import AutoParallelismConfig

AutoParallelismConfig(tp_size=2, dp_shard_size=4, sequence_parallel=True, activation_checkpointing="selective")
AutoParallelismConfig(tp_plan={"layers.*.up_proj": "colwise"}, compile="inductor", audit=False, verbose=2)
AutoParallelismConfig(tp=2)  # type: ignore[call-arg]
AutoParallelismConfig(tp_size="2")  # type: ignore[arg-type]
AutoParallelismConfig(activation_checkpointing="some")  # type: ignore[arg-type]
AutoParallelismConfig(adapters_over_dp="everywhere")  # type: ignore[arg-type]
AutoParallelismConfig(backend="deepspeed")  # type: ignore[arg-type]
AutoParallelismConfig(verbose=3)  # type: ignore[arg-type]
