"""Found by its entry point alone: nobody imports this file but the registry."""

from typing import Any

from hf_automodel_parallel import DefaultParallelizationStrategy

used: list[str] = []


class EntryPointStrategy(DefaultParallelizationStrategy):
    """The default flow, with one step that notes what it saw."""

    def apply_data_parallel(self, job: Any) -> None:
        used.append(type(job.model).__name__)
        super().apply_data_parallel(job)
