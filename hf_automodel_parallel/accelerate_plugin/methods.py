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
from ..backends.megatron_fsdp.accelerate import full_state_dict
from ..backends.megatron_fsdp.sharding import managed_by_megatron
from ..context_parallel.buffers import sharded_buffers
from ..core.mesh import MeshAxes
from ..errors import ConfigError, UnsupportedError
from .checkpoints import end_training, load_state, load_state_in_one_process, save_state
from .data_loaders import gather, gather_for_metrics, prepare_data_loader, prepare_scheduler
from .hooks import Hooks, set_hooks
from .options import fill_mixed_precision
from .prepare import prepare, prepare_model
from .sampler_state import skip_first_batches
from .saving import save_model
from .step import backward, clip_grad_norm_

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


def get_state_dict(self: Accelerator, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    """Like ``Accelerator.get_state_dict``, which assumes DTensor's even shards; megatron-fsdp's are uneven."""
    managed = managed_by_megatron(model)
    if managed is not None:
        return full_state_dict(managed, self.is_main_process)
    return type(self).get_state_dict(self, model, unwrap)


@contextmanager
def maybe_context_parallel(
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
    "prepare": prepare,
    "prepare_model": prepare_model,
    "prepare_data_loader": prepare_data_loader,
    "prepare_scheduler": prepare_scheduler,
    "skip_first_batches": skip_first_batches,
    "backward": backward,
    "clip_grad_norm_": clip_grad_norm_,
    "maybe_context_parallel": maybe_context_parallel,
    "get_state_dict": get_state_dict,
    "save_model": save_model,
    "save_state": save_state,
    "load_state": load_state,
    "end_training": end_training,
    "gather": gather,
    "gather_for_metrics": gather_for_metrics,
}
