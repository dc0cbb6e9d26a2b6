"""All uses of private names of torch, transformers, accelerate, peft and megatron-fsdp.

:data:`.names.PRIVATE_NAMES` lists each name with the reason for its use. ``tests/unit/compat/test_private_names.py``
fails if a name disappears from its library, or if the package uses a private name that is not listed. Only this
subpackage imports private names. The list also has the private attributes that other modules read. Everything else in
the package uses public API.

Checked on: torch 2.13 and 2.15, transformers 5.17 and 5.24, accelerate 1.15, peft 0.21.
"""

from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

from .accelerate import accelerator_already_exists as accelerator_already_exists
from .accelerate import arguments_of_running_accelerator_init as arguments_of_running_accelerator_init
from .accelerate import bind_trainer_save as bind_trainer_save
from .accelerate import owner_of_running_accelerator_init as owner_of_running_accelerator_init
from .accelerate import parameters_of_ignored_modules as parameters_of_ignored_modules
from .accelerate import replace_checkpoint_request as replace_checkpoint_request
from .accelerate import save_trainer_checkpoint as save_trainer_checkpoint
from .accelerate import set_distributed_type_fsdp as set_distributed_type_fsdp
from .accelerate import trainer_save as trainer_save
from .accelerate import trainer_signal_manager_type as trainer_signal_manager_type
from .names import PRIVATE_NAMES as PRIVATE_NAMES
from .names import REPLACED as REPLACED
from .peft import adapter_state as adapter_state
from .peft import is_peft_model as is_peft_model
from .peft import parameter_adapter_stores_out_first as parameter_adapter_stores_out_first
from .peft import peft_auxiliary_wrapper_type as peft_auxiliary_wrapper_type
from .peft import peft_dora_layer_type as peft_dora_layer_type
from .peft import peft_layer_types as peft_layer_types
from .peft import peft_lora_variant_types as peft_lora_variant_types
from .peft import peft_parameter_wrapper_type as peft_parameter_wrapper_type
from .peft import peft_tuner_layer_type as peft_tuner_layer_type
from .peft import peft_wrapper_types as peft_wrapper_types
from .sharding import around_group as around_group
from .sharding import backward_reached as backward_reached
from .sharding import before_reduction as before_reduction
from .sharding import describe_on as describe_on
from .sharding import forget_unfinished_forward as forget_unfinished_forward
from .sharding import give_gathered_gradient as give_gathered_gradient
from .sharding import group_of as group_of
from .sharding import has_gathered_gradient as has_gathered_gradient
from .sharding import has_joined_axis as has_joined_axis
from .sharding import inherit_timeout as inherit_timeout
from .sharding import initialize_fsdp as initialize_fsdp
from .sharding import is_strided_shard as is_strided_shard
from .sharding import join_axes as join_axes
from .sharding import keep_gathered_after_forward as keep_gathered_after_forward
from .sharding import mark_packed_placements as mark_packed_placements
from .sharding import owner_of as owner_of
from .sharding import reduce_all_but as reduce_all_but
from .sharding import root_mesh as root_mesh
from .sharding import set_timeout as set_timeout
from .sharding import show_raw_parameters as show_raw_parameters
from .sharding import silence_redistribution_hints as silence_redistribution_hints
from .sharding import slice_mesh as slice_mesh
from .sharding import strided_shard as strided_shard
from .sharding import trained_when_gathered as trained_when_gathered
from .sharding import unify_gathered_gradients as unify_gathered_gradients
from .tensors import ASYNC_TENSOR_PARALLEL_OPTION as ASYNC_TENSOR_PARALLEL_OPTION
from .tensors import after_backward as after_backward
from .tensors import all_gather_dim as all_gather_dim
from .tensors import apply_to_tensors as apply_to_tensors
from .tensors import backward_hooks as backward_hooks
from .tensors import base_of as base_of
from .tensors import cast_operator as cast_operator
from .tensors import checkpoint_wrapped_module as checkpoint_wrapped_module
from .tensors import dynamo_side_effects_under_checkpoint as dynamo_side_effects_under_checkpoint
from .tensors import enable_symmetric_memory as enable_symmetric_memory
from .tensors import fake_tensor_mode as fake_tensor_mode
from .tensors import flash_attention_of_last_queries as flash_attention_of_last_queries
from .tensors import forward_hooks as forward_hooks
from .tensors import forward_pre_hooks as forward_pre_hooks
from .tensors import functional_collectives as functional_collectives
from .tensors import gradient_hooks as gradient_hooks
from .tensors import graph_break_type as graph_break_type
from .tensors import has_gradient_hooks as has_gradient_hooks
from .tensors import has_implemented_forward as has_implemented_forward
from .tensors import hash_specs_of_symbolic_shapes as hash_specs_of_symbolic_shapes
from .tensors import hooks_on as hooks_on
from .tensors import is_compiled as is_compiled
from .tensors import is_compiled_function as is_compiled_function
from .tensors import is_view_of as is_view_of
from .tensors import quiet_fake_tensors as quiet_fake_tensors
from .tensors import reduce_scatter_dim as reduce_scatter_dim
from .tensors import rendezvous_store as rendezvous_store
from .tensors import restore_spec_hash as restore_spec_hash
from .tensors import torch_version as torch_version
from .tensors import version_of as version_of
from .tensors import without_hooks as without_hooks
from .tensors import without_torch_function as without_torch_function
from .tensors import wrapper_subclass as wrapper_subclass
from .transformers import as_in_files as as_in_files
from .transformers import carries_adapters as carries_adapters
from .transformers import checkpoints_around_calls as checkpoints_around_calls
from .transformers import config_with_attention as config_with_attention
from .transformers import copy_weight_conversions as copy_weight_conversions
from .transformers import gemma4_class as gemma4_class
from .transformers import input_embedding_module as input_embedding_module
from .transformers import instance_tensor_parallel_plan as instance_tensor_parallel_plan
from .transformers import is_transformers_v5_or_higher as is_transformers_v5_or_higher
from .transformers import lm_head_module as lm_head_module
from .transformers import names_kept_in_float32 as names_kept_in_float32
from .transformers import names_not_saved as names_not_saved
from .transformers import no_split_module_names as no_split_module_names
from .transformers import runs_all_layers_under_fsdp as runs_all_layers_under_fsdp
from .transformers import show_as_sharded as show_as_sharded
from .transformers import tensor_parallel_plan_of_class as tensor_parallel_plan_of_class
from .transformers import transformers_conv1d_type as transformers_conv1d_type
from .transformers import transformers_layer_type as transformers_layer_type
from .transformers import transformers_parallel_styles as transformers_parallel_styles
from .transformers import uses_attention_registry as uses_attention_registry
from .transformers import without_tied_duplicates as without_tied_duplicates
