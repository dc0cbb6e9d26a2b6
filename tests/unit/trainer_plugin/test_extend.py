"""Arguments of a Trainer that would train wrongly are refused before its model is prepared."""

from types import SimpleNamespace

import pytest

from hf_automodel_parallel.errors import ConfigError
from hf_automodel_parallel.trainer_plugin.extend import check_trainer


def check(ranks: int, tp: int, **args: object) -> None:
    config = SimpleNamespace(data_parallel_size=ranks, non_data_parallel_size=tp)
    accelerator = SimpleNamespace(num_processes=ranks * tp, parallelism_config=config)
    values = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "eval_strategy": "no"} | args
    check_trainer(accelerator, SimpleNamespace(args=SimpleNamespace(**values)))


def test_groups_of_completions_that_the_data_parallel_ranks_do_not_hold():
    """TRL counts the tp ranks as well, whose rows are copies."""
    check(2, 2, num_generations=4, steps_per_generation=1)
    check(1, 2, num_generations=4, steps_per_generation=2)
    check(1, 2)
    with pytest.raises(ConfigError, match=r"num_generations=4: the 1 data-parallel ranks together have 2 completions"):
        check(1, 2, num_generations=4, steps_per_generation=1)
    evaluated = {"num_generations": 4, "steps_per_generation": 4, "eval_strategy": "steps"}
    check(2, 2, **evaluated)
    check(1, 2, num_generations_eval=2, **evaluated)
    with pytest.raises(ConfigError, match=r"num_generations=4: .* 2 completions to a batch of an evaluation"):
        check(1, 2, **evaluated)
    with pytest.raises(ConfigError, match=r"num_generations_eval=3: .* 4 completions to a batch of an evaluation"):
        check(2, 2, num_generations_eval=3, **evaluated)
