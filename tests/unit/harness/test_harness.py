"""Comparisons, models and the oracle of `tests/harness` fail when they should."""

import itertools

import pytest
import torch
from harness.compare import (
    assert_gradients_equal,
    assert_losses_equal,
    gradient_error,
    normalize_name,
)
from harness.models import IGNORED_LABEL, LORA_7, MODELS, build_model, lora, make_batches
from harness.oracle import count_labels, loss_and_grads, train_steps


@pytest.fixture
def gradients():
    return loss_and_grads(build_model("llama"), make_batches(2, 2, 8, 128, seed=0))[1]


def copy_of(gradients):
    return {name: gradient.clone() for name, gradient in gradients.items()}


def test_equal_gradients_pass(gradients):
    rounded = {name: gradient * (1 + 1e-6) for name, gradient in gradients.items()}
    assert_gradients_equal(rounded, gradients)


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"])
def test_one_perturbed_gradient_fails(gradients, name):
    got = copy_of(gradients)
    got[name].mul_(1 + 1e-4)
    with pytest.raises(AssertionError, match="1 of 21 gradients") as failure:
        assert_gradients_equal(got, gradients)
    assert str(failure.value).splitlines()[-1].endswith(name)


def test_wrong_values_that_are_not_numbers_fail(gradients):
    got = copy_of(gradients)
    got["lm_head.weight"][0, 0] = float("nan")
    with pytest.raises(AssertionError, match="lm_head"):
        assert_gradients_equal(got, gradients)


def test_missing_and_unexpected_gradients_fail(gradients):
    name = "lm_head.weight"
    with pytest.raises(AssertionError, match=f"{name}: missing"):
        assert_gradients_equal({k: v for k, v in gradients.items() if k != name}, gradients)
    with pytest.raises(AssertionError, match="extra: not expected"):
        assert_gradients_equal(gradients | {"extra": torch.ones(1)}, gradients)
    with pytest.raises(AssertionError, match=f"{name}: no gradient"):
        assert_gradients_equal(gradients | {name: None}, gradients)
    with pytest.raises(AssertionError, match=f"{name}: a gradient where none"):
        assert_gradients_equal(gradients, gradients | {name: None})
    with pytest.raises(AssertionError, match=rf"{name}: \(128, 64\) torch.float64"):
        assert_gradients_equal(gradients | {name: gradients[name].double()}, gradients)
    assert_gradients_equal(gradients | {name: None}, gradients | {name: None})


def test_gradient_error_is_relative_to_the_bound():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert gradient_error(reference * (1 + 2e-5), reference, all_ref_norm=5.0) == pytest.approx(2, rel=2e-3)
    zero = torch.zeros(2)
    assert gradient_error(zero, zero, all_ref_norm=0.0) == 0.0
    assert gradient_error(zero + 1e-9, zero, all_ref_norm=1.0) < 1.0


def test_losses():
    assert_losses_equal([1.0, 2.0], [1.0, 2.0000001])
    for got, want in (([1.0, 2.0], [1.0, 2.00001]), ([1.0], [1.0, 2.0]), (float("nan"), 1.0)):
        with pytest.raises(AssertionError):
            assert_losses_equal(got, want)


def test_names_lose_their_wrappers():
    assert normalize_name("module._orig_mod.layers.0._checkpoint_wrapped_module.up.weight") == "layers.0.up.weight"


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_random_and_has_a_gradient(name):
    model = build_model(name)
    assert model.config._attn_implementation == "sdpa"
    for parameter_name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, parameter_name
        assert parameter.count_nonzero() == parameter.numel(), parameter_name
        # The spread of n numbers is itself uncertain by one part in sqrt(2 n): little for a matrix, much for eight
        # numbers.
        assert parameter.std() > 0.07 - 0.1 * parameter.numel() ** -0.5, parameter_name
    _, gradients = loss_and_grads(model, make_batches(2, 2, 12, model.config.vocab_size, seed=0))
    for parameter_name, gradient in gradients.items():
        assert gradient is not None and gradient.norm() > 1e-4, parameter_name


def test_models_are_determined_by_their_seed():
    state = torch.get_rng_state()
    first, second, other = build_model("llama"), build_model("llama"), build_model("llama", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
    assert build_model("llama", num_hidden_layers=3).config.num_hidden_layers == 3


def test_tied_and_auxiliary_models_are_what_they_are_called():
    tied = build_model("llama_tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    batches = make_batches(1, 2, 12, 128, seed=0)
    for name in ("mixtral", "qwen3_moe"):
        loss, _ = loss_and_grads(build_model(name), batches)
        loss_with_auxiliary, _ = loss_and_grads(build_model(f"{name}_aux"), batches)
        assert loss_with_auxiliary > loss + 0.05


@pytest.mark.parametrize("overrides", [{}, {"target_modules": LORA_7}])
def test_adapters_have_gradients_on_both_sides(overrides):
    model = lora(build_model("llama"), **overrides)
    _, gradients = loss_and_grads(model, make_batches(1, 2, 12, 128, seed=0))
    adapters = {name: gradient for name, gradient in gradients.items() if "lora_" in name}
    assert len(adapters) == 2 * 2 * len(LORA_7)
    assert all(gradient.norm() > 0 for gradient in adapters.values())
    assert all(gradients[name] is None for name in gradients.keys() - adapters.keys())


def test_ragged_batches_differ_in_the_number_of_labels():
    for ragged in (True, "padded"):
        for batch in make_batches(3, 4, 10, 128, seed=0, ragged=ragged):
            labels = (batch["labels"] != IGNORED_LABEL).sum(dim=1).tolist()
            assert len(set(labels)) == 4 and min(labels) >= 2
            if ragged == "padded":
                assert batch["attention_mask"].sum(dim=1).tolist() == labels
            else:
                assert "attention_mask" not in batch


def test_oracle_averages_over_batches_or_over_tokens():
    model = build_model("llama")
    batches = make_batches(2, 3, 12, 128, seed=0, ragged=True)
    losses = [loss_and_grads(model, [batch])[0] for batch in batches]
    counts = [count_labels([batch]) for batch in batches]
    weighted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert_losses_equal(loss_and_grads(model, batches)[0], sum(losses) / 2)
    assert_losses_equal(loss_and_grads(model, batches, combine="tokens")[0], weighted)


def test_oracle_trains():
    batches = make_batches(1, 4, 12, 128, seed=0)
    history = train_steps(build_model("llama"), [batches] * 5, lr=1e-2, max_grad_norm=1.0)
    assert all(after["loss"] < before["loss"] for before, after in itertools.pairwise(history))
    assert history[0]["grad_norm"] > 1.0
