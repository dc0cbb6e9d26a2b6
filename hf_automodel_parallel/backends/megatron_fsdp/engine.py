"""The one place that talks to the package ``megatron_fsdp``: import, version, names of arguments, private names.

Checked on megatron-fsdp 0.5.0, 0.5.1, 0.6.0 and 0.6.1. What differs between them, and from the reference's names:

===============================  ===============================================================================
ours (and the reference's)       0.5 and 0.6
===============================  ===============================================================================
``init_fsdp_with_meta_device``   ``init_model_with_meta_device``
``preserve_fp32_weights``        ``MixedPrecisionPolicy.main_params_dtype`` (None: the parameters themselves)
``grad_reduce_in_fp32``          ``MixedPrecisionPolicy.main_grads_dtype`` and ``grad_comm_dtype``
``check_for_nan_in_grad``        ``report_nan_in_param_grad``, which raises on one rank while the others go on; used
                                 only where there is no optimizer, whose step checks on all ranks
``megatron_fsdp_unit_modules``   ``fsdp_unit_modules``
the rest                         unchanged
===============================  ===============================================================================

0.5 calls ``module.forward`` where 0.6 calls ``module``, so that hooks of the root would not run; see
:class:`.sharding.AtRest`.
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

#: Versions that the translation is written for: from the first one, up to and without the second one.
VERSIONS = ((0, 5), (0, 7))

_INSTALL = "pip install 'hf-automodel-parallel[megatron]' (megatron-fsdp>=0.5,<0.7)"


def importable() -> bool:
    """True if ``megatron_fsdp`` can be imported, with what is needed of it."""
    try:
        module = importlib.import_module("megatron_fsdp")
    except (ImportError, OSError):  # OSError: a library of CUDA's that it links against is missing
        return False
    return hasattr(module, "fully_shard") and hasattr(module, "fully_shard_model")


def load() -> types.ModuleType:
    """The package ``megatron_fsdp``.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
        UnsupportedError: its version is not one of those that the translation knows.
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
        options: what the user asked for.
        units: the classes of the units.
        has_optimizer: an optimizer is wrapped, whose step looks for gradients that are not finite.

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
    """Raise :class:`UnsupportedError` where there are no CUDA streams, which megatron-fsdp works on whatever the
    device.
    """
    try:
        torch.cuda.Stream()
    except (AssertionError, RuntimeError) as error:
        raise UnsupportedError(
            f"megatron-fsdp needs CUDA, which this process has not ({str(error).splitlines()[0]}). Use "
            f"backend='fsdp2', which runs on CPUs too."
        ) from error


# ---- the object that megatron-fsdp returns -------------------------------------------------------------------------


def show_raw(wrapper: Any) -> None:
    """Put the parameters to compute with into the module tree.

    ``MegatronFSDP.forward`` does it; a forward that does not come through there (``generate``, PEFT's inner model)
    needs it too.
    """
    compat.show_raw_parameters(wrapper)


def show_sharded(wrapper: Any) -> None:
    """Put the parameters of the optimizer into the module tree, and let the next forward gather values again.

    What lies outside of the units stays gathered otherwise, with old values if the optimizer steps in between.
    """
    wrapper.synchronize_param_gather()


def start_backward(wrapper: Any) -> None:
    """Tell megatron-fsdp that a backward begins; only the first call of each backward has an effect.

    It notices by itself if the root or its last submodule returns a tensor with a gradient, but not if the root returns
    a ``ModelOutput`` and the loss avoids that submodule; then no gradient would ever reach the optimizer.
    """
    wrapper.pre_backward(skip_backward_hook=False)


def sharded_parameters(wrapper: Any) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name."""
    return dict(wrapper.param_and_grad_buffer.optimizer_named_parameters)


def put_on_one_mesh(wrapper: Any, mesh: DeviceMesh) -> None:
    """Let parameters and gradients that are replicated over tp say so, on the same ``mesh`` (..., shard, tp) as the
    others.

    megatron-fsdp describes them on the data-parallel axes alone. Whoever sees gradients on two meshes (the Trainer's
    clipping) adds up norms mesh by mesh with torch's functions, which fail on uneven shards; and nobody could compare
    the copies.
    """
    buffer = wrapper.param_and_grad_buffer
    for name, parameter in buffer.optimizer_named_parameters:
        missing = mesh.ndim - len(parameter.placements)
        if not missing:
            continue
        placements = (*parameter.placements, *[Replicate()] * missing)
        compat.describe_on(parameter, mesh, placements)
        if parameter.requires_grad:
            # It makes this object at the first gradient, if it is not there, and later only exchanges what is inside.
            nothing = parameter.detach().to_local().new_empty(0, *parameter.shape[1:])
            buffer.dist_main_grad[name] = DTensor.from_local(
                nothing, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )


def install_values(wrapper: Any) -> None:
    """Copy the optimizer's parameters to what the forward gathers."""
    wrapper.install_optimized_model_weights()


def wrap_optimizer(optimizer: torch.optim.Optimizer, for_dcp: bool) -> None:
    """Let ``step`` and ``zero_grad`` of ``optimizer``, which holds sharded parameters, do megatron-fsdp's part too, in
    place.

    ``fully_shard_optimizer`` steps once with gradients of zero, to have the state made. AdamW would decay the weights
    in it and count it, so it does not take place here: the state is made in the first real step.
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
    """megatron-fsdp looks for its model at the first parameter of the first group, which may be empty."""
    order = list(optimizer.param_groups)
    optimizer.param_groups.sort(key=lambda group: not group["params"])
    try:
        yield
    finally:
        optimizer.param_groups[:] = order
