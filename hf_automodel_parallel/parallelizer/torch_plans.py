"""The reference API's plans: dicts of torch ``ParallelStyle`` objects, selected in NeMo AutoModel's order of sources.

:func:`~hf_automodel_parallel.plan.select.select_plan` gives the entries; their style names are translated to torch's
styles. The package itself accepts plans in both forms.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from .. import compat
from ..core.model_structure import find_structure, layer_groups
from ..core.model_view import ModelView, pattern_regex
from ..core.sharding_spec import PlanEntry
from ..errors import PlanAssertionError, PlanError, UnsupportedError
from ..plan.select import select_plan
from ..plan.sources.huggingface import huggingface_plan
from ..plan.sources.llama_like import llama_like_plan
from ..plan.styles import KNOWN_STYLES, REFUSED_STYLES, check_style, is_style_name
from ..tensor_parallel.grad_sync import sum_gradients

logger = logging.getLogger(__name__)

TorchPlan = dict[str, ParallelStyle]

#: NeMo AutoModel's order of sources: plans written for one class before the model's own.
_ORDER = ("registry", "hf", "default")

#: The style of a replicated parameter whose gradient is Partial (``q_norm``, ``k_norm``).
_SUMMED = "replicated_with_grad_allreduce"
#: Style names of expert parallelism in plans of transformers 4: without them the experts are replicated.
_OF_EXPERTS = ("local_colwise", "local_rowwise", "gather")
#: Output projections whose gathered output stays sharded in a plan of :func:`get_hf_tp_shard_plan`.
_HEADS = ("lm_head", "language_model.lm_head")


class NamedStyle(ParallelStyle):
    """A ``ParallelStyle`` object for a style name that torch's own styles cannot express.

    This package treats the object like its name. torch's ``parallelize_module`` can apply the names that leave the
    parameters replicated, and raises for the others.

    Attributes:
        style_name: a name of :data:`~hf_automodel_parallel.plan.styles.KNOWN_STYLES`, or one that a user has registered
            with transformers.
    """

    _stands_for_style_name = True  # see plan.torch_styles.STANDS_FOR_NAME

    def __init__(self, name: str) -> None:
        check_style("NamedStyle", name)
        self.style_name = name

    def __repr__(self) -> str:
        return f"NamedStyle({self.style_name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedStyle) and other.style_name == self.style_name

    def __hash__(self) -> int:
        return hash((NamedStyle, self.style_name))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Apply the style; torch's ``parallelize_module`` calls this.

        Raises:
            UnsupportedError: ``parallelize_module`` cannot apply this style.
        """
        if self.style_name == "replicated_with_grad_allreduce":
            sum_gradients(module, device_mesh)
        elif self.style_name not in ("replicate", "local_params"):
            raise UnsupportedError(
                f"the style {self.style_name!r} has no counterpart in torch.distributed.tensor.parallel, so "
                "parallelize_module cannot apply it. Pass the plan to this package (tp_plan / tp_shard_plan), whose "
                "own engine can."
            )
        return module


def translate_to_torch_parallel_style(style: str) -> ParallelStyle | None:
    """Return a new torch style object for a style name of transformers' ``_tp_plan``.

    Known names are :data:`~hf_automodel_parallel.plan.styles.KNOWN_STYLES`, ``sequence_parallel``, and the names that a
    user has registered with transformers. A name without a counterpart in torch becomes a :class:`NamedStyle`. A
    gathered output is a plain full tensor, because models compute their losses from it.

    Returns:
        The style; None for ``replicated_with_grad_allreduce``, which changes no parameter and no activation. This
        package needs no entry for it: it finds the parameters with a Partial gradient itself.

    Raises:
        PlanAssertionError: (also an ``AssertionError``) ``style`` is not a string.
        PlanError: the name is unknown, or means expert parallelism.
    """
    if not isinstance(style, str):
        raise PlanAssertionError(
            f"a parallel style must be a string, but is {style!r} of type {type(style).__name__}. Known styles: "
            f"{', '.join(KNOWN_STYLES)}."
        )
    return None if style == _SUMMED else _translate(style)


def _translate(style: str, where: str = "") -> ParallelStyle:
    """The torch style for the name ``style``; ``where`` says in error messages which plan entry has it."""
    if style == "sequence_parallel":
        return SequenceParallel()
    if style in REFUSED_STYLES:
        raise PlanError(f"the style {style!r}{where} cannot be used. {REFUSED_STYLES[style]}")
    if style in ("colwise_gather_output", "colwise_rep", "embedding_colwise"):
        return ColwiseParallel(output_layouts=Replicate())
    if style in ("rowwise_split_input", "rowwise_rep", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=Replicate())
    if style == "colwise":
        return ColwiseParallel()
    if style == "rowwise":
        return RowwiseParallel()
    if style == "all_reduce":
        return PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    if is_style_name(style):
        return NamedStyle(style)
    raise PlanError(f"Unknown parallel style: {style!r}{where}. Known styles: {', '.join(KNOWN_STYLES)}.")


def get_hf_tp_shard_plan(model: nn.Module) -> TorchPlan:
    """Return the plan that a Hugging Face model declares, as torch styles.

    Merges the plans of the classes, configs and instances of the model and of all models inside, each under its path
    (see :func:`~hf_automodel_parallel.plan.sources.huggingface.huggingface_plan`), with these changes:

    * The input embedding is added if no entry names it. For a model that cannot say which module that is, this is
      ``embed_tokens`` beside its layers, unless ``config.tie_word_embeddings``.
    * The output of a gathered ``lm_head`` stays sharded over the vocabulary: a DTensor with ``Shard(-1)`` under torch's
      ``parallelize_module``. Given to this package, the plan means what the model declares.
    * ``replicated_with_grad_allreduce`` is skipped (see :func:`translate_to_torch_parallel_style`).
    * Entries of expert parallelism (``ep_*``, ``local_colwise``, ``local_rowwise``, ``gather``) are skipped with a
      warning, so that these experts are replicated.

    Entries may name parameters (expert weights). A style without a counterpart in torch is a :class:`NamedStyle`.

    Args:
        model: any transformers model, plain or PEFT-wrapped, on any device including meta. It is only read.

    Returns:
        Path relative to the unwrapped model (``*`` for exactly one component) -> a new style object.

    Raises:
        PlanAssertionError: (a ``ValueError`` and an ``AssertionError``) no part of the model has a plan.
        PlanError: a style of the plan is unknown, or means expert parallelism.
    """
    inner = ModelView.of(model).inner
    entries = huggingface_plan(inner)
    if not entries:
        raise PlanAssertionError(
            f"Hugging Face tp plan is not supported for {type(inner).__name__}: neither the class nor a model in it "
            f"has a _tp_plan, and no config a base_model_tp_plan. Give the class one, or pass a dict as tp_shard_plan."
        )
    of_experts = [e.pattern for e in entries.values() if _is_of_experts(e.style)]
    if of_experts:
        logger.warning(
            "%s: entries of expert parallelism are left out, the experts are replicated: %s",
            type(inner).__name__,
            ", ".join(of_experts),
        )
    skipped = {*of_experts, *(e.pattern for e in entries.values() if e.style == _SUMMED)}
    plan = _translated(entry for entry in entries.values() if entry.pattern not in skipped)
    for name in _HEADS:
        if name in entries and entries[name].style in ("colwise_rep", "colwise_gather_output"):
            plan[name] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    embedding = _expected_embedding(inner)
    if embedding is not None and embedding not in entries:
        plan[embedding] = RowwiseParallel(input_layouts=Replicate())
    return plan


def _is_of_experts(style: Any) -> bool:
    return isinstance(style, str) and (style.startswith("ep_") or style in _OF_EXPERTS)


def _expected_embedding(inner: nn.Module) -> str | None:
    """Path of the embedding that a model without ``get_input_embeddings`` is expected to have; None if it is tied."""
    config = getattr(inner, "config", None)
    if compat.input_embedding_module(inner) is not None or getattr(config, "tie_word_embeddings", False):
        return None  # huggingface_plan has added the embedding that the model names, or a reason not to
    names = {id(module): name for name, module in inner.named_modules()}
    first = next(iter(layer_groups(inner).get("language", [])), None)
    # The parent of the container of the layers: model.layers.0 -> model
    owner = "model" if first is None else names[id(first)].rpartition(".")[0].rpartition(".")[0]
    return f"{owner}.embed_tokens" if owner else "embed_tokens"


def get_parallel_plan(
    model: nn.Module,
    sequence_parallel: bool = False,
    tp_shard_plan: Mapping[str, Any] | str | None = None,
    tp_size: int = 1,
) -> TorchPlan:
    """Select the plan for ``model``: the given one, else the registry's, else the model's own, else the default plan.

    Unlike in :func:`get_hf_tp_shard_plan` the output of a gathered head is a plain full tensor, so that the model can
    compute its loss, and ``replicated_with_grad_allreduce`` is a :class:`NamedStyle`, so that torch's
    ``parallelize_module`` all-reduces the gradients of ``q_norm`` and ``k_norm``.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        sequence_parallel: shard the activations of norms and residuals along the sequence. A dict in
            ``tp_shard_plan`` is returned unchanged, without it.
        tp_shard_plan: a dict, which is returned unchanged; or the name of a plan, a callable, or the import path of a
            dict or callable. A callable is called with the model if it takes an argument.
        tp_size: number of ranks on the tp axis. With one rank no plan is applied, so none has to be usable.

    Raises:
        PlanError: (a ``ValueError``) a given plan cannot be read, or no source has a usable plan. In the latter case
            the message gives remedies and, as ``Note:``, the reason for each source.
        UnsupportedError: (a ``ValueError``) sequence parallelism cannot be derived for this model.
    """
    if isinstance(tp_shard_plan, dict):
        return tp_shard_plan
    try:
        entries = select_plan(model, tp_shard_plan, _ORDER).entries
    except PlanError as error:
        if tp_size > 1 or tp_shard_plan is not None:
            raise
        logger.info("tp_size=1, and no source has a plan; returning the default plan: %s", error)
        entries = llama_like_plan("default plan")
    plan = _translated(entries.values())
    if sequence_parallel and tp_size > 1:
        plan = along_the_sequence(model, plan)
    return plan


def _translated(entries: Iterable[PlanEntry]) -> TorchPlan:
    return {
        entry.pattern: _translate(entry.style, f" in the plan entry {entry.pattern!r} [{entry.source}]")
        if isinstance(entry.style, str)
        else entry.style
        for entry in entries
    }


# ---- sequence parallelism -----------------------------------------------------------------------------------------


def along_the_sequence(model: nn.Module, plan: TorchPlan) -> TorchPlan:
    """Return ``plan`` with sequence parallelism: ``Shard(1)`` activations between the sharded blocks.

    :mod:`hf_automodel_parallel.plan.analysis.sequence_parallel` has a more general derivation. This simpler one exists
    because the reference's ``_get_parallel_plan`` returns torch styles, which the package's own engine does not use.

    It reads the module tree only and follows Korthikanti et al. (2022, arXiv:2205.05198): the norms of the layers and
    the final norm run on sequence shards, column-wise layers all-gather the sequence, row-wise layers and the embedding
    reduce-scatter it. These activations are DTensors, so that models read the full sequence length from their shape.

    Args:
        model: a text model with repeated layers.
        plan: its plan, as torch styles. The plan and its styles are only read.

    Raises:
        UnsupportedError: the layouts cannot be derived safely; the message names the module or entry.
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
            result[pattern] = _along_the_sequence(
                pattern, style, isinstance(inner.get_submodule(hits[0]), nn.Embedding)
            )
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


def _along_the_sequence(pattern: str, style: ParallelStyle, is_table: bool) -> ParallelStyle:
    replicate, features, sequence = (Replicate(),), (Shard(-1),), Shard(1)
    if type(style) is ColwiseParallel and style.input_layouts == replicate and not is_table:
        (output,) = style.output_layouts
        return ColwiseParallel(input_layouts=sequence, output_layouts=output, use_local_output=style.use_local_output)
    reads = (replicate,) if is_table else (replicate, features)
    if type(style) is RowwiseParallel and style.input_layouts in reads and style.output_layouts == replicate:
        (read,) = style.input_layouts
        return RowwiseParallel(input_layouts=read, output_layouts=sequence, use_local_output=False)
    if getattr(style, "style_name", None) == "replicated_with_grad_allreduce":
        return style  # between sharded projections (q_norm, k_norm), which run on the full sequence
    raise UnsupportedError(
        f"sequence_parallel=True: the layouts of the plan entry {pattern!r} ({style!r}) for activations that are "
        f"sharded along the sequence cannot be derived. Use sequence_parallel=False, or write the plan as a dict."
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
