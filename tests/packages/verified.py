"""A package of a user: an architecture that nobody has seen, a plan for it, and strategies; one of these is wrong."""

from dataclasses import replace

from custom_code.configuration_small import SmallConfig
from custom_code.modeling_small import UnplannedForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from hf_automodel_parallel import DefaultParallelizationStrategy, register_parallel_strategy
from hf_automodel_parallel.core.sharding_spec import ParameterSpec


class OwnConfig(SmallConfig):
    model_type = "verified_own"


class OwnForCausalLM(UnplannedForCausalLM):
    config_class = OwnConfig


class OtherConfig(SmallConfig):
    model_type = "verified_other"


class OtherForCausalLM(UnplannedForCausalLM):
    config_class = OtherConfig


for config, model in ((OwnConfig, OwnForCausalLM), (OtherConfig, OtherForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)

plan = {"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise"}
wrong_plan = {**plan, "layers.*.mlp_norm": "replicated_with_grad_allreduce"}


@register_parallel_strategy(name="OwnForCausalLM")
class OwnStrategy(DefaultParallelizationStrategy):
    """Says that it was used."""

    def select_tensor_parallel(self, context):
        super().select_tensor_parallel(context)
        context.plan = replace(context.plan, origin=f"{context.plan.origin} by OwnStrategy")


@register_parallel_strategy(name="OtherForCausalLM")
class WrongStrategy(DefaultParallelizationStrategy):
    """Sums a gradient over tp that is complete on each rank."""

    def select_tensor_parallel(self, context):
        super().select_tensor_parallel(context)
        context.spec.parameters["layers.1.attention_norm.weight"] = ParameterSpec(partial_gradient=True)
