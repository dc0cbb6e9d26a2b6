"""Private names of tensors, operators and tracing of torch; their table is :mod:`.names`."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    pass


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

    The public SDPA aligns its causal mask with the first query, and with an explicit mask it does not take this kernel.
    The call is that of ``torch.nn.attention.bias.CausalBias`` (torch 2.11 to 2.13), a tensor subclass that can be made
    neither inside of a compiled graph nor under a selective checkpoint.

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
    """Replace each parameter and buffer by what ``function`` makes of it: what ``Module.to`` and ``Module.to_empty``
    call.

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


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward is over, after what was queued before; only inside of a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def has_implemented_forward(module: nn.Module) -> bool:
    """False for containers (``ModuleList``, ``ParameterDict``, ...) whose ``forward`` nobody can call."""
    return type(module).forward is not nn.Module.forward


def dynamo_side_effects_under_checkpoint() -> Any:
    """Context in which dynamo skips a checkpointed region's side effects in its recomputation (torch 2.9 to 2.13).

    Without it such a region breaks the graph. Patched only around our own compiled layers and restored after.
    """
    return torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


def torch_version() -> tuple[int, int]:
    """``(major, minor)`` of the installed torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def hooks_on(module: nn.Module) -> list[Callable[..., Any]]:
    """All hooks that ``module`` was given, of forward and backward."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in kinds for hook in hooks.values()]


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """True if somebody has registered a hook on the gradient of this very tensor object."""
    return bool(getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None))


def gradient_hooks(tensor: torch.Tensor) -> list[Callable[..., Any]]:
    """The hooks that ``register_hook`` of this very tensor object was given."""
    return list((tensor._backward_hooks or {}).values())


def is_compiled(module: nn.Module) -> bool:
    """True if the call or the forward of ``module`` is a product of ``torch.compile``."""
    if module._compiled_call_impl is not None:
        return True
    from torch._dynamo.eval_frame import innermost_fn

    forward = module.__dict__.get("forward")
    return forward is not None and innermost_fn(forward) is not forward


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

    While torch.compile traces DTensors with dynamic shapes, sizes are ``SymInt``, which have no hash, and the cache of
    sharding decisions fails with a ``TypeError``. Equality still compares shapes, so a coarser hash costs time and
    changes no result. For the whole process until :func:`restore_spec_hash`; a second call changes nothing.
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


def wrapper_subclass(cls: type, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of class ``cls`` with these properties and no storage (what DTensor is made with, torch 2.11 to
    2.13).
    """
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def version_of(tensor: torch.Tensor) -> int:
    """How often ``tensor`` and the views that share its memory have been changed in place; 0 where torch does not
    count.
    """
    return 0 if tensor.is_inference() else tensor._version


def without_torch_function() -> Any:
    """Context in which tensor subclasses are plain tensors to torch's functions: what ``Tensor.__torch_function__``
    uses.
    """
    return torch._C.DisableTorchFunctionSubclass()


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that ``tensor`` is a view of, if that takes part in a backward, else ``tensor`` itself."""
    base = tensor._base if tensor._is_view() else None
    return base if base is not None and base.requires_grad else tensor


#: Nodes of autograd that pass a gradient on as it is, if what they return has the place of what they are given. The
#: last is that of ``RegisterPostBackwardFunction``, which FSDP2 puts on the inputs of a unit.
_PLAIN_VIEWS = ("AliasBackward0", "SliceBackward0", "ViewBackward0", "RegisterPostBackwardFunctionBackward")


def is_view_of(x: torch.Tensor, base: torch.Tensor) -> bool:
    """True if between ``base`` and ``x``, at the same place, lie views alone, by the names of their nodes (torch 2.11
    to 2.13).

    A name that is not known counts as something else, so the answer errs towards False.
    """
    node: Any = x.grad_fn
    while type(node).__name__ in _PLAIN_VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node is base.grad_fn


def rendezvous_store() -> Any:
    """The store through which the ranks found each other; works without a collective, and with every backend."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
