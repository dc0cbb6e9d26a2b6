"""The GPU suite without a GPU: its plan, its figures, and CUDA's part on stand-ins."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import run
from benchmarks.children import Outcome, environment_of_ranks, status_of
from benchmarks.gpu import Run, device, lines_of, models, training, validation
from benchmarks.recorder import Recorder, read_results
from hf_automodel_parallel.errors import UnsupportedError

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 85_000_000_000, "peak_tflops": 989.4, "count": 8}


def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *given: str, hardware: dict = H100) -> Run:
    monkeypatch.setattr(device, "described_elsewhere", lambda device: hardware)
    options = run.parser("gpu").parse_args(["--suite", "gpu", "--out", str(tmp_path), *given])
    return Run(options, Recorder(tmp_path, "gpu", "command"))


def test_the_peak_is_that_of_the_longest_name():
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200 NVL": 835.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA GB200": 2500.0,
        "NVIDIA Quadro": None,
    }.items():
        assert device.peak_tflops(name) == peak


def test_visible_devices_are_the_first_that_were_visible():
    assert device.visible_devices({}, 2) == "0,1"
    assert device.visible_devices({"CUDA_VISIBLE_DEVICES": "3,GPU-ab,7"}, 2) == "3,GPU-ab"
    assert device.visible_devices({"CUDA_VISIBLE_DEVICES": ""}, 1) == "0"


def test_what_cuda_is_asked(monkeypatch):
    """Each function of torch.cuda that the suite calls, with the device of this rank."""
    asked = []
    standins = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 * 2**30,
        "max_memory_reserved": 4 * 2**30,
        "set_device": None,
        "device_count": 2,
        "is_available": True,
        "get_device_properties": SimpleNamespace(name="NVIDIA H200", total_memory=5),
    }
    for name, answer in standins.items():
        assert callable(getattr(torch.cuda, name)), "torch has renamed it"
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, answer=answer: asked.append((name, *a)) or answer)
    monkeypatch.setenv("LOCAL_RANK", "1")
    where = device.this_device("cuda")
    assert where == torch.device("cuda", 1)
    device.synchronize(where)
    device.reset_peak(where)
    assert device.peak_memory(where) == {"peak_allocated_gib": 3.0, "peak_reserved_gib": 4.0}
    assert device.describe("cuda") == {"name": "NVIDIA H200", "memory": 5, "peak_tflops": 989.4, "count": 2}
    assert {call[0] for call in asked} == set(standins)
    for name in ("set_device", "synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        assert (name, where) in asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.describe("cuda")["count"] == 0


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b"])
def test_flops_are_those_that_torch_counts(name, method):
    model = models.build(name, torch.float32, torch.device("cpu"), tiny=True)
    model.set_attn_implementation("eager")  # whose products are of whole squares
    if method == "lora":
        model = models.with_lora(model)
    ids = torch.randint(256, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    half_of_attention = 6 * layers * 32 * heads * (config.hidden_size // heads)
    # Nothing needs the gradient of the embedding's output when the embedding is frozen: q, k and v of the first layer.
    spared = 0
    if method == "lora":
        queries, keys, values = models.linear_sizes(models.geometry(name, True)[1])[:3]
        spared = sum(2 * i * o + 2 * models.LORA_RANK * i for i, o in (queries, keys, values))
    # The rotary angles are a product of 16 or 32 numbers.
    counted = counter.get_total_flops() / 32
    assert models.flops_per_token(model, 32) + half_of_attention - spared == pytest.approx(counted, rel=2e-3)
    estimate = models.estimated_flops_per_token(models.geometry(name, True)[1], method, 32)
    assert models.flops_per_token(model, 32) == pytest.approx(estimate)


def test_sizes_of_the_published_models():
    counts = {"llama-3.1-8b": 8.03e9, "qwen2.5-7b": 7.61e9, "llama-3.1-70b": 70.6e9}
    for name, count in counts.items():
        values = models.geometry(name)[1]
        assert models.parameter_count(values) == pytest.approx(count, rel=2e-3)
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            built = AutoModelForCausalLM.from_config(models.config_of(name))
        assert sum(p.numel() for p in built.parameters()) == pytest.approx(count, rel=2e-3)


def test_what_does_not_fit_is_trained_otherwise():
    """Full fine-tuning of 8B with AdamW takes more than 80 GB whatever is recomputed."""
    values = models.geometry("llama-3.1-8b")[1]
    assert models.training_that_fits(values, "lora", 1, 4096, 85_000_000_000) == ("adamw", False)
    assert models.training_that_fits(values, "lora", 1, 4096, 40_000_000_000) == ("adamw", True)
    assert models.training_that_fits(values, "full", 1, 4096, 85_000_000_000)[0] == "sgd"
    assert models.training_that_fits(values, "full", 1, 4096, 150_000_000_000)[0] == "adamw"
    assert models.training_that_fits(values, "full", 1, 4096, 1) == ("sgd", True)


def test_the_plan_of_a_run(tmp_path, monkeypatch):
    one = suite(tmp_path, monkeypatch)
    names = [case["name"] for case in one.trainings()]
    assert names[:4] == [
        "llama-3.1-8b, lora, stock",
        "llama-3.1-8b, lora, ours",
        "qwen2.5-7b, lora, stock",
        "qwen2.5-7b, lora, ours",
    ]
    first = one.trainings()[0]
    assert (first["micro_batch"] * first["accumulation"], first["sequence"], first["optimizer"]) == (32, 4096, "adamw")
    assert sum(case["expected_seconds"] for case in one.trainings()[:8]) < 400
    eight = suite(tmp_path, monkeypatch, "--gpus", "8").trainings()
    assert [case["config"].get("async_tensor_parallel", False) for case in eight] == [True, False]
    for case in eight:
        assert case["config"]["tp_size"] == 2 and case["checkpointing"] and case["compile"]
        assert case["data_ranks"] * case["accumulation"] * case["micro_batch"] == 32
    kinds = {case["kind"] for case in validation.cases(1, "cuda")}
    assert kinds == {case["kind"] for case in validation.cases(1, "cuda", smoke=True)} == set(validation._KINDS)
    assert len({case["name"] for case in validation.cases(8, "cuda")}) == len(validation.cases(8, "cuda"))


def test_a_stage_that_would_exceed_the_budget_is_skipped(tmp_path, monkeypatch):
    one = suite(tmp_path, monkeypatch, "--minutes", "0.2")
    one.train(one.trainings()[:1])
    one.write("throughput")
    (missed,) = read_results(tmp_path)["gpu-throughput"]["not_measured"]
    assert missed["what"] == "llama-3.1-8b, lora, stock" and "of the time are left" in missed["why"]


def test_without_memory_both_are_repeated_with_checkpointing(tmp_path, monkeypatch):
    one = suite(tmp_path, monkeypatch)
    full = Outcome("failed", message="OutOfMemoryError: CUDA out of memory. Tried to allocate")
    monkeypatch.setattr("benchmarks.gpu.run_cases", lambda function, cases, **_: {cases[0]["name"]: full})
    again = one.train(one.trainings()[:2])
    assert [(case["name"], case["checkpointing"]) for case in again] == [
        ("llama-3.1-8b, lora, stock, checkpointing", True),
        ("llama-3.1-8b, lora, ours, checkpointing", True),
    ]
    assert not one.train(again)


def test_the_exit_status_is_that_of_the_validation(tmp_path, monkeypatch, capsys):
    one = suite(tmp_path, monkeypatch)
    one.note("throughput", one.trainings()[0], Outcome("failed", message="slow"))
    one.summary()
    one.note("validation", {"case": "float32, full"}, Outcome("failed", message="Wrong: loss"))
    with pytest.raises(SystemExit) as end:
        one.summary()
    assert end.value.code == 1 and "FAILED: float32, full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpus", "9"], "--gpus 9: torch sees 8"),
        (["--only", "speed"], "--only speed"),
        (["--peers", "ours,nemo"], "--peers nemo"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_refused_arguments(tmp_path, monkeypatch, given, message):
    with pytest.raises(SystemExit, match=message):
        suite(tmp_path, monkeypatch, *given)
    with pytest.raises(SystemExit, match="no CUDA device"):
        suite(tmp_path, monkeypatch, hardware={**H100, "count": 0})


def test_ranks_start_without_what_a_launcher_left(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "PARALLELISM_CONFIG_TP_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    environment = environment_of_ranks("cuda", "0,1")
    assert not {"RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "LOCAL_RANK"} & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1" and environment["HF_HUB_OFFLINE"] == "1"
    assert environment_of_ranks("cpu", "0")["CUDA_VISIBLE_DEVICES"] == ""


def test_what_counts_as_refused():
    refused = UnsupportedError("no symmetric memory")
    assert status_of(refused, {"may_be_refused": True}) == "refused"
    assert status_of(refused, {}) == status_of(ValueError(), {"may_be_refused": True}) == "failed"


def test_a_checkpoint_of_holes(tmp_path):
    models.write_empty_checkpoint("llama-3.1-70b", tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size == pytest.approx(141e9, rel=1e-2)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 10_000_000


def gradients(*numbers: float) -> dict[str, torch.Tensor]:
    return {str(index): torch.full((4,), number) for index, number in enumerate(numbers)}


def test_bounds():
    exact = (2.0, gradients(1.0, 0.01))
    assert validation.compare_exact((2.0, gradients(1.0, 0.01)), exact)["gradient_error"] == 0.0
    for wrong in ((2.001, gradients(1.0, 0.01)), (2.0, gradients(1.0, 0.011)), (2.0, gradients(1.0))):
        with pytest.raises(validation.Wrong):
            validation.compare_exact(wrong, exact)
    with pytest.raises(validation.Wrong):
        validation.compare_exact((2.0, gradients(1.0, float("nan"))), exact)
    plain = (2.01, gradients(1.01, 0.0101))
    assert validation.compare_low((2.015, gradients(0.985, 0.01)), plain, exact)["of_bound"] < 1.0
    for wrong in ((2.1, plain[1]), (2.01, gradients(1.03, 0.01)), (2.01, gradients(1.0, 0.02))):
        with pytest.raises(validation.Wrong):
            validation.compare_low(wrong, plain, exact)


def test_figures_and_their_table(tmp_path, monkeypatch):
    found = training.figures(tokens=8000, seconds=2.0, devices=2, flops=1e10, peak=100.0)
    assert (found["tokens_per_s_per_gpu"], found["tflops_per_gpu"], found["mfu"]) == (2000.0, 20.0, 0.2)
    one = suite(tmp_path, monkeypatch)
    stock, ours = one.trainings()[:2]
    one.note("throughput", stock, Outcome("passed", {**found, "peak_allocated_gib": 50.0}))
    one.note("throughput", ours, Outcome("passed", {**found, "tokens_per_s_per_gpu": 1900.0}))
    lines = lines_of(one.rows["throughput"])
    assert lines[0].endswith("2,000 tokens/s/GPU, 20 TFLOP/s, MFU 20.0%, 50.0 GiB")
    assert lines[1].endswith("0.950 of stock")


@pytest.mark.parametrize("steps", [1, 3])
def test_the_clock_leaves_the_warm_up_out(monkeypatch, steps):
    """With one step it starts after some of its micro-batches, else after the first step."""
    done = [0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: done[0])
    clock = training.Clock(torch.device("cpu"), warm_up=2, accumulation=4, steps=steps)
    state = argparse.Namespace(global_step=0)
    for step in range(1, steps + 1):
        for _ in range(3):
            done[0] += 1
            clock.on_substep_end(None, state, None)
        done[0] += 1  # the last micro-batch and the optimizer
        state.global_step = step
        clock.on_step_end(None, state, None)
    assert (clock.begin, clock.end) == ((2, 3) if steps == 1 else (4, 12))
    assert clock.after_step == 4 * steps
