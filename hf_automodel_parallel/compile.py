"""Per-layer ``torch.compile``, in place, as the last step; a graph contains only the computation of a layer."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from . import compat
from .activation_checkpointing import REGATHER, Checkpointed, SavePolicy, is_checkpoint_wrapped
from .core.forward_stack import Forward, ForwardSlot, ForwardStack, ForwardWrapper, is_compiled
from .errors import UnsupportedError
from .tensor_parallel.dora import make_traceable
from .tensor_parallel.local_parameters import LocalParamForward

logger = logging.getLogger(__name__)


def compile_layers(
    layers: list[nn.Module], policy: SavePolicy | None = None, parts: bool = False, **options: Any
) -> None:
    """Compile the forward of each layer, in place.

    It compiles the ``forward``, not the module: FSDP2's hooks, the local-parameter scope and a full checkpoint of the
    layer stay outside. So the graph has plain tensors only, checkpoints compose, and no name in the model changes (no
    ``_orig_mod``). Layers of the same class share their graphs.

    Args:
        layers: the layers, after tensor parallelism and FSDP2 have been applied.
        policy: policy of the layers' checkpoints; None without checkpoints. A selective policy is put into the graph,
            where the compiler sees which results to save. With :data:`.activation_checkpointing.FULL` the checkpoint is
            around the compiled layer; the caller adds it, before or after this call.
        parts: modules inside of the layers are checkpointed. A layer's own gradient checkpointing (transformers) is
            found here; it is in the layer's forward, so inside of the graph.
        options: passed to ``torch.compile`` (``backend``, ``mode``, ``dynamic``, ``fullgraph``, ``options``).
    """
    in_graph = policy if policy is not None and policy.context_fn is not None else None
    # Under a checkpoint a layer has to be one graph; _OneGraph explains why and has the fallback.
    for layer in layers:
        make_traceable(layer)
        inside = parts or in_graph is not None or _checkpoints_itself(layer)
        one_graph = policy is not None or inside
        stack = ForwardStack.of(layer)
        if in_graph is not None:
            stack.push(ForwardSlot.GRAPH_CHECKPOINT, Checkpointed(in_graph))
            scope = stack.get(ForwardSlot.LOCAL_PARAMETERS)
            if isinstance(scope, LocalParamForward) and scope.shared is not None:
                # With sequence_parallel_regather, tracing warns about layers that are compiled without such a policy.
                scope.shared.compiler_regathers = True
        compiled_options = {**options, "fullgraph": True} if one_graph else options
        stack.push(ForwardSlot.COMPILE, _Compiled(compiled_options, inside, layer))
        if one_graph and not options.get("fullgraph"):
            eager = in_graph if in_graph is not None and in_graph.eager else None
            stack.push(ForwardSlot.GRAPH_FALLBACK, _OneGraph(stack, eager))


def apply_per_layer_compile(model: nn.Module, **options: Any) -> None:
    """Compile each layer of ``model`` in place, after sharding and checkpointing. No name in the model changes.

    Forward and backward of a layer are traced together, with gradients. Code that is compiled below a reentrant
    checkpoint would be traced without gradients, and its adapters would not train. A full checkpoint around a layer
    (of this package or torch's wrapper) stays outside of the graph. A selective one, and checkpoints of submodules, are
    compiled with the layer. Layers that are compiled already are skipped.

    Args:
        model: the model. Its layers are those of :func:`~.core.model_structure.model_layers`, modality encoders
            included.
        options: options of ``torch.compile``.

    Raises:
        UnsupportedError: the model has no layers, or a layer contains a reentrant checkpoint.
    """
    from .core.model_structure import model_layers

    compat.hash_specs_of_symbolic_shapes()
    for layer in model_layers(model):
        compile_finished_layer(layer, options)


def compile_finished_layer(layer: nn.Module, options: dict[str, Any]) -> None:
    """Compile one layer after sharding and checkpointing; see :func:`apply_per_layer_compile`."""
    wrapped = compat.checkpoint_wrapped_module(layer)
    if wrapped is not None and "context_fn" not in _keywords(layer.checkpoint_fn):
        compile_finished_layer(wrapped, {**options, "fullgraph": True})
        return
    stack = ForwardStack.of(layer)
    if ForwardSlot.GRAPH_FALLBACK in stack or is_compiled(layer):
        return
    checkpoint, scope = stack.get(ForwardSlot.CHECKPOINT), stack.get(ForwardSlot.LOCAL_PARAMETERS)
    policy = checkpoint.policy if isinstance(checkpoint, Checkpointed) else None
    inside = [module for module in layer.modules() if module is not layer]
    own = vars(layer).get("_gradient_checkpointing_func") if getattr(layer, "gradient_checkpointing", False) else None
    parts = own is not None or wrapped is not None or any(map(is_checkpoint_wrapped, inside))
    for function in (own, *(getattr(part, "checkpoint_fn", None) for part in (layer, *inside))):
        if _keywords(function).get("use_reentrant"):
            raise UnsupportedError(
                f"{type(layer).__name__} has a reentrant checkpoint inside of what would be compiled: its first "
                "forward runs without gradients, and the compiled graph would not train adapters. Use "
                "use_reentrant=False."
            )
    shared = scope.shared if isinstance(scope, LocalParamForward) else None
    if policy is None and not parts and shared is not None and shared.regather:
        policy = REGATHER  # replaces the saved-tensor hooks that repeat the all-gathers in uncompiled code
    if policy is not None and policy.context_fn is not None:
        stack.remove(ForwardSlot.CHECKPOINT)  # compile_layers adds it again, inside of the graph
    compile_layers([layer], policy, parts, **options)


def _keywords(function: Any) -> dict[str, Any]:
    """Return the keyword arguments that a ``functools.partial`` holds, also below a wrapper with ``function``."""
    function = getattr(function, "function", function)
    return dict(function.keywords) if isinstance(function, functools.partial) else {}


class _Compiled(ForwardWrapper):
    """A compiled forward.

    Args:
        options: options of ``torch.compile``.
        checkpoints_inside: the graph contains checkpoints. The forward then has a side effect inside of a checkpoint:
            it notes which inputs share a copy to TP. Dynamo breaks the graph there unless it skips side effects in the
            recomputation, which does not need the note.
        layer: the module. Its own gradient checkpointing may be switched on at any time.
    """

    def __init__(self, options: dict[str, Any], checkpoints_inside: bool, layer: nn.Module) -> None:
        self.options, self.checkpoints_inside, self.layer = options, checkpoints_inside, layer

    def wrap(self, inner: Forward) -> Forward:
        """Compile ``inner``."""
        compiled = torch.compile(inner, **self.options)

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not (self.checkpoints_inside or _checkpoints_itself(self.layer)):
                return compiled(*args, **kwargs)
            with compat.dynamo_side_effects_under_checkpoint():
                return compiled(*args, **kwargs)

        return call


def _checkpoints_itself(layer: nn.Module) -> bool:
    """True if transformers' gradient checkpointing is on: its checkpoint is in the layer's forward."""
    return bool(getattr(layer, "gradient_checkpointing", False))


class _OneGraph(ForwardWrapper):
    """The forward of a compiled and checkpointed layer. It runs uncompiled if it cannot be one graph.

    With graph breaks the compiler runs several graphs, and the recomputation may run others than the forward: eager
    code inside of a checkpoint, or graphs that were compiled meanwhile for data-dependent shapes. The checkpoint could
    then not match the tensors that the forward has saved.

    Args:
        stack: the forward stack of the layer.
        policy: policy of the checkpoint around the layer if it runs uncompiled; None without a checkpoint.
    """

    as_method = False

    def __init__(self, stack: ForwardStack, policy: SavePolicy | None) -> None:
        self.stack, self.policy = stack, policy
        self.compiled = True

    def wrap(self, inner: Forward) -> Forward:
        """Wrap ``inner``, with a checkpoint in between if the layer is not compiled."""
        if self.policy is not None and not self.compiled:
            inner = Checkpointed(self.policy).wrap(inner)
        return super().wrap(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.compiled:
            return self.inner(*args, **kwargs)
        try:
            return self.inner(*args, **kwargs)
        except compat.graph_break_type() as error:
            # Raised while tracing: nothing has run yet, and all ranks trace the same code, so all of them fall back.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "%s is not one graph (%s), which activation checkpointing needs: this layer runs uncompiled.",
            type(self.stack.module).__name__,
            reason,
        )
        self.compiled = False
        self.stack.remove(ForwardSlot.GRAPH_CHECKPOINT, ForwardSlot.COMPILE)
        return self.inner(*args, **kwargs)
