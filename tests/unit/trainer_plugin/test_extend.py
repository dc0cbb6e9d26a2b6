"""Arguments of a Trainer that would train wrongly are refused before its model is prepared."""

from types import SimpleNamespace

import pytest

from hf_automodel_parallel.errors import ConfigError
from hf_automodel_parallel.trainer_plugin.extend import check_trainer


def check(ranks: int, tp: int, **args: int) -> None:
    config = SimpleNamespace(data_parallel_size=ranks, non_data_parallel_size=tp)
    accelerator = SimpleNamespace(num_processes=ranks * tp, parallelism_config=config)
    check_trainer(accelerator, SimpleNamespace(args=SimpleNamespace(per_device_train_batch_size=2, **args)))


def test_groups_of_completions_that_the_data_parallel_ranks_do_not_hold():
    """TRL counts the tp ranks as well, whose rows are copies."""
    check(2, 2, num_generations=4, steps_per_generation=1)
    check(1, 2, num_generations=4, steps_per_generation=2)
    check(1, 2)
    with pytest.raises(ConfigError, match=r"num_generations=4: the 1 data-parallel ranks together have 2 completions"):
        check(1, 2, num_generations=4, steps_per_generation=1)
