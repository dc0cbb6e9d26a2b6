"""Gradients under each optimised plan equal one process, full and LoRA, with ``labels=`` given (DESIGN: promise 1)."""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.planned_models import adapted, build_family, family_batches, family_gradients
from harness.pool import run_distributed

from hf_automodel_parallel.plan.sources.families import FAMILIES

FULL, LORA, FULL_WITH_IMAGES, LORA_WITH_IMAGES = (False, False), (True, False), (False, True), (True, True)


def check(name, mesh, kinds, **options):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, family_gradients, name, sizes, dp_size, kinds, **options)[0]
    for (adapter, images), (loss, gradients, origin) in zip(kinds, results, strict=True):
        assert origin == "registry"
        reference = adapted(name) if adapter else build_family(name)
        want_loss, want = loss_and_grads(reference, family_batches(name, dp_size, images))
        assert_losses_equal(loss, want_loss)
        assert_gradients_equal(gradients, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_tp2_fsdp2(name):
    """Vision-language models get images here."""
    sees = name.endswith("ForConditionalGeneration")
    check(name, "tp2_fsdp2", [FULL_WITH_IMAGES, LORA_WITH_IMAGES] if sees else [FULL, LORA])


@pytest.mark.parametrize("name", FAMILIES)
def test_tp2(name):
    """Full and LoRA in turn; vision-language models get text alone."""
    check(name, "tp2", [(FULL, LORA)[list(FAMILIES).index(name) % 2]])


def test_layers_of_both_models_of_a_vision_language_model_are_checkpointed():
    """The layers are found below the composite model, so that checkpointing does something and changes no gradient."""
    check("Gemma3ForConditionalGeneration", "tp2", [LORA_WITH_IMAGES], activation_checkpointing="full")
