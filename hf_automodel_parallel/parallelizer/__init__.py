"""The reference API: ``nemo_automodel.components.distributed.parallelizer`` under its own names and signatures.

Code written for the reference only has to change its import. This subpackage has the functions that only the reference
API needs; all other names are implemented elsewhere in the package. ``docs/reference_api.md`` lists where each name is
implemented, and each difference from the reference with its reason. Names with a leading underscore are aliases of
public functions.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from ..activation_checkpointing import is_checkpoint_wrapped
from ..backends.megatron_fsdp.standalone import megatron_fsdp_strategy_parallelize
from ..compat import hash_specs_of_symbolic_shapes, is_transformers_v5_or_higher
from ..compile import apply_per_layer_compile
from ..core.model_structure import all_frozen, largest_container, model_layers, submodule
from ..core.model_structure import layer_groups as get_model_layer_groups
from ..core.options import GivenPlan
from ..fsdp.recursive import apply_fsdp2_sharding_recursively
from ..fsdp.shard import unshard_fsdp2_model
from ..plan.sources.registry import PARALLELIZE_FUNCTIONS
from ..selective_checkpointing import apply_selective_activation_checkpointing
from ..strategies.base import ParallelizationStrategy, call_arguments
from ..strategies.default import DefaultParallelizationStrategy
from ..strategies.families.bagel import (
    BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS,
    apply_bagel_full_layer_activation_checkpointing,
)
from ..strategies.families.deepseek_v4 import DeepseekV4ParallelizationStrategy
from ..strategies.families.hunyuan_video import HunyuanParallelizationStrategy
from ..strategies.families.nemotron_h import NemotronHParallelizationStrategy, nemotronh_decoder_blocks
from ..strategies.families.qwen3_5 import Qwen3_5ParallelizationStrategy
from ..strategies.families.wan import WanParallelizationStrategy
from ..strategies.registry import (
    DEFAULT_STRATEGY,
    PARALLELIZATION_STRATEGIES,
    get_parallelization_strategy,
    register_parallel_strategy,
)
from ..tensor_parallel.head_counts import attention_is_head_sharded, update_attention_head_counts_for_tp
from .import_paths import import_class_from_path, import_classes_from_paths
from .torch_plans import get_hf_tp_shard_plan, get_parallel_plan, translate_to_torch_parallel_style
from .tp_mesh import validate_tp_mesh, validate_tp_mesh_for_nemotron_nas

if TYPE_CHECKING:
    HAVE_MEGATRON_FSDP: bool
    Gemma4ForConditionalGeneration: type

__all__ = [
    "HAVE_MEGATRON_FSDP",
    "PARALLELIZATION_STRATEGIES",
    "PARALLELIZE_FUNCTIONS",
    "DeepseekV4ParallelizationStrategy",
    "DefaultParallelizationStrategy",
    "Gemma4ForConditionalGeneration",
    "HunyuanParallelizationStrategy",
    "NemotronHParallelizationStrategy",
    "ParallelizationStrategy",
    "Qwen3_5ParallelizationStrategy",
    "WanParallelizationStrategy",
    "apply_fsdp2_sharding_recursively",
    "apply_selective_activation_checkpointing",
    "fsdp2_strategy_parallelize",
    "get_hf_tp_shard_plan",
    "get_model_layer_groups",
    "get_parallelization_strategy",
    "import_class_from_path",
    "import_classes_from_paths",
    "megatron_fsdp_strategy_parallelize",
    "register_parallel_strategy",
    "translate_to_torch_parallel_style",
    "unshard_fsdp2_model",
    "validate_tp_mesh",
    "validate_tp_mesh_for_nemotron_nas",
]

logger = logging.getLogger(__name__)


def fsdp2_strategy_parallelize(
    model: nn.Module,
    device_mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    sequence_parallel: bool = False,
    activation_checkpointing: bool | str = False,
    tp_shard_plan: GivenPlan = None,
    dp_replicate_mesh_name: str = "dp_replicate",
    dp_shard_cp_mesh_name: str = "dp_shard_cp",
    tp_mesh_name: str = "tp",
    enable_async_tensor_parallel: bool = False,
    enable_compile: bool = False,
    enable_fsdp2_prefetch: bool = True,
    fsdp2_backward_prefetch_depth: int = 2,
    fsdp2_forward_prefetch_depth: int = 1,
    reshard_after_forward: bool | None = None,
) -> nn.Module:
    """Parallelise ``model`` in place with the strategy of its class, without an Accelerator, and return it.

    The arguments are passed to the :meth:`~.strategies.base.ParallelizationStrategy.parallelize` of this strategy, as
    far as its signature has them. See :meth:`~.strategies.default.DefaultParallelizationStrategy.parallelize` for their
    meaning.

    Raises:
        AutoParallelError: on all ranks, if the strategy does not support an argument.
    """
    strategy = get_parallelization_strategy(model)
    # Argument -> (value, default). A strategy may lack an argument only if it has its default.
    asked: dict[str, tuple[Any, Any]] = {
        "mp_policy": (mp_policy, None),
        "offload_policy": (offload_policy, None),
        "sequence_parallel": (sequence_parallel, False),
        "activation_checkpointing": (activation_checkpointing, False),
        "tp_shard_plan": (tp_shard_plan, None),
        "dp_replicate_mesh_name": (dp_replicate_mesh_name, "dp_replicate"),
        "dp_shard_cp_mesh_name": (dp_shard_cp_mesh_name, "dp_shard_cp"),
        "tp_mesh_name": (tp_mesh_name, "tp"),
        "enable_async_tensor_parallel": (enable_async_tensor_parallel, False),
        "enable_compile": (enable_compile, False),
        "enable_fsdp2_prefetch": (enable_fsdp2_prefetch, True),
        "fsdp2_backward_prefetch_depth": (fsdp2_backward_prefetch_depth, 2),
        "fsdp2_forward_prefetch_depth": (fsdp2_forward_prefetch_depth, 1),
        "reshard_after_forward": (reshard_after_forward, None),
    }
    arguments = call_arguments(strategy.parallelize, asked, type(strategy).__name__)
    return strategy.parallelize(model=model, device_mesh=device_mesh, **arguments)


_BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS = BAGEL_FULL_LAYER_CHECKPOINT_MODULE_LISTS
_DEFAULT_STRATEGY = DEFAULT_STRATEGY
_apply_bagel_full_layer_activation_checkpointing = apply_bagel_full_layer_activation_checkpointing
_apply_per_layer_compile = apply_per_layer_compile
_attention_is_head_sharded = attention_is_head_sharded
_extract_model_layers = model_layers
_find_largest_module_list = largest_container
_get_module_by_fqn = submodule
_get_parallel_plan = get_parallel_plan
_is_checkpoint_wrapped = is_checkpoint_wrapped
_is_transformers_v5_or_higher = is_transformers_v5_or_higher
_nemotronh_decoder_blocks = nemotronh_decoder_blocks
_patch_dtensor_spec_hash_for_symint = hash_specs_of_symbolic_shapes
_subtree_all_frozen = all_frozen
_update_attention_head_counts_for_tp = update_attention_head_counts_for_tp


def __getattr__(name: str) -> Any:
    # Evaluated on access, because each of them imports a large library.
    if name == "HAVE_MEGATRON_FSDP":
        from ..backends import megatron_fsdp as megatron

        return megatron.HAVE_MEGATRON_FSDP
    if name == "Gemma4ForConditionalGeneration":
        from ..compat import gemma4_class

        return gemma4_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
