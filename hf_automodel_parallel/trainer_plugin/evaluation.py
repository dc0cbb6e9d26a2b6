"""What a Trainer gathers in evaluation: each sample once."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from transformers import Trainer


class ParallelEvaluation(Trainer):
    """What a Trainer with an :class:`AutoParallelismConfig` does differently in evaluation; see
    :mod:`.trainer_seam`.
    """

    _gathering: Any = None

    @property  # type: ignore[override]
    def gather_function(self) -> Any:
        """How predictions, losses and labels are gathered.

        ``Seq2SeqTrainer`` chooses ``Accelerator.gather`` before it predicts, which returns what all processes have:
        each sample once per tp rank, and those again that fill up the last batch.
        """
        return self._gathering

    @gather_function.setter
    def gather_function(self, function: Any) -> None:
        if getattr(function, "__func__", None) is Accelerator.gather:
            function = self.accelerator.gather_for_metrics
        self._gathering = function
