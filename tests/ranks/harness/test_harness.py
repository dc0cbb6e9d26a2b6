"""The harness has to fail when it should: these tests are about `tests/harness`, not about the package."""

import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from harness.collectives import CollectiveCounts, count_collectives, count_collectives_profiler
from harness.compare import (
    assert_gradients_equal,
    full_grads,
    full_parameters,
)
from harness.pool import DIED, NO_ANSWER, DistributedFailure, close_pools, expect_error, run_distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORLD_SIZE = 2


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


def sum_over_ranks(tensor, *, scale):
    tensor = tensor * (dist.get_rank() + 1)
    dist.all_reduce(tensor)
    return dist.get_rank(), scale * tensor, os.getpid()


def raise_on(ranks, error="no such layer"):
    if dist.get_rank() in ranks:
        print("about to raise")
        raise ValueError(f"rank {dist.get_rank()}: {error}")
    dist.barrier()


def raise_before_and_after_a_new_group():
    """Leaves the ranks with different numbers of groups and of collectives."""
    if dist.get_rank() == 0:
        raise ValueError("early")
    dist.new_group([1], use_local_synchronization=True)
    raise ValueError("late")


def sleep_forever():
    time.sleep(3600)


def exit_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def return_what_cannot_be_pickled():
    return lambda: None


def leave_state_behind():
    accelerator = Accelerator(mixed_precision="bf16")
    parallel_block_gradients((1, WORLD_SIZE))  # meshes, and what DTensor caches about them
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    del os.environ["LOCAL_RANK"]
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    accelerator.end_training()  # destroys the process group


def process_state():
    state = PartialState()
    return {
        "group": dist.get_backend() if dist.is_initialized() else None,
        "groups": len(dist.distributed_c10d._world.pg_names),
        "meshes": sum(type(candidate) is DeviceMesh for candidate in gc.get_objects()),
        "processes": state.num_processes,
        "device": state.device.type,
        "accelerator state": dict(AcceleratorState._shared_state),
        "fsdp": os.environ.get("ACCELERATE_USE_FSDP"),
        "local rank": int(os.environ["LOCAL_RANK"]) - dist.get_rank(),
        "cwd": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.rand(1).item(),
        "cuda": torch.cuda.is_available(),
    }


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).relu()).square().sum()


def random_block():
    torch.manual_seed(3)
    return Block(), torch.randn(4, 8)


def parallel_block(mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
    block, x = random_block()
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
    return mesh, block, x


def parallel_block_gradients(mesh_shape):
    """Every data-parallel rank gets the same rows, so that the mean over them is the gradient of one of them."""
    _, block, x = parallel_block(mesh_shape)
    block(x).backward()
    return full_grads(block), full_parameters(block)


def count_known_sequence():
    world = dist.group.WORLD
    solo = init_device_mesh("cpu", (WORLD_SIZE, 1), mesh_dim_names=("all", "solo"))["solo"]
    x = torch.ones(4)

    def sequence():
        dist.all_reduce(x.clone())
        dist.all_reduce(x.clone(), group=solo.get_group())
        dist.broadcast(x.clone(), src=0)
        dist.all_gather_into_tensor(torch.empty(8), x)
        dist.reduce_scatter_tensor(torch.empty(2), x)
        dist.all_to_all_single(torch.empty(4), x)
        funcol.wait_tensor(funcol.all_reduce(x, "sum", world))
        funcol.wait_tensor(funcol.all_to_all_single(x, None, None, world))

    by_group = count_collectives(sequence)
    return by_group, by_group.on(solo), by_group.on(world), count_collectives_profiler(sequence)


def count_parallel_block(mesh_shape):
    mesh, block, x = parallel_block(mesh_shape)
    counts = count_collectives(lambda: block(x).backward())
    return counts.on(mesh["dp"]), counts.on(mesh["tp"])


def count_compiled():
    """Returns what each counter sees and whether compiled code ran, before and after a dispatch mode was active."""
    group = dist.group.WORLD
    ran_compiled = []

    @torch.compile(backend="aot_eager")
    def compiled(x):
        return funcol.all_reduce(x * 2, "sum", group) + 1, torch.compiler.is_compiling()

    def call():
        ran_compiled.append(compiled(torch.ones(4))[1])

    counts = [count_collectives_profiler(call), count_collectives_profiler(call), count_collectives(call).total]
    call()
    return counts, ran_compiled


# ---------------------------------------------------------------------------------------------------------------------
# Pool
# ---------------------------------------------------------------------------------------------------------------------


def worker_pids():
    return [pid for _, _, pid in run_distributed(WORLD_SIZE, sum_over_ranks, torch.ones(1), scale=1)]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.core
def test_results_of_all_ranks_come_back_in_order():
    results = run_distributed(WORLD_SIZE, sum_over_ranks, torch.tensor([1.0, 2.0]), scale=10)
    assert [rank for rank, _, _ in results] == [0, 1]
    for _, tensor, _ in results:
        torch.testing.assert_close(tensor, torch.tensor([30.0, 60.0]))
    assert len({pid for _, _, pid in results}) == WORLD_SIZE


def test_workers_are_kept_between_jobs():
    assert worker_pids() == worker_pids()


def leave_threads(number: int) -> int:
    for _ in range(number):
        threading.Thread(target=time.sleep, args=(60.0,), daemon=True).start()
    return os.getpid()


def test_workers_that_a_job_left_threads_in_are_replaced():
    assert not set(run_distributed(2, leave_threads, 40)) & set(run_distributed(2, leave_threads, 0))


@pytest.mark.core
def test_error_on_all_ranks_is_reported_and_the_pool_survives():
    pids = worker_pids()
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(WORLD_SIZE, raise_on, [0, 1])
    assert failure.value.errors.keys() == {0, 1}
    type_name, message, traceback = failure.value.errors[1]
    assert (type_name, message) == ("ValueError", "rank 1: no such layer")
    assert "in raise_on" in traceback
    assert "about to raise" in str(failure.value)  # the output of the rank
    assert worker_pids() == pids


def test_pool_survives_ranks_that_got_out_of_step():
    pids = worker_pids()
    assert expect_error(WORLD_SIZE, raise_before_and_after_a_new_group, match="early|late") == ["early", "late"]
    assert worker_pids() == pids


def test_error_on_one_rank_releases_the_others_in_bounded_time(monkeypatch):
    monkeypatch.setattr("harness.pool.FAILURE_GRACE", 2.0)
    pids = worker_pids()
    start = time.monotonic()
    with pytest.raises(AssertionError, match="an exception on every rank") as refusal:
        expect_error(WORLD_SIZE, raise_on, [1], match="")
    assert time.monotonic() - start < 8
    errors = refusal.value.__cause__.errors
    assert errors[1].type_name == "ValueError"
    assert errors[0].type_name == NO_ANSWER
    assert "in raise_on" in errors[0].traceback  # where the rank waits
    assert not any(is_running(pid) for pid in pids)
    assert set(worker_pids()).isdisjoint(pids)


def test_hang_ends_at_the_timeout():
    start = time.monotonic()
    with pytest.raises(DistributedFailure, match="no answer within 1") as failure:
        run_distributed(WORLD_SIZE, sleep_forever, timeout=1.0)
    assert time.monotonic() - start < 6
    assert {error.type_name for error in failure.value.errors.values()} == {NO_ANSWER}
    assert "in sleep_forever" in failure.value.errors[0].traceback


def test_death_of_a_rank_is_reported(monkeypatch):
    monkeypatch.setattr("harness.pool.FAILURE_GRACE", 2.0)
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(WORLD_SIZE, exit_on_rank_0)
    assert failure.value.errors[0].type_name == DIED
    assert "code 7" in failure.value.errors[0].message


def test_result_that_cannot_be_pickled_is_an_error_of_the_rank():
    with pytest.raises(DistributedFailure, match="pickle"):
        run_distributed(WORLD_SIZE, return_what_cannot_be_pickled)


def test_function_that_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match="cannot be imported"):
        run_distributed(WORLD_SIZE, lambda: None)


def test_jobs_start_from_the_same_state():
    before = run_distributed(WORLD_SIZE, process_state)
    run_distributed(WORLD_SIZE, leave_state_behind)
    after = run_distributed(WORLD_SIZE, process_state)
    assert before == after
    assert before[1]["groups"] == 1
    assert before[1]["meshes"] == 0
    assert (before[1]["processes"], before[1]["device"], before[1]["cuda"]) == (WORLD_SIZE, "cpu", False)
    assert before[1]["accelerator state"] == {}


@pytest.mark.core
def test_expect_error_wants_every_rank_to_raise_the_message():
    assert expect_error(WORLD_SIZE, raise_on, [0, 1], match="no such") == [f"rank {r}: no such layer" for r in (0, 1)]
    with pytest.raises(AssertionError, match=r"not in the message of rank \[1\]"):
        expect_error(WORLD_SIZE, raise_on, [0, 1], match="rank 0")
    with pytest.raises(AssertionError, match="no rank raised"):
        expect_error(WORLD_SIZE, raise_on, [], match="")


# ---------------------------------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------------------------------


def test_counters_count_a_known_sequence():
    counts, solo, world, profiled = run_distributed(WORLD_SIZE, count_known_sequence)[1]
    shared = {"all_reduce": 2, "broadcast": 1, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 2}
    assert counts == CollectiveCounts({(0, 1): shared, (1,): {"all_reduce": 1}})
    assert counts.largest["all_gather"] == 8 and counts.largest["all_reduce"] == 4
    assert (world, solo) == (shared, {"all_reduce": 1})
    assert counts.total == profiled == shared | {"all_reduce": 3}


@pytest.mark.core
def test_counter_tells_data_from_tensor_parallel_collectives():
    """All at once would take four ranks, so each of them gets a mesh in which the other has only this rank."""
    sharded, _ = run_distributed(WORLD_SIZE, count_parallel_block, (WORLD_SIZE, 1))[0]
    _, tensor_parallel = run_distributed(WORLD_SIZE, count_parallel_block, (1, WORLD_SIZE))[0]
    assert sharded == {"all_gather": 1, "reduce_scatter": 1}
    assert tensor_parallel == {"all_reduce": 2}


def test_profiler_counts_compiled_code_and_a_dispatch_mode_switches_it_off():
    """If the second half fails, torch has become better than the docstring of `collectives` says."""
    counts, ran_compiled = run_distributed(WORLD_SIZE, count_compiled)[0]
    assert counts == [{"all_reduce": 1}] * 3
    assert ran_compiled == [True, True, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Models, batches, oracle
# ---------------------------------------------------------------------------------------------------------------------


def test_full_gradients_of_a_parallel_module_equal_those_of_the_module():
    block, x = random_block()
    block(x).backward()
    for mesh_shape in ((1, 2), (2, 1)):
        for gradients, parameters in run_distributed(WORLD_SIZE, parallel_block_gradients, mesh_shape):
            assert_gradients_equal(gradients, full_grads(block))
            for name, parameter in full_parameters(block).items():
                torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=0)


# Last, so that no other test has to start the pool again.
def test_closed_pools_leave_no_process():
    pids = worker_pids()
    close_pools()
    assert not any(is_running(pid) for pid in pids)
