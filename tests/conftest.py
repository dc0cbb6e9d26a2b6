import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch or a library of Hugging Face: they read these when they are imported.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from accelerate.state import AcceleratorState, GradientState
from harness.pool import close_pools

UNIT = Path(__file__).parent / "unit"


@pytest.hookimpl(tryfirst=True)  # before ``-m`` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests in ``unit/`` and the cases that ``core_cases`` names.

    A name that no case has is an error, so that a renamed case does not leave ``make test`` in silence.
    """
    named: dict[tuple[str, str], bool] = {}
    for item in items:
        if UNIT in item.path.parents:
            item.add_marker("unit")
        case = item.callspec.id if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""
        function = item.nodeid.split("[")[0]
        for marker in item.iter_markers("core_cases"):
            if case in marker.args:
                item.add_marker("core")
            named |= {(function, name): named.get((function, name), False) or name == case for name in marker.args}
    unknown = [f"{function}[{name}]" for (function, name), found in named.items() if not found]
    if unknown and not any("[" in argument for argument in config.args):
        raise pytest.UsageError(f"core_cases names cases that do not exist: {', '.join(unknown)}")


@pytest.fixture(scope="session", autouse=True)
def session_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the worker pools inherit when the first test that needs one starts it, and their end."""
    # One cache for all ranks, which compile the same code, and none from an earlier run, which may hide a failure.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    # The models are so tiny that a second thread only costs, a hundredfold where the cores are shared with workers.
    torch.set_num_threads(1)
    yield
    close_pools()


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    """A config may not be made after an Accelerator; one that a test makes in this process must not stand in the
    way.
    """
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
