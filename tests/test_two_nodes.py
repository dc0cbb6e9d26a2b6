"""tp inside of a node, data parallel across: one process's losses, and an end in bounded time when the nodes lose each other."""

import time
from pathlib import Path

import pytest
from harness.jobs import SCRIPT, Job, environment
from harness.nodes import Nodes, launch, two_nodes
from test_faults import STEPS, one_process

CONFIG = Path(__file__).resolve().parents[1] / "accelerate_configs" / "cpu_fsdp2_tp2.yaml"
TIMEOUT = 20
"""Seconds that the process group waits for another rank (`ddp_timeout`)."""

ENDS_WITHIN = 60.0
START = 120.0


@pytest.fixture
def nodes():
    made = two_nodes()
    yield made
    made.close()


def start(nodes: Nodes, directory: Path, *arguments: object) -> Job:
    sizes = ["--sizes", '{"tp_size": 2, "dp_shard_size": 2}', "--data_ranks", "2"]
    commands = launch(nodes, CONFIG, [str(SCRIPT), *sizes, *map(str, arguments)])
    return Job(commands, directory, [environment(GLOO_SOCKET_IFNAME=nodes.interface)] * 2)


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
