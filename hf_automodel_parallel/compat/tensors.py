"""Private names of torch's tensors, operators and tracing; :mod:`.names` lists them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    pass


def functional_collectives() -> ModuleType:
    """Return torch's traceable collectives (private module since torch 2.1, stable in 2.11 to 2.13)."""
    import torch.distributed._functional_collectives as funcol

    return funcol


def all_gather_dim(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """All-gather ``x`` along ``dim``, traceable (``all_gather_single`` since torch 2.13)."""
    funcol = functional_collectives()
    gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    return _waited(gather(x, dim, group))


def reduce_scatter_dim(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """Reduce-scatter ``x`` (sum) along ``dim``, traceable (``reduce_scatter_single`` since torch 2.13)."""
    funcol = functional_collectives()
    scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
    return _waited(scatter(x, "sum", dim, group))


def _waited(x: torch.Tensor) -> torch.Tensor:
    """Wait for the collective that computes ``x``, except while tracing.

    A traced collective has its own wait, and inductor's patterns do not match it with a second one.
    """
    return x if torch.compiler.is_compiling() else functional_collectives().wait_tensor(x)


def fake_tensor_mode() -> Any:
    """Return a mode for fake tensors that accepts real tensors as inputs, such as constants of a module."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(x: Any) -> bool:
    """True for a tensor of :func:`fake_tensor_mode`, which has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


def is_plain_tensor(x: Any) -> TypeGuard[torch.Tensor]:
    """True for a ``torch.Tensor`` of no subclass; a fake tensor stands for one."""
    return type(x) is torch.Tensor or is_fake(x)


def start_simulated_ranks(size: int) -> None:
    """Initialise the default process group with ``size`` ranks that do not exist; this process is rank 0.

    Its collectives move nothing: an all-gather returns this rank's tensor for each rank.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)


def ranks_are_simulated() -> bool:
    """True in a process that :func:`start_simulated_ranks` made a rank."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_backend() == "fake"


def flash_attention_of_last_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scale: float | None
) -> torch.Tensor | None:
    """Causal flash attention of the last n queries of a sequence to all N keys; None if the kernel cannot be used.

    The public SDPA aligns its causal mask with the first query, and does not use this kernel with an explicit mask.
    ``torch.nn.attention.bias.CausalBias`` makes the same call (torch 2.11 to 2.13). But it is a tensor subclass, which
    can be constructed neither inside of a compiled graph nor under a selective checkpoint.

    Args:
        query: (B, heads, n, D).
        key: (B, heads, N, D).
        value: (B, heads, N, D).
        dropout: dropout probability of the attention weights.
        scale: factor of the scores; None for ``1 / sqrt(D)``.

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
    """Return the aten operator of ``Tensor.to``: a copy in another dtype or on another device (torch 2.11 to 2.13)."""
    return torch.ops.aten._to_copy.default


def apply_to_tensors(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace each parameter and buffer by ``function(tensor)``, as ``Module.to`` and ``Module.to_empty`` do.

    FSDP2 overrides ``_apply``, so that its units refer to the new shards (torch 2.11 to 2.13).
    """
    model._apply(function)


#: Inductor's option that overlaps collectives with adjacent matrix products.
ASYNC_TENSOR_PARALLEL_OPTION = "_micro_pipeline_tp"


def enable_symmetric_memory(group: Any) -> None:
    """Enable symmetric memory for ``group``; inductor overlaps only the collectives of such groups."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group.group_name)


def without_hooks(module: nn.Module) -> None:
    """Remove all forward hooks of ``module`` itself."""
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


@contextlib.contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Suppress the traceback that torch logs when an operator fails on fake tensors; the caller handles the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` at the end of the running backward, after earlier callbacks. Only inside of a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def has_implemented_forward(module: nn.Module) -> bool:
    """False for containers without a ``forward`` (``ModuleList``, ``ParameterDict``, ...)."""
    return type(module).forward is not nn.Module.forward


def dynamo_side_effects_under_checkpoint() -> Any:
    """Context in which dynamo skips Python side effects of a checkpointed function in its recomputation (2.9 to 2.13).

    Without it, a checkpoint with side effects breaks the graph. The setting is global, so it is patched only around
    calls of layers that this package compiles.
    """
    return torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


def torch_version() -> tuple[int, int]:
    """``(major, minor)`` of the installed torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def hooks_on(module: nn.Module) -> list[Callable[..., Any]]:
    """Return all forward and backward hooks of ``module`` itself."""
    kinds = (forward_pre_hooks(module), forward_hooks(module), backward_hooks(module))
    return [hook for hooks in kinds for hook in hooks.values()]


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the forward pre-hooks of ``module``, by the id of their handle and in the order of their calls; live."""
    return module._forward_pre_hooks


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the forward hooks of ``module``, like :func:`forward_pre_hooks`."""
    return module._forward_hooks


def backward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the backward (pre-)hooks of ``module``, by the id of their handle; a copy."""
    return {**module._backward_pre_hooks, **module._backward_hooks}


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """True if a gradient hook is registered on this tensor object."""
    return bool(getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None))


def has_accumulation_hooks(parameter: torch.Tensor) -> bool:
    """True if a hook of ``register_post_accumulate_grad_hook`` is on this tensor object."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def gradient_hooks(tensor: torch.Tensor) -> list[Callable[..., Any]]:
    """Return the hooks that were registered on this tensor object with ``register_hook``."""
    return list((tensor._backward_hooks or {}).values())


def is_compiled(module: nn.Module) -> bool:
    """True if ``torch.compile`` or ``Module.compile`` has compiled the call or the forward of ``module``."""
    forward = module.__dict__.get("forward")
    return module._compiled_call_impl is not None or (forward is not None and is_compiled_function(forward))


def is_compiled_function(function: Any) -> bool:
    """True if ``function`` is a product of ``torch.compile``."""
    from torch._dynamo.eval_frame import innermost_fn

    return innermost_fn(function) is not function


def graph_break_type() -> type[Exception]:
    """Return the exception that ``torch.compile(fullgraph=True)`` raises for code that it cannot trace as one graph."""
    return torch._dynamo.exc.Unsupported


def checkpoint_wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside of torch's checkpoint wrapper, or of a similar one; None if it is not such a wrapper."""
    inner = module._modules.get("_checkpoint_wrapped_module")
    return inner if isinstance(inner, nn.Module) else None


_unhashed: list[Any] = []


def hash_specs_of_symbolic_shapes() -> None:
    """Make a ``DTensorSpec`` with symbolic sizes hashable, by mesh and placements only (torch 2.11 to 2.13).

    While torch.compile traces DTensors with dynamic shapes, sizes are ``SymInt`` without a hash, and the cache of
    sharding decisions raises a ``TypeError``. Equality still compares shapes, so a coarser hash is slower but changes
    no result. Applies to the entire process until :func:`restore_spec_hash`; a second call has no effect.
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
    """Undo :func:`hash_specs_of_symbolic_shapes`."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    if _unhashed:
        DTensorSpec._hash_impl = _unhashed.pop()  # type: ignore[method-assign]


def wrapper_subclass(cls: type, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tensor of the subclass ``cls`` without storage, made in the same way as a DTensor (torch 2.11-2.13)."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def version_of(tensor: torch.Tensor) -> int:
    """Number of in-place changes of ``tensor`` and its views; 0 for inference tensors, where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def without_torch_function() -> Any:
    """Context without ``__torch_function__`` dispatch of subclasses, as in ``Tensor.__torch_function__`` itself."""
    return torch._C.DisableTorchFunctionSubclass()


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the base of the view ``tensor`` if the base requires a gradient, else ``tensor`` itself."""
    base = tensor._base if tensor._is_view() else None
    return base if base is not None and base.requires_grad else tensor


#: Autograd nodes that pass the gradient on unchanged if their output has the same memory location as their input. The
#: last one belongs to ``RegisterPostBackwardFunction``, which FSDP2 applies to the inputs of a unit.
_PLAIN_VIEWS = ("AliasBackward0", "SliceBackward0", "ViewBackward0", "RegisterPostBackwardFunctionBackward")


def is_view_of(x: torch.Tensor, base: torch.Tensor) -> bool:
    """True if only views lead from ``base`` to ``x``, which are at the same memory location.

    Decides by the names of the autograd nodes (torch 2.11 to 2.13). An unknown name gives False, the safe answer.
    """
    node: Any = x.grad_fn
    while type(node).__name__ in _PLAIN_VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node is base.grad_fn


def copy_each(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each of ``sources`` into the destination of equal shape, on a GPU by few kernels; dtypes may differ."""
    torch._foreach_copy_(destinations, sources)


def rendezvous_store() -> Any:
    """Return the store of the default process group. It works without collectives and with each backend."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
