"""tp inside of a node, data parallel across: one process's losses, and an end in bounded time when the nodes lose each
other.
"""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness.jobs import SCRIPT, Job, environment, start_commands
from harness.nodes import Nodes, launch, two_nodes
from harness.pool import run_distributed
from harness.training import build
from transformers import Trainer, TrainingArguments

from end_to_end.test_faults import START, STEPS, one_process
from hf_automodel_parallel import AutoParallelismConfig

CONFIG = Path(__file__).resolve().parents[2] / "accelerate_configs" / "cpu_fsdp2_tp2.yaml"
TIMEOUT = 30
"""Seconds that the process group waits for another rank (`ddp_timeout`)."""

ENDS_WITHIN = 90.0


@pytest.fixture
def nodes():
    made = two_nodes()
    yield made
    made.close()


def start(nodes: Nodes, directory: Path, *arguments: object) -> Job:
    sizes = ["--sizes", '{"tp_size": 2, "dp_shard_size": 2}', "--data_ranks", "2"]
    commands = launch(nodes, CONFIG, [str(SCRIPT), *sizes, *map(str, arguments)])
    return start_commands(commands, directory, [environment(GLOO_SOCKET_IFNAME=nodes.interface)] * 2)


@pytest.mark.timeout(600)
def test_nodes_that_lose_each_other_end_and_resume(nodes, tmp_path):
    """The link is cut in front of the fourth step; checkpoints are written each second one."""
    common = ("--output", tmp_path / "out", "--timeout", TIMEOUT)
    with start(nodes, tmp_path / "cut", *common, "--wait_at", 3) as job:
        job.wait_for(*(f"reached{rank}" for rank in range(4)), seconds=START)
        nodes.cut(job)
        (job.directory / "go").touch()
        began = time.monotonic()
        first = job.processes[0]
        first.wait(ENDS_WITHIN)
        nodes.after_one_ended(job)
        codes = job.wait(ENDS_WITHIN - (time.monotonic() - began))
        assert all(codes), f"{codes}\n{job.output()}"
    nodes.mend()
    with start(nodes, tmp_path / "again", *common, "--resume") as job:
        results = job.results(START)
    assert len(results) == 4
    for result in results:
        assert result["started"] == 2 and result["step"] == STEPS
        losses = [result["losses"][str(step + 1)] for step in range(STEPS)]
        assert losses == pytest.approx(one_process(), rel=1e-5)


def timeouts(sizes: dict[str, int], directory: str) -> set[float]:
    """Seconds that the groups of a mesh wait, those of its joined axes too."""
    arguments = TrainingArguments(
        directory, use_cpu=True, ddp_timeout=77, report_to=[], parallelism_config=AutoParallelismConfig(**sizes)
    )
    Trainer(build("llama"), arguments)
    groups = dist.distributed_c10d._world.pg_map
    assert len(groups) > 2, "there are no groups of a mesh"
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


@pytest.mark.parametrize("sizes", [{"tp_size": 2, "dp_shard_size": 2}, {"dp_replicate_size": 2, "dp_shard_size": 2}])
def test_ddp_timeout_bounds_every_group(sizes, tmp_path):
    """TrainingArguments drop it on CPU, and torch gives the groups of a mesh half an hour (gloo)."""
    assert run_distributed(4, timeouts, sizes, str(tmp_path)) == [{77.0}] * 4
