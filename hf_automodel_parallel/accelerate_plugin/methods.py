"""The methods that are bound on one ``Accelerator`` instance: the integration point with Accelerate.

No class is patched. ``Accelerator.__init__`` passes the instance to our config, and :func:`install` binds the functions
of :data:`BOUND_METHODS` on it. ``prepare`` returns what Accelerate's own FSDP2 code would have made, an ``FSDPModule``
with DTensor parameters, so that the rest of Accelerate runs on it unchanged.
"""

from __future__ import annotations

import atexit
import functools
import logging
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DDPCommunicationHookType, DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from .. import compat
from ..audit import Audit
from ..backends.megatron_fsdp.accelerate import full_state_dict, megatron_strategy, owner_of
from ..backends.megatron_fsdp.accelerate import sharded_parameters as megatron_parameters
from ..backends.megatron_fsdp.accelerate import watch as watch_megatron
from ..backends.megatron_fsdp.sharding import managed_by_megatron
from ..context_parallel.buffers import sharded_buffers
from ..core.mesh import MeshAxes
from ..core.model_view import ModelView
from ..core.option_fields import meaning_of
from ..core.options import ParallelOptions
from ..core.ranks import raise_on_all_ranks
from ..errors import ConfigError, PrepareError, UnsupportedError
from ..export.gathering import file_dtypes, keep_file_dtypes
from ..fsdp.shard import fsdp_units, sharded_parameters, upcast_trainable, without_units_inside
from ..loading.fill import PendingValues
from ..optim.handoff import check_optimizers, parameter_names, raw_optimizer, replace_parameters
from ..optim.sharding_check import check_on_shards
from ..peft.late_adapters import adding
from ..peft.operations import manage_adapters, merge_whole_weights
from ..strategies.base import refuse_sharded
from ..strategies.context import ParallelizeContext
from ..strategies.registry import get_parallelization_strategy
from ..tensor_parallel.grad_sync import PartialGradients
from .checkpoints import end_training, load_state, load_state_in_one_process, save_state
from .data_loaders import gather, gather_for_metrics, prepare_data_loader, prepare_scheduler
from .generation import guard_generation
from .hooks import Hooks, hooks_of, set_hooks
from .options import (
    checkpointing,
    compile_options,
    fill_mixed_precision,
    layer_classes,
    offload_activations,
    sharding_options,
)
from .parameter_use import AssignedData, explain, explain_reads
from .prepared import PreparedModel, all_prepared, attach, attached_to, check_use, prepared, release_gathered, remember
from .sampler_state import skip_first_batches
from .saving import bind_saving, save_model

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def install(accelerator: Accelerator, config: ParallelismConfig, hooks: Hooks) -> None:
    """Bind this package to ``accelerator``; called by ``Accelerator.__init__`` through the config.

    Without a process group there is nothing to parallelise. Only ``load_state`` is bound there, so that one process can
    read checkpoints of a parallel run.

    Raises:
        ConfigError: other arguments of the ``Accelerator`` contradict the config.
        UnsupportedError: ``mixed_precision="fp8"``.
    """
    if config.device_mesh is None:
        ParallelismConfig._validate_accelerator(config, accelerator)
        accelerator.load_state = types.MethodType(load_state_in_one_process, accelerator)
        return
    if accelerator.is_main_process:
        _say_what_is_untested()
    plugin = _plugin(accelerator)
    _check_surroundings(accelerator, plugin)
    fill_mixed_precision(plugin, accelerator.mixed_precision)
    # On CPU, too, where Accelerate drops a given fsdp_plugin: the rest of it has to take its FSDP2 paths.
    compat.set_distributed_type_fsdp(accelerator)
    accelerator.state.fsdp_plugin = plugin
    ParallelismConfig._validate_accelerator(config, accelerator)  # ours overrides it, and has called this function
    compat.silence_redistribution_hints()
    for name, function in BOUND_METHODS.items():
        setattr(accelerator, name, types.MethodType(function, accelerator))
    set_hooks(accelerator, hooks)
    _leave_cleanly()


@functools.cache
def _say_what_is_untested() -> None:
    """Warn once of libraries in newer versions than any that was tested."""
    for sentence in compat.newer_than_tested():
        logger.warning("%s", sentence)


@functools.cache
def _leave_cleanly() -> None:
    """Destroy the process group at exit, before the interpreter is torn down, if the script does not do so itself.

    A gloo thread releases the tensors of the last collective shortly after the collective has ended. If the interpreter
    is being torn down by then, the thread cannot take the GIL, and a process whose work is done ends in SIGABRT
    ("terminate called without an active exception"; 4 of 37 runs of a two-rank script). The pause lets that thread take
    the GIL.
    """

    def leave() -> None:
        # After an uncaught exception the other ranks may never answer, so the process just ends.
        if dist.is_initialized() and "gloo" in dist.get_backend_config() and getattr(sys, "last_value", None) is None:
            dist.destroy_process_group()
            time.sleep(0.1)

    atexit.register(leave)


def _plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    """The user's FSDP plugin, or one with our defaults.

    On CPU Accelerate drops a given ``fsdp_plugin``; then it is read from the running constructor.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        plugin = compat.arguments_of_running_accelerator_init(accelerator).get("fsdp_plugin")
    if plugin is None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT"
        )
    return plugin


def _check_surroundings(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(
            f"AutoParallelismConfig cannot be used with {kind.value}: it shards with FSDP2. Use one of the two."
        )
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_plugin has fsdp_version={plugin.fsdp_version}: AutoParallelismConfig shards with FSDP2. Set "
            f"fsdp_version=2 (fsdp_config: fsdp_version: 2 in a config file)."
        )
    if compat.arguments_of_running_accelerator_init(accelerator).get("torch_tp_plugin") is not None:
        raise ConfigError(
            "torch_tp_plugin beside AutoParallelismConfig: Accelerate would drop it. Give its size as "
            "AutoParallelismConfig(tp_size=...) and leave the plugin out."
        )
    hook = getattr(accelerator.ddp_handler, "comm_hook", DDPCommunicationHookType.NO)
    if hook != DDPCommunicationHookType.NO:
        raise ConfigError(
            f"DistributedDataParallelKwargs(comm_hook={hook.value!r}): there is no DDP that would call it. To reduce "
            f"gradients in another dtype set fsdp_plugin.mixed_precision_policy (reduce_dtype)."
        )
    if accelerator.mixed_precision == "fp8":
        raise UnsupportedError(
            "mixed_precision='fp8' is not supported, whatever its recipe: Accelerate's recipes (Transformer Engine, "
            "torchao, MS-AMP) replace linear layers by others, which no tensor-parallel plan and no FSDP2 policy here "
            "knows. Use 'bf16'."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError(
            "mixed_precision='fp16' needs a gradient scaler, which CPU training does not have. Use 'bf16'."
        )


# ---- prepare -------------------------------------------------------------------------------------------------------


def _prepare(self: Accelerator, *args: Any, device_placement: list[bool] | None = None) -> Any:
    """Like ``Accelerator.prepare``; a model without its optimizer is prepared for evaluation."""
    models = [obj for obj in args if isinstance(obj, nn.Module)]
    optimizers = [obj for obj in args if isinstance(obj, torch.optim.Optimizer)]
    if models or optimizers:
        with raise_on_all_ranks("Accelerator.prepare"):
            _check_arguments(models, device_placement)
            if optimizers:
                hooks_of(self).check(self)
    hooks_of(self).before_prepare()
    record = prepared(models[0]) if models else None
    if models and record is None:
        record = _parallelize(self, models[0], optimizers)
        args = tuple(
            record.context.model if obj is models[0] else obj for obj in args
        )  # a strategy may replace the model
        models = [record.context.model]
    elif optimizers:
        _adopt_optimizers(self, record, optimizers)
    # Two passes, like Accelerate: schedulers come second, because they need the prepared optimizers.
    result: list[Any] = [obj if isinstance(obj, nn.Module) else self._prepare_one(obj, first_pass=True) for obj in args]
    result = [obj if isinstance(obj, nn.Module) else self._prepare_one(obj) for obj in result]
    for model in models:
        if not any(model is known for known in self._models):
            self._models.append(model)
    for item in result:
        known_lists = (self._dataloaders, self._models, self._optimizers, self._schedulers)
        if any(item is known for known_list in known_lists for known in known_list):
            item._is_accelerate_prepared = True
    return tuple(result) if len(result) > 1 else result[0]


def _check_arguments(models: list[nn.Module], device_placement: list[bool] | None) -> None:
    if device_placement is not None:
        raise PrepareError("device_placement cannot be customised: FSDP2 decides where parameters are. Leave it out.")
    if len(models) > 1:
        raise PrepareError(
            f"{len(models)} models in one prepare call ({', '.join(type(m).__name__ for m in models)}). Prepare each "
            f"model with its own optimizer in a call of its own; a frozen one alone."
        )


def _parallelize(accelerator: Accelerator, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> PreparedModel:
    raw = [raw_optimizer(optimizer) for optimizer in optimizers]
    with PendingValues(model, raw) as pending:
        return _shard(accelerator, model, raw, pending)


def _shard(
    accelerator: Accelerator, model: nn.Module, raw: list[torch.optim.Optimizer], pending: PendingValues
) -> PreparedModel:
    config: Any = accelerator.parallelism_config
    options = ParallelOptions.of(config)
    with raise_on_all_ranks("Accelerator.prepare"):
        strategy = get_parallelization_strategy(model)
        if options.backend == "megatron_fsdp":
            strategy = megatron_strategy(accelerator, options, strategy)
        if accelerator.verify_device_map(model):
            raise PrepareError(
                "the model was loaded with a device_map over several devices; load it without device_map."
            )
        names = check_optimizers(model, raw) if raw else []
        pending.begin()
        context = ParallelizeContext(
            model=model,
            mesh=accelerator.torch_device_mesh,
            pending=pending,
            device=accelerator.device,
            options=options,
            fsdp=sharding_options(accelerator, options, model),
            context_parallel=config.cp_enabled,
            layer_classes=layer_classes(accelerator.state.fsdp_plugin),
            load_on_rank_zero=bool(accelerator.state.fsdp_plugin.cpu_ram_efficient_loading),
            sharded_checkpoints="SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type),
            checkpointing=checkpointing(accelerator, options, model),
            compile_options=compile_options(accelerator, options),
            offload_activations=offload_activations(accelerator, options, model),
        )
        strategy.plan(context)
        strategy.check_planned(context)
    # Collectives from here on, so outside of the block above: each rank has planned without an error.
    strategy.compare_ranks(context)
    # Before the model changes, so that a refused optimizer leaves it as it was.
    _check_on_shards(context, raw, names)
    upcast: list[str] = []
    # Before the upcast: files get the dtypes in which the model was loaded.
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if accelerator.mixed_precision != "no":
        upcast = upcast_trainable(model)
        if upcast and accelerator.is_main_process:
            logger.info("%d trainable parameters are kept in float32 under mixed precision", len(upcast))
    before = dict(model.named_parameters())
    # The audit of the first step expects a gradient for each of these.
    trainable_names = frozenset(name for name, parameter in before.items() if parameter.requires_grad)
    # The model changes from here on: after an error there is nothing left to restore.
    pending.keep()
    strategy.carry_out(context)
    with raise_on_all_ranks("Accelerator.prepare"):
        strategy.check_carried_out(context)
    for optimizer, groups in zip(raw, names, strict=True):
        strategy.switch_optimizer(context, optimizer, groups, before)
    model = context.model
    record = PreparedModel(context, config, strategy, trainable=bool(raw), trainable_names=trainable_names)
    keep_file_dtypes(model, {name: dtypes[name] for name in upcast})
    remember(model, record)
    for optimizer in raw:
        _attach(accelerator, optimizer, record)
    _watch(model, context)
    if managed_by_megatron(model) is not None:
        watch_megatron(model)
        return record
    manage_adapters(
        model,
        context.tensor_parallel,
        on_unload=lambda plain: _after_unload(plain, record),
        add=lambda original: adding(model, context, original, done=lambda: _after_adding(record)),
    )
    return record


def _watch(model: nn.Module, context: ParallelizeContext) -> None:
    guard_generation(model, context)
    model.register_forward_pre_hook(check_use)
    model.register_forward_hook(release_gathered)
    model.register_forward_hook(explain_reads, always_call=True)
    bind_saving(model)
    for module in (model, ModelView.of(model).inner):
        if hasattr(module, "resize_token_embeddings"):
            module.resize_token_embeddings = functools.partial(_refuse_to_resize, module)  # type: ignore[assignment]


def _refuse_to_resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if new_num_tokens in (None, model.config.get_text_config().vocab_size):
        return model.get_input_embeddings()  # nothing to resize
    raise PrepareError(
        "resize_token_embeddings after accelerator.prepare: the new weights would not be sharded, nor be in the "
        "optimizer. Resize the model before prepare."
    )


def _after_adding(record: PreparedModel) -> None:
    """Adapters were added after ``prepare``: accept their names, and audit their first optimizer step."""
    model = record.context.model
    record.names = {name for name, _ in model.named_parameters()}
    record.assigned = AssignedData(model)
    merge_whole_weights(model)
    if record.audit is not None:
        record.audit.again({name for name, parameter in model.named_parameters() if parameter.requires_grad})


def _after_unload(plain: nn.Module, record: PreparedModel) -> None:
    """Register the model without its adapters as a prepared model, for evaluation and saving.

    Not for training: no optimizer holds the parameters that are left.
    """
    # Unloading removes PEFT's prefixes from the names; the parameters are the same objects.
    kept = {id(p): n for n, p in plain.named_parameters()}
    dtypes = file_dtypes(record.context.model)
    dtypes = {
        kept[id(p)]: dtypes[name]
        for name, p in record.context.model.named_parameters()
        if name in dtypes and id(p) in kept
    }
    keep_file_dtypes(plain, dtypes)
    remember(plain, PreparedModel(record.context, record.config, record.strategy, trainable=False, unloaded=True))
    _watch(plain, record.context)


def _check_on_shards(
    context: ParallelizeContext,
    optimizers: list[torch.optim.Optimizer],
    names: list[list[list[str]]],
) -> None:
    """Refuse, on all ranks, optimizers whose step on shards differs from their step on full parameters."""
    if not optimizers or not context.options.check_optimizer:
        return
    parameters = dict(context.model.named_parameters())
    if context.options.backend == "megatron_fsdp":
        from ..backends.megatron_fsdp.accelerate import check_elementwise

        with raise_on_all_ranks("Accelerator.prepare"):
            check_elementwise(optimizers, names, {name: p.shape for name, p in parameters.items()})
        return
    with raise_on_all_ranks("Accelerator.prepare"):
        check_on_shards(
            optimizers,
            names,
            {name: p.shape for name, p in parameters.items()},
            context.spec.parameters if context.spec is not None else {},
            context.dp_mesh,
            context.tp_mesh,
            context.device,
            context.fsdp.offload_policy,
            {name for name, p in parameters.items() if p in context.fsdp.ignored_parameters},
        )


def _adopt_optimizers(self: Accelerator, record: PreparedModel | None, optimizers: list[torch.optim.Optimizer]) -> None:
    """Accept optimizers that hold the parameters of a model that is prepared already; refuse all others."""
    owners = []
    with raise_on_all_ranks("Accelerator.prepare"):
        for optimizer in map(raw_optimizer, optimizers):
            candidates = [record] if record is not None else all_prepared()
            for owner in candidates:
                managed = managed_by_megatron(owner.context.model)
                sharded = sharded_parameters(owner.context.model) if managed is None else megatron_parameters(managed)
                if all(id(p) in sharded for group in optimizer.param_groups for p in group["params"]):
                    break
            else:
                raise PrepareError(
                    f"{type(optimizer).__name__} does not hold the parameters of a model prepared here. Pass model and "
                    f"optimizer in one call, model, optimizer = accelerator.prepare(model, optimizer), or create the "
                    f"optimizer from the parameters of the prepared model."
                )
            replace_parameters(optimizer, sharded)
            owners.append((optimizer, owner))
    # A second loop, outside of the block: the check on shards raises on all ranks by itself.
    for optimizer, owner in owners:
        owner.handed_over_late = not owner.trainable
        names = parameter_names(owner.context.model)
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        _check_on_shards(owner.context, [optimizer], [groups])
        if managed_by_megatron(owner.context.model) is not None and attached_to(optimizer) is not owner:
            owner.strategy.switch_optimizer(
                owner.context, optimizer, groups, dict(owner.context.model.named_parameters())
            )
        owner.trainable = True
        _attach(self, optimizer, owner)


def _attach(accelerator: Accelerator, optimizer: torch.optim.Optimizer, record: PreparedModel) -> None:
    """Register the step hooks of ``optimizer``, once, however often it is prepared.

    Before each step: sum the Partial gradients that are still outstanding, and audit the first gradients. So a loop
    that never calls ``accelerator.backward`` is correct too, as long as it clips with ``accelerator.clip_grad_norm_``.
    After each step: reshard the FSDP units, because an evaluation since the last backward may have left unsharded
    parameters with the old values.
    """
    if attached_to(optimizer) is record:
        return
    hooks = hooks_of(accelerator)
    attach(optimizer, record)
    if record.audit is None:
        record.audit = _audit(record)
    record.audit.optimizers.add(optimizer)
    optimizer.register_step_pre_hook(lambda stepping, *_: _before_step(record, stepping, hooks))

    def reshard(*_: Any) -> None:
        for unit in fsdp_units(record.context.model):
            unit.reshard()

    optimizer.register_step_post_hook(reshard)


def _audit(record: PreparedModel) -> Audit:
    context = record.context
    every = {"off": 0, "every_n_steps": context.options.audit_steps}.get(meaning_of(context.options, "audit"))
    compiled = (
        without_units_inside(context.structure.layers)
        if context.compile_options is not None and context.structure
        else []
    )
    # A model that was prepared for evaluation first: the user chose its trainable parameters after that.
    now = {name for name, parameter in context.model.named_parameters() if parameter.requires_grad}
    trainable = now if record.handed_over_late else set(record.trainable_names)
    tp_group = None if context.tp_mesh is None else context.tp_mesh.get_group()
    return Audit(context.model, trainable, compiled, tp_group, every)


def _before_step(record: PreparedModel, optimizer: torch.optim.Optimizer, hooks: Hooks) -> None:
    """Sum outstanding Partial gradients, then audit this step if it is due, then call the loop's hook."""
    if record.assigned is not None:
        record.assigned.check()
    if record.context.tensor_parallel is not None:
        record.context.tensor_parallel.partial.flush()
    # After the flush: the audit compares replicas, and Partial gradients differ over tp until they are summed.
    if record.audit is not None:
        record.audit.before_step(optimizer)
    hooks.before_step()


def _prepare_model(
    self: Accelerator, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
) -> nn.Module:
    """Like ``Accelerator.prepare_model``, but a model that this package shards is not wrapped in DDP, and its layers
    are compiled instead of the entire model.

    Under ``torch_compile`` the Trainer calls this with ``evaluation_mode`` for an evaluation before training. Other
    models for evaluation (TRL's reference and reward models) stay unsharded on each rank, as in stock Accelerate.
    """
    if evaluation_mode and prepared(model) is None:
        refuse_sharded(model)  # the Trainer prepares such a model with evaluation_mode for training, too
        if not hooks_of(self).trains(model):
            return type(self).prepare_model(self, model, device_placement, evaluation_mode)
    return self.prepare(model)


# ---- the training step ---------------------------------------------------------------------------------------------


def _partial_gradients(model: nn.Module) -> PartialGradients | None:
    record = prepared(model)
    return None if record is None or record.context.tensor_parallel is None else record.context.tensor_parallel.partial


def _flush_all(accelerator: Accelerator) -> None:
    for model in accelerator._models:
        partial = _partial_gradients(model)
        if partial is not None:
            partial.flush()


def _backward(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
    """Like ``Accelerator.backward``; sums Partial gradients over tp if this backward completes the optimizer step."""
    partials = [partial for model in self._models if (partial := _partial_gradients(model)) is not None]
    for partial in partials:
        partial.deferred = True
    try:
        type(self).backward(self, loss, **kwargs)
    except RuntimeError as error:
        explain(error)
        raise
    finally:
        for partial in partials:
            partial.deferred = False
    if self.sync_gradients:
        _flush_all(self)


def _clip_grad_norm_(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor | None:
    """Like ``Accelerator.clip_grad_norm_``, after Partial gradients have been summed: the norm needs full gradients."""
    _flush_all(self)
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    managed = owner_of(self._models, parameters)
    if managed is not None:
        return managed.clip_grad_norm_(max_norm, norm_type, parameters)
    # Accelerate finds the model of the parameters by comparing lists of tensors. That fails beside another model with
    # equal shapes, and if it finds none it unscales gradients twice. Its FSDP2 path needs nothing else of the model.
    found: Any = types.SimpleNamespace(parameters=lambda: parameters)
    models, self._models = self._models, [found]
    try:
        return type(self).clip_grad_norm_(self, parameters, max_norm, norm_type)
    finally:
        self._models = models


def _get_state_dict(self: Accelerator, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """Like ``Accelerator.get_state_dict``, which assumes DTensor's even shards; megatron-fsdp's are uneven."""
    managed = managed_by_megatron(model)
    if managed is not None:
        return full_state_dict(managed, self.is_main_process)
    return type(self).get_state_dict(self, model, unwrap)


@contextmanager
def _maybe_context_parallel(
    self: Accelerator,
    buffers: list[torch.Tensor] | None = None,
    buffer_seq_dims: list[int] | None = None,
    no_restore_buffers: set[torch.Tensor] | None = None,
) -> Iterator[None]:
    """Like ``Accelerator.maybe_context_parallel``, but on every device: torch's ring attention supports only CUDA's
    operators.
    """
    mesh = MeshAxes().context_parallel(self.torch_device_mesh)
    if mesh is None:
        with type(self).maybe_context_parallel(self, buffers, buffer_seq_dims, no_restore_buffers):
            yield
        return
    with sharded_buffers(mesh, buffers, buffer_seq_dims, no_restore_buffers):
        yield


#: Everything that is bound on an ``Accelerator`` instance: name -> function. Each function's docstring says why.
BOUND_METHODS: dict[str, Callable[..., Any]] = {
    "prepare": _prepare,
    "prepare_model": _prepare_model,
    "prepare_data_loader": prepare_data_loader,
    "prepare_scheduler": prepare_scheduler,
    "skip_first_batches": skip_first_batches,
    "backward": _backward,
    "clip_grad_norm_": _clip_grad_norm_,
    "maybe_context_parallel": _maybe_context_parallel,
    "get_state_dict": _get_state_dict,
    "save_model": save_model,
    "save_state": save_state,
    "load_state": load_state,
    "end_training": end_training,
    "gather": gather,
    "gather_for_metrics": gather_for_metrics,
}
