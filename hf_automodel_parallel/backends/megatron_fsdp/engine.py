"""The only module that uses the package ``megatron_fsdp``: import, version, names of arguments, private names.

Checked on megatron-fsdp 0.5.0, 0.5.1, 0.6.0 and 0.6.1. The options have the reference API's names, which differ from
those of the package:

===============================  ===============================================================================
ours (and the reference's)       0.5 and 0.6
===============================  ===============================================================================
``init_fsdp_with_meta_device``   ``init_model_with_meta_device``
``preserve_fp32_weights``        ``MixedPrecisionPolicy.main_params_dtype`` (None: the parameters themselves)
``grad_reduce_in_fp32``          ``MixedPrecisionPolicy.main_grads_dtype`` and ``grad_comm_dtype``
``check_for_nan_in_grad``        ``report_nan_in_param_grad``, which raises on one rank while the others continue;
                                 used only without an optimizer, because its step checks on all ranks
``megatron_fsdp_unit_modules``   ``fsdp_unit_modules``
the rest                         unchanged
===============================  ===============================================================================

0.5 calls ``module.forward`` where 0.6 calls ``module``, which bypasses hooks of the root; see
:meth:`.sharding.MegatronModel.watch`.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ... import compat
from ...errors import ConfigError, UnsupportedError
from .options import MegatronOptions

#: Supported versions: from the first one up to the second one, which is excluded.
VERSIONS = ((0, 5), (0, 7))

_INSTALL = "pip install 'hf-automodel-parallel[megatron]' (megatron-fsdp>=0.5,<0.7)"


def importable() -> bool:
    """True if ``megatron_fsdp`` can be imported and has ``fully_shard`` and ``fully_shard_model``."""
    try:
        module = importlib.import_module("megatron_fsdp")
    except (ImportError, OSError):  # OSError: a CUDA library that it links against is missing
        return False
    return hasattr(module, "fully_shard") and hasattr(module, "fully_shard_model")


def load() -> types.ModuleType:
    """The package ``megatron_fsdp``.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
        UnsupportedError: its version is not in :data:`VERSIONS`.
    """
    try:
        module = importlib.import_module("megatron_fsdp")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"backend 'megatron_fsdp' needs the package megatron-fsdp, which cannot be imported ({error}): {_INSTALL}."
        ) from error
    version = str(getattr(module, "__version__", "unknown"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise UnsupportedError(
            f"megatron-fsdp {version} is installed, but its arguments are known for 0.5 and 0.6: {_INSTALL}."
        )
    return module


def translate(options: MegatronOptions, units: list[type[nn.Module]], has_optimizer: bool) -> dict[str, Any]:
    """Keyword arguments of ``megatron_fsdp.fully_shard_model`` for ``options``, without mesh and device.

    Args:
        options: the user's options.
        units: the classes of the units.
        has_optimizer: an optimizer is wrapped; its step then checks that gradients are finite.

    Raises:
        UnsupportedError: the installed version lacks an argument.
    """
    package = load()
    single = torch.float32
    arguments = {
        "fsdp_unit_modules": units,
        "zero_dp_strategy": options.zero_dp_strategy,
        "init_model_with_meta_device": options.init_fsdp_with_meta_device,
        "mixed_precision_policy": package.MixedPrecisionPolicy(
            main_params_dtype=single if options.preserve_fp32_weights else None,
            main_grads_dtype=single if options.grad_reduce_in_fp32 else None,
            grad_comm_dtype=single if options.grad_reduce_in_fp32 else None,
        ),
        "report_nan_in_param_grad": options.check_for_nan_in_grad and not has_optimizer,
    }
    for name in (
        "overlap_grad_reduce",
        "overlap_param_gather",
        "average_in_collective",
        "disable_bucketing",
        "calculate_per_token_loss",
        "keep_fp8_transpose_cache",
        "nccl_ub",
        "fsdp_double_buffer",
    ):
        arguments[name] = getattr(options, name)
    known = inspect.signature(package.fully_shard_model).parameters
    unknown = sorted(arguments.keys() - known.keys())
    if unknown:
        raise UnsupportedError(
            f"megatron-fsdp {package.__version__} has no argument {', '.join(unknown)}. Install a version of 0.5 or "
            f"0.6: {_INSTALL}."
        )
    return arguments


def check_device() -> None:
    """Raise :class:`UnsupportedError` without CUDA streams, which megatron-fsdp uses on every device."""
    try:
        torch.cuda.Stream()
    except (AssertionError, RuntimeError) as error:
        raise UnsupportedError(
            f"megatron-fsdp needs CUDA, which this process has not ({str(error).splitlines()[0]}). Use "
            f"backend='fsdp2', which runs on CPUs too."
        ) from error


# ---- calls on the MegatronFSDP wrapper -----------------------------------------------------------------------------


def show_raw(wrapper: Any) -> None:
    """Put the parameters that forward computes with into the module tree.

    ``MegatronFSDP.forward`` does so itself. A forward that bypasses it (``generate``, PEFT's inner model) needs this
    call.
    """
    compat.show_raw_parameters(wrapper)


def show_sharded(wrapper: Any) -> None:
    """Put the optimizer's sharded parameters into the module tree, and make the next forward all-gather again.

    Without this, parameters outside of the units stay unsharded, with old values if the optimizer steps in between.
    """
    wrapper.synchronize_param_gather()


def start_backward(wrapper: Any) -> None:
    """Start megatron-fsdp's backward; only the first call of each backward has an effect.

    megatron-fsdp hooks tensors that the root or its last submodule returns. If the root returns a ``ModelOutput`` and
    the loss does not depend on that submodule, no hook runs, and no gradient would reach the optimizer.
    """
    wrapper.pre_backward(skip_backward_hook=False)


def sharded_parameters(wrapper: Any) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name."""
    return dict(wrapper.param_and_grad_buffer.optimizer_named_parameters)


def put_on_one_mesh(wrapper: Any, mesh: DeviceMesh) -> None:
    """Describe parameters and gradients that are replicated over tp on ``mesh`` (..., shard, tp), like all others.

    megatron-fsdp describes them on the data-parallel axes only. With gradients on two meshes, the Trainer's clipping
    adds up norms mesh by mesh with torch's functions, which fail on uneven shards. And the audit could not compare the
    replicas.
    """
    buffer = wrapper.param_and_grad_buffer
    for name, parameter in buffer.optimizer_named_parameters:
        missing = mesh.ndim - len(parameter.placements)
        if not missing:
            continue
        placements = (*parameter.placements, *[Replicate()] * missing)
        compat.describe_on(parameter, mesh, placements)
        if parameter.requires_grad:
            # megatron-fsdp makes this DTensor at the first gradient if it is missing; later it only replaces the local
            # tensor inside.
            nothing = parameter.detach().to_local().new_empty(0, *parameter.shape[1:])
            buffer.dist_main_grad[name] = DTensor.from_local(
                nothing, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )


def install_values(wrapper: Any) -> None:
    """Copy the optimizer's parameters into the buffers that forward all-gathers from."""
    wrapper.install_optimized_model_weights()


def wrap_optimizer(optimizer: torch.optim.Optimizer, for_dcp: bool) -> None:
    """Let megatron-fsdp wrap ``step`` and ``zero_grad`` of ``optimizer``, which has sharded parameters, in place.

    ``fully_shard_optimizer`` takes one step with zero gradients, to create the state. In it AdamW would decay the
    weights and count a step. So that step is suppressed, and the first real step creates the state.
    """
    package = load()
    with _without_step(optimizer), _filled_group_first(optimizer):
        package.fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=for_dcp)


@contextmanager
def _without_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    idle = optimizer.step
    try:
        yield
    finally:
        if optimizer.__dict__.get("step") is idle:
            del optimizer.__dict__["step"]


@contextmanager
def _filled_group_first(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put a group with parameters first: megatron-fsdp finds its model by the first parameter of the first group."""
    order = list(optimizer.param_groups)
    optimizer.param_groups.sort(key=lambda group: not group["params"])
    try:
        yield
    finally:
        optimizer.param_groups[:] = order
