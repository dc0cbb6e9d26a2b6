"""What libraries print of themselves in every run and nobody can act on, switched off by their own switches.

Loggers have the names of private modules, so this is part of ``compat``. A name or a text that a release changes
makes the line appear again, nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

#: Logger -> how its line begins. Checked on bitsandbytes 0.50, torch 2.13 and 2.15.
_LINES = {
    # Wants the package `kernels`. Without it a kernel of bitsandbytes runs, slower for single rows only.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Of each selective checkpoint under compile, whether or not a layer writes in place.
    "torch._higher_order_ops.wrap": "\nDetected that context_fn is passed to torch.utils.checkpoint",
    # Advice for whoever writes a redistribution, from every rank; those of a run are torch's and ours.
    "torch.distributed.tensor._redistribute": "While redistributing from",
}

#: Of ranks > 0: bars and lines that rank 0 shows.
_OTHER_RANKS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers goes by it, too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # until a Trainer sets its log_level_replica
}


class _Without(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.start)


def silence_libraries(rank: int) -> None:
    """Leave out the known lines above, and on ranks > 0 what repeats rank 0's: bars, notices of deprecation.

    Call it before transformers and datasets are imported. What the user has set wins: the environment variables, and
    Python's own options for warnings.
    """
    for name, start in _LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(start))
    if rank == 0:
        return
    for variable, value in _OTHER_RANKS.items():
        os.environ.setdefault(variable, value)
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
