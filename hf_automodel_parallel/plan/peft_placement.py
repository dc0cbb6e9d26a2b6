"""Where the parameters of PEFT's adapters live on the tp axis: one table, and the functions that apply it.

An adapter runs between the tp input hook and the tp output hook of its base layer. Everything in between is linear, so
an adapter adds no collective: it reads the same input as the base layer, and its output is added before the base
layer's all-reduce or all-gather. The sharded side of the base weight decides the placement:

* column-wise (``colwise``: output features sharded): each rank computes its output features from the full input. A
  factor that reads the input is replicated, but its gradient on a rank comes from this rank's output features alone:
  ``Partial``.
* row-wise (``rowwise``: input features sharded): each rank computes a ``Partial`` output from its input features. A
  factor behind the contraction works on a ``Partial`` activation. Its output is correct after the all-reduce, and so is
  its gradient: ``Partial``. A bias there must be added once.

======================  ================================  =======================================
parameter               column-wise base layer            row-wise base layer
======================  ================================  =======================================
``lora_A`` (r, in)      Replicate, Partial gradient       Shard(1)
``lora_B`` (out, r)     Shard(0)                          Replicate, Partial gradient
bias of ``lora_B``      Shard(0)                          Replicate, added on tp rank 0 only
DoRA magnitude (out,)   Shard(0)                          Replicate, Partial gradient; the weight
                                                          norm is reduced over tp
IA3 on inputs (1, in)   Replicate, Partial gradient       Shard(1)
IA3 on outputs (out,)   Shard(0)                          Replicate, Partial gradient
======================  ================================  =======================================

The table also serves LoRA on bare parameters (``target_parameters``, expert weights): there "out" and "in" are the two
matrix dimensions of each expert. LoRA on an embedding is replicated, while the embedding itself is sharded.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..core.sharding_spec import (
    PARTIAL_GRADIENT,
    RANK_ZERO_ONLY,
    InputHook,
    ModuleSpec,
    OutputHook,
    ParameterSpec,
    ShardingSpec,
)
from ..errors import UnsupportedError
from .layer_kinds import check_adapter, parameter_adapter_out_dim

SHARD_0, SHARD_1 = ParameterSpec(0), ParameterSpec(1)

# fmt: off
#: Parameter -> its placement beside a column-wise and beside a row-wise base layer.
PLACEMENTS: dict[str, tuple[ParameterSpec, ParameterSpec]] = {
    #                   column-wise        row-wise
    "lora_A":          (PARTIAL_GRADIENT,  SHARD_1),
    "lora_B":          (SHARD_0,           PARTIAL_GRADIENT),
    "lora_B bias":     (SHARD_0,           RANK_ZERO_ONLY),
    "DoRA magnitude":  (SHARD_0,           PARTIAL_GRADIENT),
    "IA3 on inputs":   (PARTIAL_GRADIENT,  SHARD_1),
    "IA3 on outputs":  (SHARD_0,           PARTIAL_GRADIENT),
}
# fmt: on

#: The parameters with one number for each output feature.
_FEATURE_VECTORS = ("lora_B bias", "DoRA magnitude", "IA3 on outputs")


def placement(parameter: str, side: str, blocks: int, tp_size: int) -> ParameterSpec:
    """Look up :data:`PLACEMENTS`.

    Args:
        parameter: a key of the table.
        side: the sharded side of the base weight: "out" (column-wise) or "in" (row-wise).
        blocks: number of projections packed along that side.
        tp_size: number of ranks on the tp axis.

    Returns:
        The placement of the parameter and of its gradient on the tp axis.
    """
    spec = PLACEMENTS[parameter][0 if side == "out" else 1]
    if spec.dim is None:
        return spec
    return feature_vector(blocks, tp_size) if parameter in _FEATURE_VECTORS else replace(spec, blocks=blocks)


def feature_vector(blocks: int, tp_size: int) -> ParameterSpec:
    """Placement of a vector with one number for each sharded output feature, such as a bias.

    A vector of packed projections stays replicated, and each rank computes with its slice of each block. Sharded in
    blocks along its only dimension, it would have no dimension left for FSDP2.
    """
    if blocks == 1:
        return SHARD_0
    return ParameterSpec(None, blocks, partial_gradient=True, forward_shard_dim=0, forward_shards=tp_size)


def place_adapter(spec: ShardingSpec, name: str, adapter: nn.Module, side: str, blocks: int, tp_size: int) -> None:
    """Add the parameters of the LoRA, DoRA or IA3 layer ``adapter`` around a sharded base layer to ``spec``.

    Args:
        spec: has the module spec of ``name`` already.
        name: name of the adapter, which is also the base layer's name in a plan.
        adapter: PEFT's layer.
        side, blocks, tp_size: as for :func:`placement`.

    Raises:
        UnsupportedError: IA3 would have to scale a bias that is added after the all-reduce.
    """
    if hasattr(adapter, "ia3_l"):
        _place_ia3(spec, name, adapter, side, blocks, tp_size)
        return
    for key in adapter.lora_A:  # type: ignore[union-attr]
        spec.parameters[f"{name}.lora_A.{key}.weight"] = placement("lora_A", side, blocks, tp_size)
        spec.parameters[f"{name}.lora_B.{key}.weight"] = placement("lora_B", side, blocks, tp_size)
        if getattr(adapter.lora_B[key], "bias", None) is not None:  # type: ignore[index,union-attr]
            spec.parameters[f"{name}.lora_B.{key}.bias"] = placement("lora_B bias", side, blocks, tp_size)
    for key in getattr(adapter, "lora_magnitude_vector", {}):
        magnitude = f"{name}.lora_magnitude_vector.{key}"
        spec.parameters[f"{magnitude}.weight"] = placement("DoRA magnitude", side, blocks, tp_size)
        if side == "in":
            spec.reduced_dora_norms.append(magnitude)


def _place_ia3(spec: ShardingSpec, name: str, adapter: nn.Module, side: str, blocks: int, tp_size: int) -> None:
    # A deferred bias is added after the all-reduce, so behind IA3, which scales the output including the bias.
    if not adapter.is_feedforward and spec.modules[name].deferred_bias is not None:
        raise UnsupportedError(
            f"{name} has a bias and is row-wise; IA3 on its output would have to scale the bias too, which is added "
            "after the all-reduce. List it in feedforward_modules, exclude it from target_modules, or use tp_size=1."
        )
    parameter = "IA3 on inputs" if adapter.is_feedforward else "IA3 on outputs"
    for key in adapter.ia3_l:  # type: ignore[union-attr]
        spec.parameters[f"{name}.ia3_l.{key}"] = placement(parameter, side, blocks, tp_size)


def place_parameter_adapters(model: nn.Module, spec: ShardingSpec, name: str, tp_size: int) -> None:
    """Add LoRA on the bare parameter ``name`` (PEFT's ``target_parameters``), if there is any, to ``spec``.

    The wrappers are nested, one for each adapted parameter of a module. The parameter's own spec is there already.
    """
    base = spec.parameters[name]
    # Nested wrappers adapt one parameter each; those with another `parameter_name` are not for `leaf`.
    owner, _, leaf = name.rpartition(".")
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
        adapter = model.get_submodule(owner)
        if getattr(adapter, "parameter_name", None) == leaf and base.dim is not None:
            check_adapter(owner, adapter)
            side = "out" if base.dim == parameter_adapter_out_dim(adapter) else "in"
            place_adapter(spec, owner, adapter, side, base.blocks, tp_size)


def place_trained_rows(
    spec: ShardingSpec, name: str, adapter: nn.Module, base_name: str, base: nn.Module, tp_size: int
) -> str:
    """Shard a table some of whose rows are trained (``trainable_token_indices``), or the head that is tied to it.

    PEFT replaces rows by their index in the full vocabulary, so the table is sharded on the hidden dimension.

    Returns:
        The placement, for the plan table.
    """
    hidden = base.weight.shape[1]  # type: ignore[union-attr,index]
    if hidden % tp_size:
        spec.notes.append(f"{name}: {hidden} features do not divide by tp_size={tp_size}; replicated.")
        return "Replicate"
    spec.parameters[f"{base_name}.weight"] = SHARD_1
    for key in adapter.trainable_tokens_delta:  # type: ignore[union-attr]
        spec.parameters[f"{name}.trainable_tokens_delta.{key}"] = SHARD_1
    is_table = isinstance(base, nn.Embedding)
    spec.modules[name] = (
        ModuleSpec(output=OutputHook.GATHER) if is_table else ModuleSpec(InputHook.SCATTER, OutputHook.REDUCE_FROM_TP)
    )
    return f"{SHARD_1} (rows are trained)"
