"""Per-layer ``torch.compile``, in place, after everything else: only the arithmetic of a layer is inside the graph."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from . import compat
from .activation_checkpointing import Checkpointed, Contexts, gathering_contexts, is_checkpoint_wrapped
from .errors import UnsupportedError
from .fsdp.dtype_groups import GroupedForward
from .tensor_parallel.local_parameters import LocalParamForward

logger = logging.getLogger(__name__)

#: Marks a layer that :func:`compile_layers` has compiled, wherever that now is inside of its forward.
_MARK = "_compiled_as_layer"


def compile_layers(
    layers: list[nn.Module], checkpointing: str = "none", keep: Contexts | None = None, **options: Any
) -> None:
    """Compile the forward of each layer, in place.

    What is compiled is the ``forward``, not the module: FSDP2's hooks, the exchange of DTensors for local tensors and
    an activation checkpoint around the layer stay outside, so the graph holds plain tensors, checkpoints compose, and
    no name in the model changes (no ``_orig_mod``). Layers of one class share their graphs.

    Args:
        layers: the layers, after tensor parallelism and FSDP2 have been applied.
        checkpointing: "submodule": parts of the layers are checkpointed already, inside of what is compiled. "full": a
            checkpoint will be put around the layers. "selective", "none".
        keep: except with "full", put a selective checkpoint inside of what is compiled, where the compiler sees which
            operators it has to keep; see :class:`.activation_checkpointing.Checkpointed`.
        options: passed to ``torch.compile`` (``backend``, ``mode``, ``dynamic``, ``fullgraph``, ``options``).
    """
    for layer in layers:
        setattr(layer, _MARK, True)
        for adapter in layer.modules():
            _make_dora_traceable(adapter)
        forward = layer.forward
        region = forward if isinstance(forward, LocalParamForward) else None
        body: Callable[..., Any] = forward if region is None else region.body
        whole = checkpointing != "none" or keep is not None
        compiled_options = {**options, "fullgraph": True} if whole else options
        compiled = torch.compile(body if keep is None else Checkpointed(body, keep), **compiled_options)
        if checkpointing == "submodule" or keep is not None:
            compiled = _with_checkpoints_inside(compiled)
        if region is None:
            layer.forward = compiled  # type: ignore[method-assign]
        else:
            region.body = compiled
            if keep is not None and region.shared is not None:
                region.shared.told_compiler = True
        if whole and not options.get("fullgraph"):
            eager = keep if checkpointing == "selective" else None
            layer.forward = _OneGraph(layer, body, region, eager)  # type: ignore[method-assign]


def apply_per_layer_compile(model: nn.Module, **options: Any) -> None:
    """Compile every layer of ``model``, in place, after it has been sharded and checkpointed; names do not change.

    At the granularity of layers, so that forward and backward of a layer are traced together, with gradients: a part
    that is compiled below a reentrant checkpoint would be traced without, and its adapters would not train. A
    checkpoint around a layer (ours or torch's wrapper) stays around what is compiled; a selective one, and those around
    parts of a layer, are compiled with it. Layers that are compiled already are left alone.

    Args:
        model: the model; every tower, see :func:`layers.model_layers`.
        options: of ``torch.compile``.

    Raises:
        UnsupportedError: no layers are found, or a reentrant checkpoint lies inside of one.
    """
    from .core.model_structure import model_layers

    compat.hash_specs_of_symbolic_shapes()
    for layer in model_layers(model):
        compile_finished_layer(layer, options)


def compile_finished_layer(layer: nn.Module, options: dict[str, Any]) -> None:
    """Compile one layer that has been sharded and checkpointed, see :func:`apply_per_layer_compile`."""
    wrapped = compat.checkpoint_wrapped_module(layer)
    if wrapped is not None and "context_fn" not in _keywords(layer.checkpoint_fn):
        compile_finished_layer(wrapped, {**options, "fullgraph": True})
        return
    if hasattr(layer, _MARK) or compat.is_compiled(layer):
        return
    put_back: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = []
    forward: Callable[..., Any] = layer.forward
    mode, keep = "none", None
    while True:  # from the outside in, see the order of the steps in strategies/default.py
        owner = getattr(forward, "__self__", None)
        if isinstance(forward, GroupedForward):
            put_back.append(forward.put_inside)
            forward = forward.inside
        elif isinstance(owner, Checkpointed) and owner.keep is None:
            mode = "full"
            put_back.append(owner.put_inside)
            forward = owner.forward
        elif isinstance(owner, Checkpointed):
            mode, keep = "selective", owner.keep
            forward = owner.forward
        else:
            break
    if isinstance(getattr(forward, "__self__", None), LocalParamForward):
        forward = forward.__self__  # type: ignore[attr-defined]
    parts = [module for module in layer.modules() if module is not layer]
    if mode == "none" and (wrapped is not None or any(map(is_checkpoint_wrapped, parts))):
        mode = "submodule"
    own = (
        layer.__dict__.get("_gradient_checkpointing_func") if getattr(layer, "gradient_checkpointing", False) else None
    )
    if own is not None:
        mode = "submodule"
    for checkpoint in (own, *(getattr(part, "checkpoint_fn", None) for part in (layer, *parts))):
        if _keywords(checkpoint).get("use_reentrant"):
            raise UnsupportedError(
                f"{type(layer).__name__} has a reentrant checkpoint inside of what would be compiled: its first "
                "forward runs without gradients, and the compiled graph would not train adapters. Use "
                "use_reentrant=False."
            )
    if (
        mode == "none"
        and isinstance(forward, LocalParamForward)
        and forward.shared is not None
        and forward.shared.regather
    ):
        keep = gathering_contexts  # until now hooks did it
    layer.forward = forward  # type: ignore[method-assign]
    compile_layers([layer], mode, keep, **options)
    for function in reversed(put_back):
        layer.forward = function(layer.forward)  # type: ignore[method-assign]


def _keywords(function: Any) -> dict[str, Any]:
    """What a partial function (or a wrapper of one that names it) is called with."""
    function = getattr(function, "function", function)
    return dict(function.keywords) if isinstance(function, functools.partial) else {}


class _OneGraph:
    """The forward of a layer that is compiled and checkpointed; uncompiled where it cannot be one graph.

    If the compiler breaks the graph, it runs pieces, and may run other pieces in the recomputation than in the forward
    (inside of a checkpoint eagerly; around data-dependent shapes those that were compiled meanwhile). What the forward
    saved would then not be found again.

    Args:
        layer: the layer, its forward compiled.
        body: what was compiled, as it was before.
        region: the region around it, if any.
        keep: of the selective checkpoint that the layer needs around it where it is not compiled; None: none.
    """

    def __init__(
        self, layer: nn.Module, body: Callable[..., Any], region: LocalParamForward | None, keep: Contexts | None
    ) -> None:
        functools.update_wrapper(self, layer.forward)  # first: it copies attributes
        self.forward: Callable[..., Any] = layer.forward
        self.body, self.region, self.keep = body, region, keep
        self.kind = type(layer).__name__
        self.compiled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.compiled:
            return self.forward(*args, **kwargs)
        try:
            return self.forward(*args, **kwargs)
        except compat.graph_break_type() as error:
            # Raised while tracing: nothing has run yet, and the other ranks trace the same code.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "%s is not one graph (%s), which activation checkpointing needs: this layer runs uncompiled.",
            self.kind,
            reason,
        )
        self.compiled = False
        if self.region is not None:
            self.region.body = self.body
        self.forward = self.region or self.body
        if self.keep is not None:
            self.forward = Checkpointed(self.forward, self.keep)
        return self.forward(*args, **kwargs)


def _make_dora_traceable(adapter: nn.Module) -> None:
    """Replace the forward of PEFT's DoRA on this one layer by the same computation without a graph break.

    PEFT (0.21) asks for the *name of the type* of the weight in every forward, to see whether it is quantised, and
    dynamo cannot trace that question. Asked once here instead; a quantised weight keeps PEFT's code.
    """
    base = getattr(adapter, "base_layer", None)
    plain = type(getattr(base, "weight", None)) in (nn.Parameter, torch.Tensor, DTensor)
    if isinstance(base, nn.Linear) and plain and base.weight.is_floating_point():
        for magnitude in getattr(adapter, "lora_magnitude_vector", {}).values():
            if type(magnitude) is compat.peft_dora_layer_type():
                magnitude.forward = functools.partial(_dora, magnitude)  # type: ignore[attr-defined]


def _dora(
    magnitude: Any,
    x: torch.Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: nn.Linear,
    base_result: torch.Tensor | None = None,
    adapter_name: str = "default",
) -> torch.Tensor:
    """What DoRA adds to the base layer's output: ``m / |W + s B A|`` times (base + adapter), minus the base.

    Args:
        magnitude: PEFT's layer with the vector m (out_features) and its two methods for the weights.
        x: (..., in_features), after dropout.
        base_result: the base layer's output where there is no dropout, else None.

    Returns:
        (..., out_features); the bias is not scaled.
    """
    names = {"adapter_name": adapter_name}
    update = magnitude.get_lora_weight(lora_A=lora_A, lora_B=lora_B, **names).detach().to(x.dtype)
    weight = base_layer.weight.to(x.dtype)
    norm = magnitude.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling, **names).detach()
    scale = magnitude.weight / norm
    if base_result is None:
        base_result = F.linear(x, weight)
    elif base_layer.bias is not None:
        base_result = base_result - base_layer.bias
    return (scale - 1) * base_result + scale * scaling * lora_B(lora_A(x))


def _with_checkpoints_inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``function`` where the compiler accepts a checkpointed region that notes something outside of it.

    The only such note is which inputs share a boundary; the recomputation need not take it again.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with compat.dynamo_side_effects_under_checkpoint():
            return function(*args, **kwargs)

    return call
