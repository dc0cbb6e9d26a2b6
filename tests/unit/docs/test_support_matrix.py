"""The support matrix of the docs: what ``plan`` accepts and refuses, computed here. Run as a script, this writes it.

PYTHONPATH=.:tests python tests/unit/docs/test_support_matrix.py
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.fake_ranks import fake_world
from harness.models import build_model, lora
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import hf_automodel_parallel
from hf_automodel_parallel.core.mesh import MeshAxes
from hf_automodel_parallel.core.options import ParallelOptions
from hf_automodel_parallel.errors import AutoParallelError
from hf_automodel_parallel.strategies.context import ParallelizeContext
from hf_automodel_parallel.strategies.registry import get_parallelization_strategy

PAGE = Path(hf_automodel_parallel.__file__).resolve().parents[1] / "docs/support-matrix.md"
BEGIN, END = "<!-- matrix: begin (tests/unit/docs/test_support_matrix.py writes it) -->", "<!-- matrix: end -->"


def peft(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import peft

        layers = {} if kind == "PromptTuningConfig" else {"target_modules": ["q_proj", "down_proj"]}
        if kind == "IA3Config":
            layers["feedforward_modules"] = ["down_proj"]
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **{**layers, **options})
        return peft.get_peft_model(build_model("llama"), config)

    return build


def of_config(name: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(vocab_size=128, hidden_size=64, num_hidden_layers=2, **values)
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


def qlora() -> nn.Module:
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as directory:
        build_model("llama", hidden_size=128).save_pretrained(directory)
        base = AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
        )
    return lora(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))


#: what is trained -> how to build it
ROWS: dict[str, Callable[[], nn.Module]] = {
    "Llama, full": functools.partial(build_model, "llama"),
    "LoRA": peft("LoraConfig"),
    "LoRA with dropout": peft("LoraConfig", lora_dropout=0.1),
    "QLoRA (bitsandbytes 4 bit)": qlora,
    "DoRA": peft("LoraConfig", use_dora=True),
    "LoRA, `modules_to_save`": peft("LoraConfig", modules_to_save=["lm_head"]),
    "IA3": peft("IA3Config"),
    "prompt tuning": peft("PromptTuningConfig", num_virtual_tokens=4),
    "AdaLoRA": peft("AdaLoraConfig", total_step=10),
    "VeRA": peft("VeraConfig"),
    "attention dropout (Llama)": functools.partial(build_model, "llama", attention_dropout=0.1),
    "sliding window (Mistral)": functools.partial(build_model, "mistral", sliding_window=4),
    "experts (Qwen3-MoE)": functools.partial(build_model, "qwen3_moe"),
    "no plan of its own (OPT)": of_config(
        "OPT", ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64, dropout=0.0
    ),
    "state space (Mamba)": of_config("Mamba", state_size=4),
}

#: name of a column -> sizes of (dp_shard, cp, tp), options of ours, further attributes of the context
COLUMNS: dict[str, tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]] = {
    "FSDP2": ((2, 1, 1), {}, {}),
    "tp": ((1, 1, 2), {}, {}),
    "tp + sequence parallel": ((1, 1, 2), {"sequence_parallel": True}, {}),
    "cp": ((1, 2, 1), {}, {}),
    "tp + compile": ((1, 1, 2), {"compile": True}, {"compile_options": {"backend": "eager"}}),
    "`adapters_over_dp` replicated": ((2, 1, 1), {"adapters_over_dp": "replicated"}, {}),
}


def cell(row: str, column: str) -> str:
    """Whether ``plan`` accepts it on ranks that do not exist."""
    (dp_shard, cp, tp), options, attributes = COLUMNS[column]
    model = ROWS[row]()
    with fake_world(dp_shard * cp * tp):
        names, sizes = zip(*[(n, s) for n, s in (("dp_shard", dp_shard), ("cp", cp), ("tp", tp)) if s > 1 or n != "cp"])
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        if cp > 1:
            mesh[("dp_shard", "cp")]._flatten("dp_shard_cp")
        context = ParallelizeContext(
            model,
            mesh,
            torch.device("cpu"),
            ParallelOptions(**options),
            axes=MeshAxes("dp_replicate", "dp_shard_cp" if cp > 1 else "dp_shard", "tp"),
            context_parallel=cp > 1,
            **attributes,
        )
        context.fsdp.mp_policy = MixedPrecisionPolicy()
        try:
            get_parallelization_strategy(model).plan(context)
        except AutoParallelError:
            return "refused"
    return "yes"


def table() -> str:
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {row} | {' | '.join(cell(row, column) for column in COLUMNS)} |" for row in ROWS]
    return "\n".join(lines)


def written() -> dict[str, dict[str, str]]:
    text = PAGE.read_text()
    rows = re.findall(r"^\| (.+?) \|$", text[text.index(BEGIN) : text.index(END)], re.M)
    _, *names = (name.strip() for name in rows[0].split("|"))
    return {(parts := [p.strip() for p in row.split("|")])[0]: dict(zip(names, parts[1:])) for row in rows[1:]}


def test_the_page_has_these_rows_and_columns():
    shown = written()
    assert list(shown) == list(ROWS)
    assert all(list(cells) == list(COLUMNS) for cells in shown.values())


@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_plan_does(row):
    assert {column: cell(row, column) for column in COLUMNS} == written()[row]


def test_tests_of_trainers_exist():
    """Of the table of trainers, which is written by hand."""
    cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(cited) >= 10
    for path, name in cited:
        assert f"def {name}(" in (PAGE.parents[1] / path).read_text(), (path, name)


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + BEGIN + "\n" + table() + "\n" + page[page.index(END) :])
