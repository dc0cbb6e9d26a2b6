"""The list of private names, each with the reason for its use and the library versions that have it."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from typing import Any

#: The newest version of each library that the tests have run with. A newer one is reported, see
#: :func:`newer_than_tested`.
TESTED_UP_TO: dict[str, tuple[int, int]] = {
    "torch": (2, 15),
    "transformers": (5, 24),
    "accelerate": (1, 15),
    "peft": (0, 21),
    "trl": (1, 16),
}

#: ``(module, attribute, reason)`` of all private names that the package uses; a test checks each of them.
PRIVATE_NAMES: tuple[tuple[str, str, str], ...] = (
    (
        "torch.distributed._functional_collectives",
        "all_reduce",
        "collectives that torch.compile can trace; the public torch.distributed calls are in place and break the graph",
    ),
    ("torch.distributed._functional_collectives", "wait_tensor", "see all_reduce"),
    (
        "torch.utils._python_dispatch",
        "TorchDispatchMode",
        "seeing each operator of a layer; the documented way to do so",
    ),
    (
        "torch.distributed.distributed_c10d",
        "_get_default_store",
        "ranks that wait for each other before a save, with an end to the waiting; torch 2.11 to 2.13",
    ),
    (
        "transformers",
        "PreTrainedModel._keys_to_ignore_on_save",
        "what is not saved; transformers 5.17 to 5.24",
    ),
    (
        "transformers.core_model_loading",
        "revert_weight_conversion",
        "names and shapes of weights in files; reads model._weight_conversions, see copy_weight_conversions; 5.17 to "
        "5.24",
    ),
    ("transformers", "Trainer._save", "saving from shards, in the place where the Trainer saves; 5.17 to 5.24"),
    (
        "transformers",
        "PreTrainedModel._hf_peft_config_loaded",
        "says whether a model without a PeftModel carries adapters; transformers 5.17 to 5.24",
    ),
    (
        "transformers",
        "PretrainedConfig._experts_implementation",
        "experts of a tiny proxy model run with the reference code; transformers 5.17 to 5.24",
    ),
    ("torch.utils._pytree", "tree_leaves", "the tensors among nested arguments"),
    ("torch.utils._pytree", "tree_map_only", "the same nested arguments with other tensors"),
    ("torch.nn", "Module._forward_hooks", "a copy of a model that runs on fake tensors must not call its hooks"),
    ("torch.nn", "Module._forward_pre_hooks", "the same, before the forward"),
    ("torch.nn", "Module._backward_hooks", "hooks of the user on modules that work on sequence shards"),
    ("torch.nn", "Module._backward_pre_hooks", "the same, before the backward"),
    (
        "torch._subclasses.fake_tensor",
        "FakeTensorMode",
        "running a layer on fake tensors, to see which of its operators keep tokens apart; the same in torch 2.11 to "
        "2.13",
    ),
    ("torch._subclasses.fake_tensor", "FakeTensor", "says whether a tensor has values; the same in torch 2.11 to 2.15"),
    (
        "torch.testing._internal.distributed.fake_pg",
        "FakeStore",
        "a process group of any size in one process, for the estimates of the command line; the same in torch 2.11 to "
        "2.15",
    ),
    (
        "torch._dynamo.config",
        "skip_fwd_side_effects_in_bwd_under_checkpoint",
        "checkpoints inside of a compiled layer",
    ),
    ("torch._dynamo.eval_frame", "innermost_fn", "says whether a forward is a product of torch.compile"),
    ("torch.nn", "Module._compiled_call_impl", "says whether a module was compiled in place by Module.compile"),
    (
        "torch._ops",
        "OpOverload._schema",
        "which arguments an operator writes to, and its dropout, for what a selective checkpoint may keep",
    ),
    ("torch", "ops.aten._scaled_dot_product_flash_attention", "see flash_attention_of_last_queries"),
    ("torch", "ops.aten._to_copy", "what a cast or a move of a tensor is below autograd, see cast_operator"),
    ("torch.nn", "Module._apply", "replaces tensors of a sharded model, see apply_to_tensors"),
    (
        "torch._inductor.config",
        "_micro_pipeline_tp",
        "the option of inductor that overlaps collectives with matrix products",
    ),
    (
        "torch.distributed._symmetric_memory",
        "enable_symm_mem_for_group",
        "inductor overlaps the collectives of such groups alone (2.11 to 2.13; deprecated there, but still asked for)",
    ),
    ("torch._dynamo.exc", "Unsupported", "distinguishes a layer that cannot be one graph from any other error in it"),
    (
        "torch.distributed.tensor.placement_types",
        "_StridedShard",
        "placement of a dimension that packs several projections (gate|up); transformers describes it the same way",
    ),
    (
        "accelerate.state",
        "PartialState._shared_state",
        "AcceleratorState copies its distributed type from here each time it is constructed; it must say FSDP too",
    ),
    (
        "accelerate.state",
        "AcceleratorState._shared_state",
        "says whether an Accelerator already exists, in which case Accelerate drops a new config silently",
    ),
    ("accelerate.accelerator", "Accelerator._prepare_one", "prepares data loaders, optimizers and schedulers as usual"),
    (
        "peft.tuners.lora.layer",
        "ParamWrapper",
        "LoRA on a bare parameter, known only here",
    ),
    (
        "peft.tuners.lora.layer",
        "ParamWrapper._did_swap_in_out_features",
        "says how the parameter under the adapter is laid out",
    ),
    (
        "accelerate.parallelism_config",
        "ParallelismConfig._validate_accelerator",
        "called by Accelerator.__init__ with the instance: where we bind to it",
    ),
    ("accelerate.parallelism_config", "ParallelismConfig._set_size", "keeps the size fields and the mesh in step"),
    ("accelerate.parallelism_config", "ParallelismConfig._sizes", "see _set_size"),
    (
        "accelerate.accelerator",
        "Accelerator._models",
        "what was prepared; its save_state, free_memory and so on walk it",
    ),
    ("accelerate.accelerator", "Accelerator._optimizers", "see _models"),
    ("accelerate.accelerator", "Accelerator._schedulers", "see _models"),
    ("accelerate.accelerator", "Accelerator._dataloaders", "see _models"),
    (
        "transformers",
        "Trainer._get_output_dir",
        "where a Trainer puts its checkpoints, also in a hyperparameter search",
    ),
    ("transformers", "Trainer._prepare_inputs", "whether a Trainer makes its batches itself, as GRPO's does"),
    (
        "transformers",
        "Trainer._finalize_training",
        "where a Trainer deletes its last checkpoint if another is the best",
    ),
    (
        "accelerate.accelerator",
        "Accelerator._custom_objects",
        "what register_for_checkpointing was given, to save and load",
    ),
    (
        "accelerate.accelerator",
        "Accelerator._save_model_state_pre_hook",
        "the user's hooks before a save, to be called",
    ),
    (
        "accelerate.accelerator",
        "Accelerator._load_model_state_pre_hook",
        "the user's hooks before a load, to be called",
    ),
    ("accelerate.accelerator", "Accelerator._is_accelerate_prepared", "its mark on prepared objects"),
    ("torch.nn", "Module._parameters", "replaces a parameter without losing its order; register_parameter appends"),
    ("torch.nn", "Module._buffers", "see _parameters"),
    ("torch.nn", "Module._modules", "a child by its name, where attribute access is forwarded to another module"),
    ("torch.distributed.tensor", "DTensor._spec", "see dtensor_like and mark_packed_placements"),
    ("torch", "Tensor._backward_hooks", "hooks on a gradient, which sharding would lose"),
    ("torch", "Tensor._post_accumulate_grad_hooks", "see _backward_hooks"),
    ("torch", "Tensor._make_wrapper_subclass", "a tensor without numbers of its own, see wrapper_subclass"),
    ("torch._C", "DisableTorchFunctionSubclass", "see without_torch_function"),
    ("torch", "Tensor._base", "hooks on a tensor that is returned as a view and then changed in place, see base_of"),
    ("torch", "Tensor._is_view", "see _base"),
    ("torch.nn", "MultiheadAttention._reset_parameters", "megatron-fsdp initialises modules from meta by it, too"),
    (
        "megatron_fsdp",
        "MegatronFSDP._replace_param_with_raw_if_needed",
        "its forward shows the parameters to compute with; a forward that begins elsewhere needs them too (0.5 to 0.6)",
    ),
    (
        "trl.generation.vllm_generation",
        "VLLMGeneration._iter_named_params",
        "which weights TRL sends to vLLM; without it TRL gathers them itself (1.16)",
    ),
    ("torch", "Tensor._version", "counts changes in place, see version_of"),
    ("torch", "_foreach_copy_", "see copy_each; torch 2.11 to 2.15"),
    ("torch.distributed.fsdp", "FSDPModule._get_fsdp_state", "see initialize_fsdp, state_without_units"),
    ("torch.distributed.fsdp", "FSDPModule._apply", "see apply_without_units; torch 2.11 to 2.15"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state",
        "FSDPState._pre_forward",
        "see state_without_units; torch 2.11 to 2.15",
    ),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._post_forward", "see _pre_forward"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "RegisterPostBackwardFunction",
        "the name of its node distinguishes FSDP2's views from those of other code, see is_view_of; torch 2.11 to 2.13",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "FSDPParamGroup.post_backward",
        "see before_reduction; torch has no hook there (2.11 to 2.13)",
    ),
    *(
        (
            "torch.distributed.fsdp._fully_shard._fsdp_param_group",
            f"FSDPParamGroup.{name}",
            "see around_group; 2.11 to 2.13",
        )
        for name in ("pre_forward", "lazy_init", "fsdp_params", "reduce_grads")
    ),
    *(
        (
            "torch.distributed.fsdp._fully_shard._fsdp_param",
            f"FSDPParam.{name}",
            "gradients before their reduction, where ranks used other parameters of a unit; torch 2.11 to 2.15",
        )
        for name in (
            "_module_info",
            "_unsharded_param",
            "sharded_param",
            "unsharded_accumulated_grad",
        )
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param",
        "FSDPParam.to_accumulated_grad_if_needed",
        "see unify_gathered_gradients; torch 2.11 to 2.14, gone in 2.15",
    ),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._lazy_init", "see initialize_fsdp"),
    (
        "torch.distributed.device_mesh",
        "DeviceMesh._flatten",
        "joins dp_shard and cp to the axis that FSDP2 shards over",
    ),
    ("torch.distributed.device_mesh", "DeviceMesh._get_root_mesh", "a pipeline axis beside the axes of a sub-mesh"),
    (
        "torch.autograd",
        "Variable._execution_engine",
        "its queue_callback sums partial gradients at the end of a backward where no Accelerator does; FSDP2's own way",
    ),
    ("torch.distributed.tensor._dtensor_spec", "DTensorSpec._hash_impl", "see hash_specs_of_symbolic_shapes"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper._checkpoint_wrapped_module",
        "the module inside of torch's checkpoint wrapper (2.11 to 2.13), which has no public accessor",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_common",
        "TrainingState",
        "see forget_unfinished_forward, reduce_all_but",
    ),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._training_state", "see forget_unfinished_forward"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state",
        "FSDPState._modules_to_run_forward",
        "see forget_unfinished_forward",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "FSDPParamGroup._training_state",
        "see reduce_all_but; torch 2.11 to 2.13",
    ),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._state_ctx", "see forget_unfinished_forward"),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._is_root", "see keep_gathered_after_forward"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state",
        "FSDPState._auto_reshard_after_forward",
        "see keep_gathered_after_forward",
    ),
    ("torch.optim.lr_scheduler", "LRScheduler._step_count", "where Accelerate stops a OneCycleLR, and so do we"),
    ("transformers.modeling_utils", "PreTrainedModel._no_split_modules", "class names of the layers"),
    (
        "transformers.modeling_utils",
        "PreTrainedModel._supports_sdpa",
        "whether a class could compute SDPA; 5.17 to 5.24",
    ),
    (
        "transformers.configuration_utils",
        "PreTrainedConfig._attn_implementation",
        "which attention a model computes, and none of the kernels in a copy that runs on fake tensors; its copy for "
        "attention modules is config_with_attention",
    ),
    ("transformers.configuration_utils", "PreTrainedConfig._attn_implementation_internal", "see config_with_attention"),
    (
        "transformers.modeling_utils",
        "PreTrainedModel._keep_in_fp32_modules_strict",
        "modules whose parameters compute in float32",
    ),
    ("transformers.modeling_utils", "PreTrainedModel._keep_in_fp32_modules", "the same, for float16 only"),
    ("transformers.distributed.mixin", "DistributedMixin._tp_plan", "the plan that a model brings along"),
    (
        "transformers.distributed.mixin",
        "DistributedMixin._device_mesh",
        "recognises a model that transformers has sharded",
    ),
    (
        "transformers.modeling_layers",
        "GradientCheckpointingLayer._gradient_checkpointing_func",
        "the model's own checkpoint around a layer, which has to recompute with local parameters",
    ),
    (
        "torch.distributed.distributed_c10d",
        "_set_pg_timeout",
        "torch gives the groups of a mesh its default of 30 minutes (gloo), whatever the process group was told; 2.11 "
        "to 2.13, since 2.14 it is public as torch.distributed.set_timeout",
    ),
    ("torch.distributed", "ProcessGroup._get_backend", "what the process group was told"),
    ("torch.distributed.distributed_c10d", "ProcessGroupGloo._Options._timeout", "the same"),
    (
        "transformers.models.wav2vec2.modeling_wav2vec2",
        "is_fsdp_managed_module._is_fsdp_managed_module",
        "its mark on what is sharded, where it then drops no layer; transformers 5.17 to 5.24",
    ),
    (
        "trl.trainer.utils",
        "_ChunkedLogProbFunction",
        "the kernel of the fused head, which gathers a sharded head, see TRLFusedHead; 1.16",
    ),
    ("transformers.trainer", "Trainer._save_checkpoint", "what the Trainer's own handler of SIGTERM calls"),
    (
        "transformers.trainer_jit_checkpoint",
        "CheckpointManager._enable_checkpoint",
        "called some seconds after SIGTERM, on each rank during another step; the same in 5.17 and 5.24",
    ),
)

#: Name -> torch version from which on the package does not use it any more; later versions may lack it.
REPLACED: dict[str, tuple[int, int]] = {
    "FSDPParam.to_accumulated_grad_if_needed": (2, 15),
    "_set_pg_timeout": (2, 14),
}


def newer_than_tested() -> list[str]:
    """A sentence for each library in a newer version than any tested one, with the private names that it lacks."""
    sentences = []
    for library, tested in TESTED_UP_TO.items():
        installed = _version(library)
        if installed is None or _numbers(installed) <= tested:
            continue
        gone = [
            f"{attribute} ({why})"
            for module, attribute, why in PRIVATE_NAMES
            if module.partition(".")[0] == library and disappeared(module, attribute)
        ]
        lacks = f" It has no {'; no '.join(gone)}: what needs this fails." if gone else ""
        sentences.append(f"{library} {installed}: this version of the package was tested up to {_text(tested)}.{lacks}")
    return sentences


def disappeared(module: str, attribute: str) -> bool:
    """True if the installed library lacks an entry of :data:`PRIVATE_NAMES` that the package still uses there."""
    if attribute in REPLACED and _numbers(_version("torch") or "0.0") >= REPLACED[attribute]:
        return False
    try:
        holder: Any = importlib.import_module(module)
        *path, last = attribute.split(".")
        for part in path:
            holder = getattr(holder, part)
    except (ImportError, AttributeError):
        return True
    return not has_name(holder, last)


def has_name(holder: Any, name: str) -> bool:
    """True for an attribute, an annotation, or (for what others set) a mention in the code of the class or function."""
    if hasattr(holder, name) or name in getattr(holder, "__annotations__", {}):
        return True
    before = r"\." if inspect.isclass(holder) else r"\b"
    try:
        code = inspect.getsource(holder) if inspect.isclass(holder) or inspect.isfunction(holder) else ""
    except (OSError, TypeError):  # no source: nothing can be said
        return True
    return re.search(rf"{before}{name}\b", code) is not None


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    """``(major, minor)``; of a development version, too."""
    major, minor = (re.match(r"\d*", part) for part in [*version.split("."), "0"][:2])
    return int(major.group() or 0), int(minor.group() or 0)  # type: ignore[union-attr]


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
