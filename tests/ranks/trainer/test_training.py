"""Five optimizer steps through the stock Trainer and a plain Accelerate loop follow one process: losses and norms."""

import pytest
from harness.meshes import MESHES
from harness.oracle import train_steps
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, five_steps_accelerate, five_steps_trainer

#: Relative. AdamW amplifies rounding, so the norms of later steps are compared less tightly than gradients.
LOSS, NORM = 1e-6, 1e-5


def assert_same_history(got: list[dict[str, float]], want: list[dict[str, float]], digits: float = 0.0) -> None:
    """Equal losses and norms, step by step; `digits` is the rounding of a log."""
    assert len(got) == len(want)
    for step, (g, w) in enumerate(zip(got, want, strict=True)):
        assert abs(g["loss"] - w["loss"]) <= LOSS * abs(w["loss"]) + digits, (step, got, want)
        assert abs(g["grad_norm"] - w["grad_norm"]) <= NORM * abs(w["grad_norm"]) + digits, (step, got, want)


CELLS = [
    ("llama", "tp2_fsdp2", None),
    ("llama_tied", "tp2", None),
    ("qwen3", "fsdp2", None),
    ("phi3", "hsdp", LORA),
    ("mixtral", "tp2_fsdp2", LORA),
    ("gemma3", "tp2_fsdp2", LORA),
    ("qwen3_moe", "tp2", LORA),
    ("llama", "hsdp", LORA),
    ("llama_tied", "tp2_fsdp2", LORA),
    ("llama_odd_vocab", "tp2_fsdp2", None),
    ("qwen3", "tp2_fsdp2", LORA),
    ("gemma3", "hsdp", None),
    ("phi3", "tp2", None),
    ("mixtral", "fsdp2", None),
    ("mixtral_aux", "tp2_fsdp2", None),
    ("qwen3_moe", "tp2_fsdp2", None),
    ("qwen3_moe_aux", "tp2", LORA),
]


@pytest.mark.core_cases("llama-tp2_fsdp2-accumulation=4-max_grad_norm=0.05")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 4, "max_grad_norm": 0.05},
        {"optimizer": "fused"},
        {"optimizer": "foreach", "max_grad_norm": 0.05},
        {"optimizer": "forloop"},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
@pytest.mark.parametrize("cell", CELLS[:1] + CELLS[4:5], ids=lambda c: "-".join(map(str, c[:2])))
def test_accelerate_loop_options(cell, options):
    check_accelerate(*cell, **options)


@pytest.mark.core_cases("llama_tied-tp2", "qwen3-fsdp2", "phi3-hsdp", "llama-tp2_fsdp2")
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join(map(str, c[:2])))
def test_accelerate_loop(cell):
    check_accelerate(*cell)


def check_accelerate(model, mesh, adapter, accumulation=1, max_grad_norm=1.0, optimizer="adamw"):
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(
        world,
        five_steps_accelerate,
        model,
        sizes,
        adapter=adapter,
        dp_size=dp_size,
        accumulation=accumulation,
        max_grad_norm=max_grad_norm,
        optimizer=optimizer,
    )[0]
    reference = build(model, adapter)
    steps = [batches_for(reference, dp_size * accumulation, rows=8, seed=10 + step) for step in range(5)]
    assert_same_history(got, train_steps(reference, steps, lr=1e-3, max_grad_norm=max_grad_norm))


@pytest.mark.core_cases("llama-tp2_fsdp2-plain", "llama_tied-tp2-ragged=True", "qwen3-fsdp2-optim=adamw_torch_fused")
@pytest.mark.parametrize(
    "cell, options",
    [
        (CELLS[0], {}),
        (CELLS[1], {"ragged": True}),
        (CELLS[2], {"optim": "adamw_torch_fused"}),
        (CELLS[3], {"ragged": True}),
        (CELLS[0], {"accumulation": 4, "max_grad_norm": 0.05, "ragged": True}),
        (("llama", "tp2_fsdp2", LORA), {"accumulation": 4, "max_grad_norm": 0.05, "ragged": True}),
        (("mixtral", "tp2_fsdp2", None), {}),
        (("qwen3_moe", "tp2_fsdp2", LORA), {"ragged": True}),
        (("llama_tied", "tp2_fsdp2", LORA), {}),
        (("llama_odd_vocab", "tp2_fsdp2", None), {"ragged": True}),
        (("qwen3", "hsdp", LORA), {}),
        (("gemma3", "tp2", None), {"ragged": "padded"}),
        (("gemma3", "tp2_fsdp2", LORA), {"optim": "adamw_torch_fused"}),
        (("phi3", "fsdp2", None), {}),
        (("mixtral", "fsdp2", LORA), {}),
        (("mixtral_aux", "tp2", LORA), {}),
        (("qwen3_moe_aux", "tp2", None), {}),
    ],
    ids=lambda x: (
        "-".join(map(str, x[:2])) if isinstance(x, tuple) else "-".join(f"{k}={v}" for k, v in x.items()) or "plain"
    ),
)
def test_stock_trainer(cell, options, tmp_path):
    model, mesh, adapter = cell
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(
        world, five_steps_trainer, model, sizes, adapter=adapter, dp_size=dp_size, output_dir=str(tmp_path), **options
    )[0]
    reference = build(model, adapter)
    accumulation = options.get("accumulation", 1)
    steps = [
        batches_for(reference, accumulation, 8 * accumulation, seed=10 + step, ragged=options.get("ragged", False))
        for step in range(5)
    ]
    want = train_steps(reference, steps, lr=1e-3, max_grad_norm=options.get("max_grad_norm", 1.0), combine="tokens")
    assert_same_history(got, want)
