"""Key and value heads fewer than tp ranks: what cannot be replicated is refused."""

import pytest
from harness.models import MODELS
from harness.training import build


def test_what_is_not_known_to_be_keys_is_refused():
    from hf_automodel_parallel.errors import PlanError
    from hf_automodel_parallel.plan.resolve import resolve
    from hf_automodel_parallel.plan.select import select_plan
    from hf_automodel_parallel.plan.validate import validate

    assert MODELS["llama_mqa"][1]["num_key_value_heads"] == 1
    model = build("llama_mqa")
    for layer in model.model.layers:
        del layer.self_attn.num_key_value_groups
    spec = resolve(model, select_plan(model), 2)
    with pytest.raises(PlanError, match="num_key_value_heads=1 does not divide by tp_size=2"):
        validate(model, spec, 2)
    six = build(
        "llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=96, head_dim=12, intermediate_size=96
    )
    with pytest.raises(PlanError, match="num_key_value_heads=2.*multiple of 2"):
        resolve(six, select_plan(six), 3)
