"""Sequence parallelism equals one process: lengths that tp does not divide, all kinds of blocks, checkpoints and
compilation.
"""

import re
from typing import Any

import pytest
import torch
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.dropout_jobs import gradients_and_masks, replayed_masks
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import DistributedFailure, expect_error, run_distributed
from harness.training import LORA, batches_for, build

from hf_automodel_parallel.compat import checkpoints_around_calls
from ranks.sequence_parallel.jobs import (
    ODD,
    BeforeHead,
    SecretlyWritingMLP,
    activations_outside,
    batches_of,
    compiled_by_the_user,
    dropped_layers,
    ends_looked_at,
    ends_looked_at_on_shares,
    freeze,
    gradients_of_dropped_layers,
    hooked,
    opt,
    outputs,
    outputs_of_one_model,
    sequence_gradients,
    written_gradients,
)
from ranks.tensor_parallel.test_dropout import assembled, shapes_of

#: Models of the adapters' matrix that the one of sequence parallelism does not have.
MORE_MODELS = [
    ("llama_odd_vocab", "tp2_fsdp2", None),
    ("mixtral_aux", "tp4", None),
    ("qwen3_moe_aux", "tp2_fsdp2", LORA),
]


def check(
    model: str, mesh: str, adapter: dict | None, sizes: dict | None = None, overrides: dict | None = None, **more: Any
) -> None:
    """Compare one cell with the one-process oracle."""
    world, mesh_sizes, dp_size = MESHES[mesh]
    if mesh == "tp4":
        overrides = {"num_key_value_heads": 4, **(overrides or {})}
    loss, gradients = run_distributed(
        world,
        sequence_gradients,
        model,
        {**mesh_sizes, **(sizes or {})},
        adapter=adapter,
        overrides=overrides,
        dp_size=dp_size,
        timeout=240,
        **more,
    )[0]
    reference = build(model, adapter, **(overrides or {}))
    freeze(reference, more.get("frozen", ""))
    if (
        "own_checkpointing" in more
    ):  # a reentrant one cuts the gradient of the loss of router logits, in one process, too
        reference.gradient_checkpointing_enable(gradient_checkpointing_kwargs=more["own_checkpointing"])
        reference.train()
    batches = [part for length in more.get("lengths", (ODD,)) for part in batches_of(reference, dp_size, length)]
    want_loss, want = loss_and_grads(reference, batches)
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


#: mode of checkpointing -> (config fields, arguments of the job); "own" is that of transformers.
CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "full": ({"activation_checkpointing": "full"}, {}),
    "submodule": ({"activation_checkpointing": "submodule"}, {}),
    "selective": ({"activation_checkpointing": "selective"}, {}),
    "own": ({}, {"own_checkpointing": {"use_reentrant": False}}),
}


@pytest.mark.parametrize("model, mesh, adapter", MORE_MODELS)
def test_gradients_equal_one_process(model, mesh, adapter):
    check(model, mesh, adapter)


OWN_REENTRANT = {"own_checkpointing": {"use_reentrant": True}}


def test_a_reentrant_recomputation_knows_the_length_of_its_own_forward():
    check("mixtral_aux", "tp2", None, lengths=(15, 10), **OWN_REENTRANT)


REGATHER = {"tp_size": 2, "sequence_parallel_regather": True}


@pytest.mark.core_cases("full")
@pytest.mark.parametrize(
    "fields, more, named",
    [
        ({"activation_checkpointing": "full"}, {}, "activation_checkpointing='full'"),
        ({"activation_checkpointing": "submodule"}, {}, "activation_checkpointing='submodule'"),
        ({}, {"own_checkpointing": {"use_reentrant": False}}, "the model's own gradient checkpointing"),
    ],
    ids=["full", "submodule", "own"],
)
def test_gathering_again_is_refused_where_it_happens_anyway(fields, more, named):
    message = rf"sequence_parallel_regather=True with {named}: .*Leave out one of the two"
    expect_error(2, sequence_gradients, "llama", {**REGATHER, **fields}, match=message, **more)


def test_gathering_again_says_where_it_cannot():
    """Under a compilation of the whole model; said once, and the gradients are right."""
    for loss, gradients, said in run_distributed(2, compiled_by_the_user, "llama", timeout=190):
        model = build("llama").train()
        want_loss, want = loss_and_grads(model, batches_of(model, 1))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)
        assert len(said) == 1 and "compile=True" in said[0], said


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "path, tokens", [("model.layers.1", 6), ("model.layers.0.mlp", 6), ("model.layers.0.mlp.up_proj", 12)]
)
def test_a_hook_that_sees_a_share_is_told_so(path, tokens, when):
    """Once, on the first rank. Inside of a block it sees the whole sequence."""
    for rank, (said, lengths) in enumerate(run_distributed(2, hooked, path, when)):
        assert lengths == [tokens] * 2
        assert len(said) == (tokens == 6 and rank == 0), said
        assert all(path in message and "1/2 of the sequence" in message for message in said)


@pytest.mark.core_cases("3")
@pytest.mark.parametrize("length", [2, 3, 5])
def test_sequences_shorter_than_the_ranks(length):
    check("llama", "tp4", None, lengths=(length, 8))


@pytest.mark.both_ends
@pytest.mark.parametrize("mode", ["full", "own", "own-reentrant"])
def test_both_supported_transformers_versions(mode):
    sizes, more = ({}, OWN_REENTRANT) if mode == "own-reentrant" else CHECKPOINTS[mode]
    build("llama")  # loads the part of transformers that is asked
    if mode.startswith("own") and checkpoints_around_calls():
        with pytest.raises(
            DistributedFailure, match="needs transformers 5.23 or later.*activation_checkpointing='full'"
        ):
            check("llama", "tp2", LORA, sizes, lengths=(15, 10), **more)
        return
    check("llama", "tp2", LORA, sizes, lengths=(15, 10), **more)


@pytest.mark.core_cases("norm")
@pytest.mark.parametrize("frozen", ["norm", "layers.0", "embed_tokens"])
def test_what_is_frozen_stays_frozen(frozen):
    """The reference system makes frozen norms trainable under sequence parallelism."""
    check("llama", "tp2_fsdp2", None, frozen=frozen)


@pytest.mark.parametrize("adapter", [{"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}])
def test_copies_of_norms_to_save(adapter):
    check("llama", "tp2", adapter)


def test_biases_after_the_reduction():
    """Added to shares, so each rank has a summand of their gradient; those of column-wise layers stay as they were."""
    check("llama", "tp2", LORA, overrides={"attention_bias": True, "mlp_bias": True})
    check("llama", "tp2", None, overrides={"attention_bias": True, "mlp_bias": True})


@pytest.mark.core
def test_one_rank_of_tp_is_refused():
    expect_error(
        2, sequence_gradients, "llama", {"dp_shard_size": 2}, match=r"sequence_parallel=True with tp_size=1.*tp_size=2"
    )


def test_context_parallelism_beside_it_is_refused():
    message = r"cp_size=2 cannot be used with LlamaForCausalLM: sequence_parallel=True .*Leave out one of the two"
    expect_error(4, sequence_gradients, "llama", {"tp_size": 2, "cp_size": 2}, match=message)


@pytest.mark.core
def test_a_layer_that_cannot_be_understood_is_refused_by_name():
    expect_error(
        2,
        sequence_gradients,
        "gemma3n",
        {"tp_size": 2},
        match=r"model\.layers\.0 \(Gemma3nTextDecoderLayer\) is not a hidden state",
    )


def test_activations_outside_of_the_forward_are_refused():
    for kept, called in run_distributed(2, activations_outside):
        assert "leaves activations in model.layers.*.kept" in kept
        assert "model.layers.0 was called outside of the model's forward" in called


# ---- what is not a training forward
# ------------------------------------------------------------------------------------


@pytest.mark.core
def test_outputs_are_whole():
    """Recorded hidden states and logits, while training and evaluating; their gradients, too; generation."""
    for rank in run_distributed(2, outputs_of_one_model, "llama", {"tp_size": 2}):
        model = build("llama", attn_implementation="eager")
        want = outputs(model)
        assert rank.keys() == want.keys()
        for key in want:
            for got, expected in zip(rank[key], want[key], strict=True):
                assert got.shape == expected.shape, key
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_whoever_stands_between_norm_and_head_sees_the_whole_gradient():
    """Functions with a backward of their own, hooks, and gradients that are retained after the forward."""
    for rank in run_distributed(2, ends_looked_at_on_shares, "llama"):
        model, before_head = build("llama").train(), BeforeHead()
        model.lm_head.register_forward_pre_hook(before_head)
        want = ends_looked_at(model, before_head)
        assert rank.keys() == want.keys()
        for key in want:
            assert_gradients_equal(*({str(i): g for i, g in enumerate(r[key])} for r in (rank, want)))


def test_layers_that_are_left_out():
    """Whichever layer is called first splits, the final norm if none is; the end has to be called."""
    for rank, said in run_distributed(2, dropped_layers):
        for called, (want_loss, want) in gradients_of_dropped_layers(opt()).items():
            loss, gradients = rank[called]
            assert_losses_equal(loss, want_loss)
            assert_gradients_equal(gradients, want)
        assert re.search(r"model\.layers\.1, which returns the full sequence, was not called.*layerdrop=0", said), said


@pytest.mark.parametrize(
    "model, sizes",
    [
        ("llama", {"sequence_parallel_regather": True}),
        ("mixtral", {"sequence_parallel_regather": True}),
        ("llama", {"compile": "aot_eager"}),
        ("llama", {"compile": "aot_eager", "sequence_parallel_regather": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_blocks_that_change_their_input_in_place(model, sizes):
    """Mixtral multiplies it by noise."""
    want_loss, want = written_gradients(model, None)
    for loss, gradients in run_distributed(2, written_gradients, model, sizes):
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


def test_a_write_in_place_that_was_not_foreseen_is_refused_by_the_compiler():
    """Eagerly it is seen when it happens."""
    message = (
        r"sequence_parallel=True with compile: a block changes its input in place.*Change a copy.*or leave out compile"
    )
    compiled = {"compile": "aot_eager"}  # the time is the compiler's
    expect_error(2, written_gradients, "llama", compiled, SecretlyWritingMLP, match=message, within=120.0)
    want_loss, want = written_gradients("llama", None, SecretlyWritingMLP)
    loss, gradients = run_distributed(2, written_gradients, "llama", {}, SecretlyWritingMLP)[0]
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


# ---- dropout
# -----------------------------------------------------------------------------------------------------------

RESIDUAL = {"attn_implementation": "eager", "attention_dropout": 0.25, "resid_pdrop": 0.25}


@pytest.mark.core_cases("none")
@pytest.mark.parametrize("mode", ["none", "full", "submodule", "selective", "own"])
def test_masks(mode):
    """Residual dropout draws another mask on each share; what is replicated draws equal ones; recomputations repeat
    them.
    """
    sizes, more = CHECKPOINTS[mode]
    own = {"hf_checkpointing": more["own_checkpointing"]} if more else {}
    adapter = {**LORA, "lora_dropout": 0.25}
    loss, gradients, masks = run_distributed(
        2, gradients_and_masks, "phi3", {"tp_size": 2, "sequence_parallel": True, **sizes}, adapter, RESIDUAL, **own
    )[0]
    reference = build("phi3", adapter, **RESIDUAL).train()
    batches = batches_for(reference, 1)
    drawn, replicated, sharded = assembled(masks, shapes_of(reference, batches[0]))
    layers = 2
    assert (replicated, sharded) == (layers * 3, layers * 4), (replicated, sharded)
    with replayed_masks(drawn):
        want_loss, want = loss_and_grads(reference, batches)
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


def test_compile_refuses_dropout_on_shares():
    expect_error(
        2,
        sequence_gradients,
        "phi3",
        {"tp_size": 2, "compile": "aot_eager"},
        overrides={"resid_pdrop": 0.25},
        match=r"resid_attn_dropout \(Dropout\) has p=0.25",
    )
