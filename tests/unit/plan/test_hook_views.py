"""What a user's hook on each module of a planned model gets."""

import pytest
from harness.models import build_model

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.core.model_view import ModelView
from hf_automodel_parallel.plan.analysis.varying_check import complete
from hf_automodel_parallel.plan.hook_views import Activation, Features, HookView, hook_views
from hf_automodel_parallel.plan.resolve import resolve
from hf_automodel_parallel.plan.select import select_plan

LOCAL = HookView(Activation.LOCAL, Activation.LOCAL, Activation.LOCAL)
COLUMN = HookView(Activation.FULL, Activation.COPIED, Features(1, 2))
ROW = HookView(Features(1, 2), Features(1, 2), Activation.FULL)


@pytest.mark.parametrize("run", [True, False], ids=["run", "not_run"])
def test_views_of_a_llama(run):
    """Without a run of the layers what stands beside sharded projections is taken to differ across the ranks."""
    view = ModelView(build_model("llama"))
    plan = select_plan(view, None, ("hf",), 2, lambda *_: None)
    spec = resolve(view, plan, 2)
    if run:
        complete(view, spec, find_structure(view).layers, 2, False)
    views = hook_views(view.model, spec, 2)
    attention = views.pop("model.layers.0.self_attn", None)
    assert attention == (HookView(rest=(1,)) if run else None)
    assert views.pop("lm_head") == HookView(arguments=Activation.COPIED)
    layer = {name.removeprefix("model.layers.0."): value for name, value in views.items() if ".layers.0." in name}
    assert layer == {
        **dict.fromkeys(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], COLUMN),
        **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], COLUMN),
        **dict.fromkeys(["self_attn.o_proj", "mlp.down_proj"], ROW),
        "mlp.act_fn": LOCAL,
    }
