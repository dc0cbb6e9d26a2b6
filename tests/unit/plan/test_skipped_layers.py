"""Conditionally executed layers are found on fake tensors."""

from __future__ import annotations

from ranks.fsdp.test_skipped_layers import cross_attending

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.plan.analysis.skipped_layers import skipped_without_images


def test_the_layers_that_text_alone_skips_are_found():
    model = cross_attending()
    structure = find_structure(model)
    assert skipped_without_images(model, structure.main_layers) == [model.model.language_model.layers[1]]
