"""Plans as dicts of torch styles, selected as NeMo AutoModel's functions of the same names select them.

Everything here is the plan that :mod:`selection` finds, in another form; this package's own engine takes either.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from ..core.model_structure import find_structure
from ..core.model_view import ModelView
from ..core.sharding_spec import PlanEntry
from ..errors import PlanAssertionError, PlanError, UnsupportedError
from .patterns import pattern_regex
from .select import select_plan
from .sources.huggingface import huggingface_plan
from .sources.llama_like import llama_like_plan
from .torch_styles import translate_to_torch_parallel_style

logger = logging.getLogger(__name__)

TorchPlan = dict[str, ParallelStyle]

#: The order in which NeMo AutoModel asks: plans written for one class before the one that a model brings along.
_ORDER = ("registry", "hf", "default")


def get_hf_tp_shard_plan(model: nn.Module) -> TorchPlan:
    """The plan that a Hugging Face model brings along, as torch styles.

    Merged from the ``_tp_plan`` of its classes, configs and instances and of every model inside of it, each under its
    path (see :func:`hf.huggingface_plan`); the input embedding is added where no entry names it. Entries may name
    parameters (expert weights), and a style without a counterpart in torch is a :class:`torch_styles.NamedStyle`.

    Args:
        model: any transformers model, plain or PEFT-wrapped, on any device including meta. It is only read.

    Returns:
        Path below the unwrapped model, ``*`` for any one component -> a style object of its own.

    Raises:
        PlanAssertionError: (a ``ValueError`` and an ``AssertionError``) no part of the model has a plan.
        PlanError: a style of the plan is unknown, or of expert parallelism.
    """
    inner = ModelView.of(model).inner
    entries = huggingface_plan(inner)
    if not entries:
        raise PlanAssertionError(
            f"no tensor-parallel plan: neither {type(inner).__name__} nor a model in it has a _tp_plan, and no config "
            f"a base_model_tp_plan. Give the class one, or pass a dict as tp_shard_plan."
        )
    return _translated(entries.values())


def get_parallel_plan(
    model: nn.Module,
    sequence_parallel: bool = False,
    tp_shard_plan: Mapping[str, Any] | str | None = None,
    tp_size: int = 1,
) -> TorchPlan:
    """Select the tensor-parallel plan for ``model``: the given one, else the registry's, the model's own, the default
    plan.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        sequence_parallel: lay norms and residual activations out along the sequence, too. Applied to selected plans; a
            dict is what the caller says it is.
        tp_shard_plan: a dict, which is returned itself; or the name of a plan, a callable, or the import path of a dict
            or a callable (function, partial, object; called with the model if it takes an argument).
        tp_size: number of ranks on the tp axis; with one rank nothing is carried out and a plan is not required to be
        usable.

    Raises:
        PlanError: (a ``ValueError``) a given plan cannot be read; or no source has a usable plan, where the message
            lists what to do and, as a ``Note:``, why each source was passed over.
        UnsupportedError: (a ``ValueError``) ``sequence_parallel`` cannot be derived for this model.
    """
    if isinstance(tp_shard_plan, dict):
        return tp_shard_plan
    try:
        entries = select_plan(model, tp_shard_plan, _ORDER).entries
    except PlanError as error:
        if tp_size > 1 or tp_shard_plan is not None:
            raise
        logger.info("tp_size=1, so the default plan stands for none: %s", error)
        entries = llama_like_plan("default plan")
    plan = _translated(entries.values())
    if sequence_parallel and tp_size > 1:
        plan = along_the_sequence(model, plan)
    return plan


def _translated(entries: Iterable[PlanEntry]) -> TorchPlan:
    plan: TorchPlan = {}
    for entry in entries:
        try:
            plan[entry.pattern] = (
                translate_to_torch_parallel_style(entry.style) if isinstance(entry.style, str) else entry.style
            )
        except PlanError as error:
            raise PlanError(f"the plan entry {entry.pattern!r} [{entry.source}]: {error}") from error
    return plan


# ---- sequence parallelism -----------------------------------------------------------------------------------------


def along_the_sequence(model: nn.Module, plan: TorchPlan) -> TorchPlan:
    """``plan`` with activations between the sharded blocks laid out along the sequence (dimension 1).

    Derived from the module tree, after Korthikanti et al. (2022, arXiv:2205.05198): the norms of layers and the final
    one run on their rank's part of the sequence, column-wise layers read it whole, row-wise layers and the embedding
    leave it sharded. These activations are DTensors, so that models read the length of the whole sequence from them.

    Args:
        model: a text model with repeated layers.
        plan: its plan, as torch styles. It and its styles are only read.

    Raises:
        UnsupportedError: the layout cannot be seen to be right, with the part of the model for which it cannot.
    """
    inner = ModelView.of(model).inner
    structure = find_structure(model)
    names = {module: name for name, module in inner.named_modules()}
    layers = [names[layer] for layer in structure.layers if layer in names]
    ends = {names[m] for m in (structure.embedding, *structure.head) if m is not None}
    result: TorchPlan = {}
    covered: set[str] = set()
    for pattern, style in plan.items():
        regex = pattern_regex(pattern)
        hits = [name for name in names.values() if regex.fullmatch(name)]
        covered.update(hits)
        in_layers = [name for name in hits if _inside(name, layers)]
        if hits and (in_layers == hits or set(hits) <= ends):
            result[pattern] = _laid_out(pattern, style, isinstance(inner.get_submodule(hits[0]), nn.Embedding))
        elif hits or any(regex.fullmatch(name) for name, _ in inner.named_parameters()):
            raise _not_derivable(inner, f"the plan entry {pattern!r} is neither of its layers nor of its two ends")
    for name in ends & {n for n, m in inner.named_modules() if any(p.ndim > 1 for p in m.parameters())}:
        if name not in covered:
            raise _not_derivable(inner, f"the plan does not shard {name}")
    norms = [names[m] for m in structure.head if all(p.ndim == 1 for p in m.parameters())]
    for layer in layers:
        own = [f"{layer}.{name}" for name, child in inner.get_submodule(layer).named_children() if _is_norm(child)]
        if not own:
            raise _not_derivable(inner, f"{layer} has no norm of its own")
        norms += own
    if not layers or not any(name in ends for name in norms):
        raise _not_derivable(inner, "it has no layers with a final norm behind them")
    others = [n for n, m in inner.named_modules() if _is_norm(m) and n not in norms and not _inside(n, layers)]
    if others:
        raise _not_derivable(inner, f"{others[0]} is a norm in front of or beside its layers")
    for name in norms:
        result.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), SequenceParallel())
    return result


def _laid_out(pattern: str, style: ParallelStyle, is_table: bool) -> ParallelStyle:
    whole, features, sequence = (Replicate(),), (Shard(-1),), Shard(1)
    if type(style) is ColwiseParallel and style.input_layouts == whole and not is_table:
        (output,) = style.output_layouts
        return ColwiseParallel(input_layouts=sequence, output_layouts=output, use_local_output=style.use_local_output)
    reads = (whole,) if is_table else (whole, features)
    if type(style) is RowwiseParallel and style.input_layouts in reads and style.output_layouts == whole:
        (read,) = style.input_layouts
        return RowwiseParallel(input_layouts=read, output_layouts=sequence, use_local_output=False)
    if getattr(style, "style_name", None) == "replicated_with_grad_allreduce":
        return style  # between sharded projections, where the sequence is whole
    raise UnsupportedError(
        f"sequence_parallel=True: how the plan entry {pattern!r} ({style!r}) meets activations that are sharded along "
        f"the sequence cannot be derived. Use sequence_parallel=False, or write the plan as a dict."
    )


def _inside(name: str, layers: list[str]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in parameters)


def _not_derivable(inner: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"sequence_parallel=True cannot be derived for {type(inner).__name__}: {reason}. Use sequence_parallel=False, "
        f"or write the plan as a dict."
    )
