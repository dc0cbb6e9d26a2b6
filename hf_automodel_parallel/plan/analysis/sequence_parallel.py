"""Sequence parallelism, derived from a resolved tensor-parallel plan and the module tree.

The layers are run once on fake tensors (:mod:`sequence_check`). The operators of that run decide, not names:

* A called module of a layer with something sharded inside is a *block* and works on the full sequence; so does a
  module that does not keep tokens apart (a replicated mixer). Everything else of the layer works on sequence shards.
* A row-wise linear reduce-scatters along the sequence if all later operators in the block are per-token; otherwise it
  all-reduces, and the block's output is split. Experts, whose output is a flat list of tokens, and routers stay as they
  are under tensor parallelism.
* A replicated parameter that is applied to sequence shards gets a ``Partial`` gradient.

A layer that combines tokens outside of all blocks is refused by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ... import compat
from ...core.model_view import ModelView, layer_pattern, plan_name
from ...core.sharding_spec import ON_SEQUENCE_SHARDS, REPLICATED, OutputHook, Plan, SequenceSpec, ShardingSpec
from ...errors import ConfigError, UnsupportedError
from .sequence_check import REMEDY, Found, SequenceCheck

_SOURCE = "derived: sequence parallelism"


def derive(model: nn.Module | ModelView, spec: ShardingSpec, layers: list[nn.Module]) -> None:
    """Add sequence parallelism to a resolved plan, in place.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        spec: its resolved tensor-parallel plan.
        layers: the repeated layers in forward order.

    Raises:
        UnsupportedError: a layer cannot work on sequence shards; the message names the module and what it does.
    """
    view = ModelView.of(model)
    model = view.model
    names = {module: name for name, module in model.named_modules()}
    stack, stack_layers = _stack(view, spec, layers, names)
    found = SequenceCheck(model, spec, stack, stack_layers, names).run()
    _check_one_layer_each(model, (*found.blocks, *spec.modules), stack_layers, names)
    for name, reason in found.reasons.items():
        if name in found.blocks:
            spec.notes.append(f"{name} gets the full sequence, and its output is split ({reason}).")
    on_sequence_shards = _parameters_on_sequence_shards(view, spec, found)
    for name in found.scatters:
        module = replace(spec.modules[name], output=OutputHook.REDUCE_SCATTER_SEQUENCE)
        spec.modules[name] = module
        if module.deferred_bias is not None:
            on_sequence_shards.add(".".join(part for part in (name, module.deferred_bias, "bias") if part))
    for name in on_sequence_shards:
        spec.parameters[name] = ON_SEQUENCE_SHARDS
    owners = {_wrapper(model, name.rpartition(".")[0]) for name in on_sequence_shards}
    spec.sequence = SequenceSpec(
        names[stack],
        tuple(names[layer] for layer in stack_layers),
        found.blocks,
        found.tail,
        frozenset(o for o in owners if not any(o == n or o.startswith(f"{n}.") for n in found.scatters)),
    )
    _describe(spec, view.prefix)


def _wrapper(model: nn.Module, path: str) -> str:
    """``path``, or the path of the PEFT layer around it, to which adapters that are added later belong."""
    kinds = compat.peft_wrapper_types()
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if kinds and isinstance(model.get_submodule(above), kinds):
            return above
    return path


def carry_over(old: ShardingSpec, new: ShardingSpec, names: list[str]) -> None:
    """Give parameters ``names``, added to a model with the spec ``old``, their placements in the ``new`` spec, in
    place; it also gets what a run of the layers showed.
    """
    new.varying = old.varying
    if old.sequence is None:
        return
    new.sequence = old.sequence
    for name in names:
        if name not in new.parameters and any(name.startswith(f"{owner}.") for owner in old.sequence.on_shards):
            new.parameters[name] = ON_SEQUENCE_SHARDS


def refuse_kept_activations(plan: Plan, spec: ShardingSpec) -> None:
    """Raise :class:`UnsupportedError` if forwards of layers leave sequence shards on their modules for other code.

    Blocks (attention, MLP) work on the full sequence, so what they leave is complete.
    """
    blocks = {layer_pattern(name) for name in (spec.sequence.blocks if spec.sequence is not None else ())}
    inside = [name for name in plan.kept if "*" in name and not any(name.startswith(f"{block}.") for block in blocks)]
    if inside:
        raise UnsupportedError(
            f"sequence_parallel=True: the forward leaves activations in {', '.join(inside[:4])}"
            f"{', ...' if len(inside) > 4 else ''}, where other code would find this rank's sequence shard. Return "
            f"them as an output of the model, or use sequence_parallel=False."
        )


def regather(model: nn.Module | ModelView, spec: ShardingSpec, checkpointing: str) -> None:
    """Let blocks re-all-gather their inputs in backward, in place (``sequence_parallel_regather``).

    Raises:
        ConfigError: ``checkpointing`` is a mode that recomputes the all-gather, or the model's own checkpointing is on.
    """
    inner = ModelView.of(model).inner
    if checkpointing not in ("none", "selective"):
        raise recomputes_anyway(f"activation_checkpointing={checkpointing!r}")
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        raise recomputes_anyway("the model's own gradient checkpointing")
    spec.sequence = replace(spec.sequence, regather=checkpointing == "none")  # type: ignore[type-var]


def recomputes_anyway(what: str) -> ConfigError:
    """The error for activation checkpointing that already recomputes the all-gather."""
    return ConfigError(
        f"sequence_parallel_regather=True with {what}: its recomputation already all-gathers the inputs of attention "
        "and MLP again, and keeps only their sequence shards. Leave out one of the two; "
        "activation_checkpointing='selective' works with it."
    )


def _stack(
    view: ModelView, spec: ShardingSpec, layers: list[nn.Module], names: dict[nn.Module, str]
) -> tuple[nn.Module, list[nn.Module]]:
    """The module that runs the sharded layers, and these."""
    model, inner = view.model, view.inner
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"sequence_parallel=True: {type(inner).__name__} is an encoder-decoder model, which is not supported. "
            f"{REMEDY}"
        )
    groups: dict[str, list[nn.Module]] = {}
    for layer in layers:
        if any(name.startswith(f"{names[layer]}.") for name in (*spec.modules, *spec.parameters)):
            groups.setdefault(names[layer].rpartition(".")[0], []).append(layer)
    embedding = compat.input_embedding_module(inner)

    def weight(container: str) -> tuple[bool, int]:
        owner = model.get_submodule(container.rpartition(".")[0])
        return any(m is embedding for m in owner.modules()), sum(p.numel() for p in owner.parameters())

    if not groups:
        raise UnsupportedError(
            f"sequence_parallel=True: the plan shards nothing inside of the layers of {type(inner).__name__}, so there "
            f"is nothing to gather a sequence for. {REMEDY}"
        )
    container = max(groups, key=weight)
    others = [m for m in model.get_submodule(container).children() if m not in layers]
    if others:
        raise UnsupportedError(
            f"sequence_parallel=True: {names[others[0]]} ({type(others[0]).__name__}) is in {container} among the "
            f"layers, but is not one of them. {REMEDY}"
        )
    owner = container
    while owner and not compat.has_implemented_forward(model.get_submodule(owner)):
        owner = owner.rpartition(".")[0]
    every = [layer for layer in model.get_submodule(container).children() if layer in layers]
    stack = model.get_submodule(owner)
    between = _lists_of_tensors(stack)
    if between:
        raise UnsupportedError(
            f"sequence_parallel=True: {owner or 'the model'} ({type(stack).__name__}) takes {between[0]}, a list of "
            "tensors with one for each of some layers. Its code between the layers combines them with full sequences. "
            f"{REMEDY}"
        )
    return stack, every


def _check_one_layer_each(
    model: nn.Module, names_with_hooks: Iterable[str], layers: list[nn.Module], names: dict[nn.Module, str]
) -> None:
    """Raise for a block, or a module with TP hooks, that several layers share: their state belongs to one layer."""
    around: dict[nn.Module, list[nn.Module]] = {}
    for layer in layers:
        for module in layer.modules():
            around.setdefault(module, []).append(layer)
    for name in names_with_hooks:
        module = model.get_submodule(name)
        if len(among := around.get(module, [])) > 1:
            raise UnsupportedError(
                f"sequence_parallel=True: {name} ({type(module).__name__}) is one module in {names[among[0]]} and "
                f"{names[among[1]]}. Give each layer its own (parameters may be tied). {REMEDY}"
            )


def _lists_of_tensors(stack: nn.Module) -> list[str]:
    """The arguments of the forward of ``stack`` that are annotated as lists of tensors, except caches."""
    parameters = inspect.signature(stack.forward).parameters.values()
    return [
        p.name
        for p in parameters
        if re.search(r"\blist\[[^\]]*Tensor", str(p.annotation), re.IGNORECASE) and p.name != "past_key_values"
    ]


def _parameters_on_sequence_shards(view: ModelView, spec: ShardingSpec, found: Found) -> set[str]:
    """Names of the replicated parameters that are applied to sequence shards, each under all of its names."""
    result: set[str] = set()
    for name, lengths in found.used.items():
        if "shard" not in lengths:
            continue
        if len(lengths) > 1 or spec.parameters.get(name, REPLICATED).dim is not None:
            how = "sequence shards and full sequences" if len(lengths) > 1 else "sequence shards and is sharded"
            raise UnsupportedError(f"sequence_parallel=True: the parameter {name} is applied to {how}. {REMEDY}")
        result.update(view.names_of[view.parameters[name]])
    # Only the active adapter or copy has run; another one of the same wrapper may be activated later.
    for name, wrapper in view.peft_layers.items():
        if any(p.startswith(f"{name}.") for p in result):
            result.update(f"{name}.{key}" for key, _ in wrapper.named_parameters(remove_duplicate=False))
    return result


def _describe(spec: ShardingSpec, prefix: str) -> None:
    """Rows of the table for people."""
    sequence: SequenceSpec = spec.sequence  # type: ignore[assignment]
    lines: dict[tuple[str, str, str], int] = {}

    def add(name: str, style: str, placement: str = "activations") -> None:
        key = (plan_name(name, prefix), style, placement)
        lines[key] = lines.get(key, 0) + 1

    def add_all(name: str, style: str, placement: str = "activations") -> None:
        add(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), style, placement)

    add(sequence.layers[0], "split sequence (input)")
    for name, block in sequence.blocks.items():
        styles = ["gather sequence (input)"] * block.gathers + ["split sequence (output)"] * block.scatters
        if styles:
            add_all(name, ", ".join(styles))
    for name, module in spec.modules.items():
        if module.output is OutputHook.REDUCE_SCATTER_SEQUENCE:
            add_all(name, "scatter sequence (output)")
    add(sequence.tail, "gather sequence (output)")
    for name in sorted(sequence.on_shards):
        add_all(name, "on sequence shards", str(ON_SEQUENCE_SHARDS))
    spec.rows += [(name, style, count, placement, _SOURCE) for (name, style, placement), count in lines.items()]
