"""The room for private names of torch, transformers, accelerate and peft.

Each name stands in one table with the reason for its use; ``tests/test_compat.py`` fails when one of them disappears, or when
a private name is used that is not in the table. No other module imports one; the few attributes of their objects that others
read are in the table too. Everything else in the package uses public API.

Checked on: torch 2.13, transformers 5.17 and 5.23, accelerate 1.15, peft 0.21.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

#: ``(module, attribute, reason)`` of every private name used in the package; the compat test walks this list.
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
        "names and shapes of weights in files; reads model._weight_conversions, see copy_weight_conversions; 5.17 to 5.24",
    ),
    ("transformers", "Trainer._save", "saving from shards, in the place where the Trainer saves; 5.17 to 5.24"),
    (
        "transformers",
        "PreTrainedModel._hf_peft_config_loaded",
        "tells whether a model without a PeftModel carries adapters; transformers 5.17 to 5.24",
    ),
    ("torch.utils._pytree", "tree_leaves", "the tensors among nested arguments"),
    ("torch.utils._pytree", "tree_map_only", "the same nested arguments with other tensors"),
    ("torch.nn", "Module._forward_hooks", "a copy of a model that runs without values must not call its hooks"),
    ("torch.nn", "Module._forward_pre_hooks", "the same, before the forward"),
    (
        "transformers",
        "PretrainedConfig._attn_implementation",
        "a copy of a model that runs without values must not call attention kernels",
    ),
    (
        "torch._subclasses.fake_tensor",
        "FakeTensorMode",
        "running a layer without values, to see which of its operators keep tokens apart; the same in torch 2.11 to 2.13",
    ),
    (
        "torch._dynamo.config",
        "skip_fwd_side_effects_in_bwd_under_checkpoint",
        "checkpoints inside of a compiled layer",
    ),
    ("torch._dynamo.eval_frame", "innermost_fn", "tells whether a forward is a product of torch.compile"),
    ("torch.nn", "Module._compiled_call_impl", "tells whether a module was compiled in place by Module.compile"),
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
    ("torch._dynamo.exc", "Unsupported", "tells a layer that cannot be one graph from any other error in it"),
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
        "tells whether an Accelerator already exists, in which case Accelerate drops a new config silently",
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
        "tells how the parameter under the adapter is laid out",
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
    ("transformers", "Trainer._get_output_dir", "where a Trainer puts its checkpoints, also in a hyperparameter search"),
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
    ("torch.distributed.tensor", "DTensor._spec", "packed placements before torch 2.13, see mark_packed_placements"),
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
    ("torch", "Tensor._version", "counts changes in place, see version_of"),
    ("torch.distributed.fsdp", "FSDPModule._get_fsdp_state", "see initialize_fsdp"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "FSDPParamGroup.post_backward",
        "see before_reduction; torch has no hook there (2.11 to 2.13)",
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
    ("torch.distributed.fsdp._fully_shard._fsdp_common", "TrainingState", "see forget_unfinished_forward"),
    ("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._training_state", "see forget_unfinished_forward"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state",
        "FSDPState._modules_to_run_forward",
        "see forget_unfinished_forward",
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
        "transformers.configuration_utils",
        "PreTrainedConfig._attn_implementation",
        "which attention a model computes; its copy for attention modules is config_with_attention",
    ),
    ("transformers.configuration_utils", "PreTrainedConfig._attn_implementation_internal", "see config_with_attention"),
    (
        "transformers.modeling_utils",
        "PreTrainedModel._keep_in_fp32_modules_strict",
        "modules whose parameters compute in float32",
    ),
    ("transformers.modeling_utils", "PreTrainedModel._keep_in_fp32_modules", "the same, for float16 only"),
    ("transformers.distributed.mixin", "DistributedMixin._tp_plan", "the plan that a model brings along"),
    ("transformers.distributed.mixin", "DistributedMixin._device_mesh", "tells a model that transformers has sharded"),
    (
        "transformers.modeling_layers",
        "GradientCheckpointingLayer._gradient_checkpointing_func",
        "the model's own checkpoint around a layer, which has to recompute with local parameters",
    ),
    (
        "torch.distributed.distributed_c10d",
        "_set_pg_timeout",
        "torch gives the groups of a mesh its default of 30 minutes (gloo), whatever the process group was told",
    ),
    ("torch.distributed", "ProcessGroup._get_backend", "what the process group was told"),
    ("torch.distributed.distributed_c10d", "ProcessGroupGloo._Options._timeout", "the same"),
    ("transformers.trainer", "Trainer._save_checkpoint", "what the Trainer's own handler of SIGTERM calls"),
    (
        "transformers.trainer_jit_checkpoint",
        "CheckpointManager._enable_checkpoint",
        "called some seconds after SIGTERM, on each rank during another step; the same in 5.17 and 5.24",
    ),
)


def functional_collectives() -> ModuleType:
    """Return torch's traceable collectives (private module since torch 2.1, stable in 2.11 to 2.13)."""
    import torch.distributed._functional_collectives as funcol

    return funcol


def all_gather_dim(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """All-gather ``x`` along ``dim``: ``all_gather_single`` from torch 2.13 on, called ``all_gather_tensor`` before."""
    funcol = functional_collectives()
    gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    return _waited(gather(x, dim, group))


def reduce_scatter_dim(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """Sum over ``group`` and keep this rank's part of ``dim``: ``reduce_scatter_single`` from torch 2.13 on."""
    funcol = functional_collectives()
    scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
    return _waited(scatter(x, "sum", dim, group))


def _waited(x: torch.Tensor) -> torch.Tensor:
    """``x`` when its collective is over. A traced one waits by itself; inductor does not know it with a second wait."""
    return x if torch.compiler.is_compiling() else functional_collectives().wait_tensor(x)


def fake_tensor_mode() -> Any:
    """A mode under which tensors have shapes and no values, and constants of a module may stay real."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def flash_attention_of_last_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scale: float | None
) -> torch.Tensor | None:
    """Causal flash attention of the last n queries of a sequence to all N keys, None where this kernel cannot be used.

    The public SDPA aligns its causal mask with the first query, and with an explicit mask it does not take this kernel. The
    call is that of ``torch.nn.attention.bias.CausalBias`` (torch 2.11 to 2.13), a tensor subclass that can be made neither
    inside of a compiled graph nor under a selective checkpoint.

    Args:
        query: (B, heads, n, D).
        key: (B, heads, N, D).
        value: (B, heads, N, D).
        dropout: probability to drop a weight.
        scale: factor of the scores, None for ``1 / sqrt(D)``.

    Returns:
        (B, heads, n, D).
    """
    if query.device.type != "cuda" or query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        return None
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, dropout, True, False)
    if not torch.backends.cuda.can_use_flash_attention(parameters):
        return None
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal=True, return_debug_mask=False, scale=scale
    )[0]


def cast_operator() -> Any:
    """The operator of ``Tensor.to``: a copy in another dtype or on another device (torch 2.11 to 2.13)."""
    return torch.ops.aten._to_copy.default


def apply_to_tensors(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace each parameter and buffer by what ``function`` makes of it: what ``Module.to`` and ``Module.to_empty`` call.

    FSDP2 extends it, so that its units take up the new shards (torch 2.11 to 2.13).
    """
    model._apply(function)


#: Inductor's option that overlaps collectives with the matrix products beside them.
ASYNC_TENSOR_PARALLEL_OPTION = "_micro_pipeline_tp"


def enable_symmetric_memory(group: Any) -> None:
    """Let inductor use symmetric memory for the collectives of ``group``."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group.group_name)


def config_with_attention(config: Any, name: str) -> Any:
    """A copy of a transformers config whose attention implementation is ``name``.

    The public setter would write into the sub-configs too, which the copy shares with the original.
    """
    result = copy.copy(config)
    result._attn_implementation_internal = name
    return result


def uses_attention_registry(module: nn.Module) -> bool:
    """True if the forward of ``module`` looks attention up in transformers' registry (5.17 to 5.24: by this name)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def without_hooks(module: nn.Module) -> None:
    """Remove all forward hooks of ``module`` itself."""
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


@contextlib.contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Without the traceback that torch logs for an operator that fails on fake tensors, where failing is an answer."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def strided_shard(dim: int, split_factor: int) -> Any:
    """Return the placement that shards ``dim`` inside each of its ``split_factor`` equal blocks.

    Example: a fused ``[gate; up]`` weight with ``split_factor=2`` gives every rank a slice of gate and one of up.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim=dim, split_factor=split_factor)


def mark_packed_placements(parameters: Any) -> None:
    """Tell torch before 2.13 that packed blocks are meant literally in the specs of these (FSDP-sharded) DTensors.

    torch 2.11 takes every ``_StridedShard`` for its own notation of a shard order and refuses to gather one that is not;
    2.13 falls back to the literal meaning by itself. The spec object is shared with FSDP2, so gradients follow.
    """
    if torch_version() >= (2, 13):
        return
    for parameter in parameters:
        spec = getattr(parameter, "_spec", None)
        if spec is not None and is_strided_shard(spec.placements[-1]):
            spec.use_strided_shard_as_shard_order = False
            spec.shard_order = spec.compute_default_shard_order(spec.placements)


def is_strided_shard(placement: object) -> bool:
    """True for the placement made by :func:`strided_shard`."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def slice_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """The axes ``names`` of ``mesh``, also joined ones, which torch (2.11 to 2.13) wants to be asked for differently one day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        return mesh[names if len(names) > 1 else names[0]]


def has_joined_axis(mesh: DeviceMesh, name: str) -> bool:
    """True if an axis ``name`` was made of axes of ``mesh`` before (``_flatten``)."""
    try:
        slice_mesh(mesh, (name,))
    except (KeyError, RuntimeError):
        return False
    return True


def join_axes(mesh: DeviceMesh, names: tuple[str, ...], name: str) -> DeviceMesh:
    """One axis ``name`` of the axes ``names`` of ``mesh``; collective where torch has to make its process group."""
    joined = slice_mesh(mesh, names)._flatten(name)
    inherit_timeout(joined)
    return joined


def set_timeout(timeout: Any) -> None:
    """Bound the collectives of the process group by ``timeout`` (a timedelta)."""
    dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)


def inherit_timeout(mesh: DeviceMesh) -> None:
    """Give the process groups of the axes of ``mesh`` (1-D or more) the timeout of the process group.

    torch makes them with its default, so that ``ddp_timeout`` or ``InitProcessGroupKwargs(timeout=...)`` would not bound the
    collectives of tp and dp_shard, which are nearly all: a lost node would stop the others after half an hour (gloo).
    """
    world = dist.group.WORLD
    groups = [group for group in mesh.get_all_groups() if group is not world]
    if world is None or not groups:
        return
    options = world._get_backend(torch.device(mesh.device_type)).options
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(options._timeout, group)


def root_mesh(mesh: Any) -> Any:
    """The mesh that ``mesh`` is a part of; a stand-in that has none is its own."""
    root = getattr(mesh, "_get_root_mesh", None)
    return root() if callable(root) else mesh


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward is over, after what was queued before; only inside of a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def accelerator_already_exists() -> Any | None:
    """Return Accelerate's shared state if an ``Accelerator`` was created in this process, else None."""
    from accelerate.state import AcceleratorState, PartialState

    shared = AcceleratorState._shared_state
    if shared == {} or shared == PartialState._shared_state:
        return None
    return AcceleratorState()


def arguments_of_running_accelerator_init(accelerator: Accelerator) -> dict[str, Any]:
    """Return the local variables of the ``Accelerator.__init__`` call that is constructing ``accelerator``.

    On CPU, Accelerate 1.15 drops a given ``fsdp_plugin`` before any object of ours can see it; the running constructor
    still holds it. Returns an empty dict if the constructor is not on the stack.
    """
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is Accelerator.__init__.__code__ and frame.f_locals.get("self") is accelerator:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def owner_of_running_accelerator_init(accelerator: Accelerator, kind: type) -> Any:
    """The object of type ``kind`` whose method is constructing ``accelerator``, None if there is none on the stack.

    The Trainer (transformers 5.17 to 5.24) builds its ``Accelerator`` in its own constructor and never introduces itself to it.
    """
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    constructor_seen = False
    while frame is not None:
        holder = frame.f_locals.get("self")
        if frame.f_code is Accelerator.__init__.__code__:
            constructor_seen = holder is accelerator
        elif constructor_seen and isinstance(holder, kind):
            # One that has its Accelerator already runs a script's code, in which another one is built.
            return None if "accelerator" in vars(holder) else holder
        frame = frame.f_back
    return None


def set_distributed_type_fsdp(accelerator: Accelerator) -> None:
    """Make Accelerate's state say FSDP, on CPU too, so that its FSDP2 code path is taken everywhere."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def transformers_parallel_styles() -> dict[str, Any]:
    """Return transformers' registry of style name -> layer object, empty if this version has none.

    The registry lives in ``transformers.distributed.tensor_parallel`` from 5.17 on.
    """
    try:
        from transformers.distributed import tensor_parallel
    except ImportError:
        return {}
    registry = getattr(tensor_parallel, "ALL_PARALLEL_STYLES", None)
    if registry is None:
        return {}
    return {name: registry[name] for name in registry.keys()}


def is_peft_model(model: nn.Module) -> bool:
    """True if ``model`` is a ``peft.PeftModel``; does not import peft when nobody has."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_tuner_layer_type() -> type | None:
    """Base class of PEFT's adapter layers, None when peft is not imported."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def peft_auxiliary_wrapper_type() -> type | None:
    """Base class of PEFT's ``modules_to_save`` and ``trainable_token_indices`` wrappers, None without peft."""
    if "peft" not in sys.modules:
        return None
    from peft.utils.other import AuxiliaryTrainingWrapper

    return AuxiliaryTrainingWrapper


def tensor_parallel_plan_of_class(cls: type) -> dict[str, str]:
    """The ``_tp_plan`` that a model class declares itself (transformers 5.17 to 5.23), empty if it declares none."""
    return dict(getattr(cls, "_tp_plan", None) or {})


def instance_tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """The ``_tp_plan`` set on this very object (transformers merges class, config and children there), else empty."""
    return dict(model.__dict__.get("_tp_plan") or {})


def no_split_module_names(model: nn.Module) -> set[str]:
    """Class names in ``_no_split_modules`` of the model and of every sub-model (a list, set or None by version)."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def transformers_layer_type() -> type | None:
    """The base class of transformers' layers that can be checkpointed (all decoder and encoder layers), None without it."""
    if "transformers" not in sys.modules:
        return None
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def checkpoints_around_calls() -> bool:
    """True if transformers checkpoints a layer outside of its ``__call__``, so around our hooks (before 5.23)."""
    layer_type = transformers_layer_type()
    return layer_type is not None and "__call__" in vars(layer_type)


def names_kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What transformers does not load in ``dtype``: a pattern over parameter names, None if there is nothing of the kind."""
    listed = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        listed |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(?:^|\.){name}(?:$|\.)" for name in sorted(listed))) if listed else None


def lm_head_module(model: nn.Module) -> nn.Module | None:
    """The model's output projection through ``get_output_embeddings``, None when it has none or refuses."""
    return _embedding_accessor(model, "get_output_embeddings")


def input_embedding_module(model: nn.Module) -> nn.Module | None:
    """The model's input embedding through ``get_input_embeddings``, None when it has none or refuses."""
    return _embedding_accessor(model, "get_input_embeddings")


def _embedding_accessor(model: nn.Module, name: str) -> nn.Module | None:
    accessor = getattr(model, name, None)
    if accessor is None:
        return None
    try:
        module = accessor()
    except (NotImplementedError, AttributeError):
        return None
    return module if isinstance(module, nn.Module) else None


def has_implemented_forward(module: nn.Module) -> bool:
    """False for containers (``ModuleList``, ``ParameterDict``, ...) whose ``forward`` nobody can call."""
    return type(module).forward is not nn.Module.forward


class _ExpectedRedistribution(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("While redistributing from")


def silence_redistribution_hints() -> None:
    """Drop torch's hint that gathering over two mesh axes takes two collectives (torch 2.13 logs it on every rank).

    A parameter on dp_shard x tp is gathered in two steps whenever a norm is clipped or a state dict saved; nothing can be
    done about it, and each rank would say so at each kind of step. Other messages of that logger pass.
    """
    hints = logging.getLogger("torch.distributed.tensor._redistribute")
    if not any(isinstance(f, _ExpectedRedistribution) for f in hints.filters):
        hints.addFilter(_ExpectedRedistribution())


def dynamo_side_effects_under_checkpoint() -> Any:
    """Context in which dynamo skips a checkpointed region's side effects in its recomputation (torch 2.9 to 2.13).

    Without it such a region breaks the graph. Patched only around our own compiled layers and restored after.
    """
    return torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


def torch_version() -> tuple[int, int]:
    """``(major, minor)`` of the installed torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def peft_layer_types() -> tuple[type, ...]:
    """PEFT's layers that are local operators on a slice of their base layer, or leave it whole; empty without peft."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.ia3.layer import Linear as IA3Linear
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    return Linear, Embedding, IA3Linear, LNTuningLayer, TrainableTokensLayer


def transformers_conv1d_type() -> type | None:
    """GPT-2's ``Conv1D`` (a linear layer whose weight is stored transposed), None when transformers is not imported."""
    if "transformers" not in sys.modules:
        return None
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def peft_parameter_wrapper_type() -> type | None:
    """PEFT's LoRA layer for a bare parameter, None without peft."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora.layer import ParamWrapper

    return ParamWrapper


def parameter_adapter_stores_out_first(adapter: Any) -> bool:
    """True if the 3-D parameter under a ``ParamWrapper`` is (experts, out, in); private since peft 0.17."""
    return bool(adapter._did_swap_in_out_features)


def parameters_of_ignored_modules(plugin: Any, model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """The parameters that an FSDP plugin's ``ignored_modules`` (modules, or a regex over names) stands for."""
    from accelerate.utils.fsdp_utils import get_parameters_from_modules

    return set(get_parameters_from_modules(plugin.ignored_modules, model, device))


def peft_lora_variant_types() -> tuple[type, ...]:
    """PEFT's variants of LoRA on linear layers that know no more than plain LoRA of features: DoRA and activated LoRA."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant

    return DoraLinearVariant, ALoraLinearVariant


def initialize_fsdp(model: nn.Module) -> None:
    """Let FSDP2 look at the units below ``model`` now, with ``model`` as their root, as its first forward would.

    Before that has happened, a unit that is called on its own takes itself for a root and finds no streams to gather on.
    """
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator,union-attr]


def before_reduction(unit: Any, function: Callable[[], None]) -> None:
    """Call ``function`` in each backward when the gradients of an FSDP2 unit are complete, before they are reduced."""

    def call(post_backward: Callable[..., None], *args: Any) -> None:
        function()
        post_backward(*args)

    for group in _fsdp_groups(unit._get_fsdp_state()):
        group.post_backward = functools.partial(call, group.post_backward)


def trainer_signal_manager_type() -> type | None:
    """The class whose instance handles SIGTERM for a Trainer with ``enable_jit_checkpoint``; None without such a Trainer."""
    module = sys.modules.get("transformers.trainer_jit_checkpoint")
    return getattr(module, "CheckpointManager", None)


def replace_checkpoint_request(manager: Any, function: Callable[[], None]) -> None:
    """Let ``manager``, of the type above, call ``function`` some seconds after SIGTERM."""
    manager._enable_checkpoint = function


def save_trainer_checkpoint(trainer: Any) -> None:
    """Write the checkpoint of the current step, as ``save_strategy`` does."""
    trainer._save_checkpoint(trainer.model, trial=None)


def _fsdp_groups(state: Any) -> list[Any]:
    """The groups of parameters of an FSDP2 unit: one in an attribute in torch 2.11, a list in one of almost that name in 2.13."""
    value = next((value for name, value in vars(state).items() if name.startswith("_fsdp_param_group")), None)
    return [group for group in (value if isinstance(value, list) else [value]) if group is not None]


def keep_gathered_after_forward(unit: Any) -> Callable[[], None]:
    """Let the FSDP2 unit keep its parameters after forward; the result takes that back.

    The public ``set_reshard_after_forward`` sets it, but nothing tells what was set before (torch 2.11 to 2.13).
    """
    state = unit._get_fsdp_state()
    automatic = state._auto_reshard_after_forward
    before = [(group, group.post_forward_mesh_info) for group in _fsdp_groups(state)]
    unit.set_reshard_after_forward(False, recurse=False)

    def undo() -> None:
        state._auto_reshard_after_forward = automatic
        for group, value in before:
            # What torch decides by itself for a root, when it learns from the first forward that it is one.
            group.post_forward_mesh_info = None if automatic and state._is_root else value

    return undo


def forget_unfinished_forward(units: list[Any]) -> None:
    """After an exception left the forward of FSDP2 units: let the next one begin anew, and :meth:`reshard` free parameters.

    torch 2.13 has ``reset_iter_state`` for this, which also drops gradients that were accumulated before.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    for state in (unit._get_fsdp_state() for unit in units):
        if state._state_ctx.iter_forward_root is None:
            continue
        for part in (state, *_fsdp_groups(state)):
            if part._training_state is TrainingState.FORWARD:
                part._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
    for unit in units:
        unit._get_fsdp_state()._state_ctx.iter_forward_root = None


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """True if somebody has registered a hook on the gradient of this very tensor object."""
    return bool(getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_compiled(module: nn.Module) -> bool:
    """True if the call or the forward of ``module`` is a product of ``torch.compile``."""
    if module._compiled_call_impl is not None:
        return True
    from torch._dynamo.eval_frame import innermost_fn

    forward = module.__dict__.get("forward")
    return forward is not None and innermost_fn(forward) is not forward


def peft_dora_layer_type() -> type | None:
    """PEFT's module that holds the magnitude vector of a linear layer, None without peft."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora.dora import DoraLinearLayer

    return DoraLinearLayer


def graph_break_type() -> type[Exception]:
    """What ``torch.compile(fullgraph=True)`` raises while tracing code that it cannot put into one graph."""
    return torch._dynamo.exc.Unsupported


def checkpoint_wrapped_module(module: nn.Module) -> nn.Module | None:
    """What torch's checkpoint wrapper (or a wrapper made like it) has inside, None if ``module`` is no such wrapper."""
    inner = module._modules.get("_checkpoint_wrapped_module")
    return inner if isinstance(inner, nn.Module) else None


_unhashed: list[Any] = []


def hash_specs_of_symbolic_shapes() -> None:
    """Let a ``DTensorSpec`` with symbolic sizes be hashed, by its mesh and placements alone (torch 2.11 to 2.13).

    While torch.compile traces DTensors with dynamic shapes, sizes are ``SymInt``, which have no hash, and the cache of sharding
    decisions fails with a ``TypeError``. Equality still compares shapes, so a coarser hash costs time and changes no result.
    For the whole process until :func:`restore_spec_hash`; a second call changes nothing.
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    if _unhashed:
        return
    original = DTensorSpec._hash_impl

    def hash_impl(self: Any) -> int:
        try:
            return original(self)
        except TypeError:
            return hash((self.mesh, self.placements))

    _unhashed.append(original)
    DTensorSpec._hash_impl = hash_impl  # type: ignore[method-assign]


def restore_spec_hash() -> None:
    """Take :func:`hash_specs_of_symbolic_shapes` back."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    if _unhashed:
        DTensorSpec._hash_impl = _unhashed.pop()  # type: ignore[method-assign]


@functools.cache
def gemma4_class() -> type:
    """transformers' ``Gemma4ForConditionalGeneration``, or an empty class of that name where there is none: one class per
    process, so that tests like ``type(model) in [...]`` hold. Imports the model's code, so it is to be called only on demand."""
    try:
        from transformers import Gemma4ForConditionalGeneration
    except ImportError:
        return type("Gemma4ForConditionalGeneration", (), {"__doc__": "Stands in where transformers has no Gemma4."})
    return Gemma4ForConditionalGeneration


def is_transformers_v5_or_higher() -> bool:
    """True if the installed transformers is of version 5 or later."""
    from importlib.metadata import version

    return int(version("transformers").split(".")[0]) >= 5


def wrapper_subclass(cls: type, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of class ``cls`` with these properties and no storage (what DTensor is made with, torch 2.11 to 2.13)."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def version_of(tensor: torch.Tensor) -> int:
    """How often ``tensor`` and the views that share its memory have been changed in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def without_torch_function() -> Any:
    """Context in which tensor subclasses are plain tensors to torch's functions: what ``Tensor.__torch_function__`` uses."""
    return torch._C.DisableTorchFunctionSubclass()


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that ``tensor`` is a view of, if that takes part in a backward, else ``tensor`` itself."""
    base = tensor._base if tensor._is_view() else None
    return base if base is not None and base.requires_grad else tensor


def describe_on(parameter: Any, mesh: DeviceMesh, placements: tuple[Any, ...]) -> None:
    """Let a DTensor say that its local tensor is placed on ``mesh`` as ``placements`` say; nothing is moved."""
    old = parameter._spec
    parameter._spec = type(old)(mesh, placements, tensor_meta=old.tensor_meta)


def show_raw_parameters(wrapper: Any) -> None:
    """Let a ``MegatronFSDP`` (megatron-fsdp 0.5 and 0.6) put the parameters to compute with into the module tree."""
    wrapper._replace_param_with_raw_if_needed()


def rendezvous_store() -> Any:
    """The store through which the ranks found each other; works without a collective, and with every backend."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def without_tied_duplicates(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` (on the meta device) without the names that transformers does not save since they are tied to another."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(state, model)


def as_in_files(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with the names and shapes that the files of this architecture have, e.g. one weight for each expert."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def names_not_saved(model: nn.Module) -> set[str]:
    """Names that transformers leaves out of the files of this class."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def carries_adapters(model: nn.Module) -> bool:
    """True for a transformers model with adapters of its own (``model.add_adapter``), without a ``PeftModel`` around it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_state(
    model: nn.Module, state: dict[str, torch.Tensor], adapter: str, save_embedding_layers: bool | str
) -> dict[str, torch.Tensor]:
    """What of ``state`` belongs to ``adapter``, under the names of an adapter file."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=save_embedding_layers
    )


def trainer_save(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """``Trainer._save`` of the trainer's class: weights, configs, tokenizer and arguments into a directory."""
    return type(trainer)._save(trainer, *args, **kwargs)


def bind_trainer_save(trainer: Any, save: Callable[..., Any]) -> None:
    """Let ``trainer`` call ``save`` instead, on all ranks."""
    trainer._save = save


def copy_weight_conversions(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` be saved under the names that ``source`` was loaded from."""
    if "_weight_conversions" in source.__dict__:
        target._weight_conversions = source.__dict__["_weight_conversions"]
