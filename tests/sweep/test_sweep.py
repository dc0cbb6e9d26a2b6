"""A covering dozen of the sweep, chosen for what their layers do; ``make sweep`` runs all types."""

import pytest
from harness.pool import run_distributed

from sweep.cells import MESHES, run_kinds
from sweep.report import report
from sweep.run import read_results, versions
from sweep.tiny import causal_lm_types, tiny_config

#: What a type stands for -> the type. The first six also run on two axes.
COVERING = {
    "an activation with parameters": "apertus",
    "latent attention": "deepseek_v3",
    "a norm inside of the embedding, shared experts without a boundary": "inkling_text",
    "keys shared between layers, statistics over features, per-layer embeddings": "gemma3n_text",
    "linear attention beside attention": "qwen3_next",
    "norms of heads that the plan does not name": "glm4_moe:use_qk_norm=True",
    "state-space layers and experts": "jamba",
    "a plan that fits a part of the layer only": "doge",
    "fused query, key and value": "phi3",
    "attention in chunks, experts without indices": "llama4_text",
    "norms with biases of heads": "phi:qk_layernorm=True",
    "a method of an embedding beside its forward": "prophetnet",
    "a router's auxiliary loss": "mixtral:output_router_logits=True",
}
TWO_AXES = list(COVERING.values())[:4]


def check(case, mesh, kinds):
    (outcomes, *_) = run_distributed(MESHES[mesh][0], run_kinds, case, mesh, kinds, timeout=200)
    problems = [f"{o['kind']}: {o['status']}: {o['detail']}" for o in outcomes if o["status"] != "parity"]
    assert not problems, "\n".join(problems)
    return outcomes


@pytest.mark.core_cases("phi3")
@pytest.mark.parametrize("case", COVERING.values(), ids=COVERING.values())
def test_gradients_equal_one_process(case):
    check(case, "tp2", ["full", "lora"])


@pytest.mark.parametrize("case", TWO_AXES)
def test_gradients_equal_one_process_on_two_axes(case):
    check(case, "tp2_fsdp2", ["full"])


def test_sequence_parallelism_sums_what_the_plan_does_not_name():
    check("apertus", "tp2", ["sp"])


@pytest.mark.core
def test_every_type_has_a_tiny_configuration():
    sizes = [tiny_config(t).get_text_config().vocab_size for t in causal_lm_types()[::12]]
    assert len(causal_lm_types()) > 90 and max(sizes) < 1000


@pytest.mark.core
def test_an_interrupted_sweep_continues_and_reports(tmp_path):
    from sweep.cells import Outcome

    done = Outcome("llama", "tp2", "full", "parity", 0.5, "weight", "LlamaForCausalLM", "hf", 1.0)
    bad = Outcome("bad", "tp2", "full", "wrong", 3e4, "weight | off", "Bad", "hf", 1.0)
    path = tmp_path / "results.jsonl"
    import json

    path.write_text("".join(json.dumps({"versions": versions(), **vars(o)}) + "\n" for o in (done, bad)))
    known = read_results(path, versions())
    assert known["llama", "tp2", "full"] == done and not read_results(path, "torch 1")
    page = report(list(known.values()), versions(), 60.0)
    assert "| llama | LlamaForCausalLM | hf | 0.50 |" in page and "**WRONG**" in page
    assert "**bad, full: wrong** (tp2): weight \\| off" in page
