"""Code that comes with a model: its plan."""

from ranks.plan.custom_code_jobs import DIRECTORY, custom
from transformers import AutoModelForCausalLM

from hf_automodel_parallel.plan.select import select_plan


def test_the_plan_of_a_class_that_from_pretrained_loads(tmp_path):
    model = custom("PlannedForCausalLM")
    model.save_pretrained(tmp_path)
    for file in DIRECTORY.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    plan = select_plan(loaded)
    assert plan.origin == "hf" and plan.entries["layers.*.mlp.up"].source == "class PlannedForCausalLM"
