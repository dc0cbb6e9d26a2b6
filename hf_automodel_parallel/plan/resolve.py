"""From a plan to a sharding spec: the placement of each parameter of this model, and the tp hooks of each module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .. import compat
from ..core.model_view import ModelView, pattern_regex, plan_name, precision, without_wrappers
from ..core.sharding_spec import (
    PARTIAL_GRADIENT,
    RANK_ZERO_ONLY,
    REPLICATED,
    InputHook,
    ModuleSpec,
    OutputHook,
    ParameterSpec,
    Plan,
    PlanEntry,
    ShardingSpec,
)
from ..errors import PlanError, UnsupportedError
from .kv_head_replication import replicate_key_value_heads
from .layer_kinds import (
    Matrix,
    as_matrix,
    check_adapter,
    check_peft_method,
    expand_wrappers,
    is_parameter_adapter,
    only_looks_up,
    trains_rows,
)
from .peft_placement import feature_vector, place_adapter, place_parameter_adapters, place_trained_rows
from .styles import EMBEDDING_STYLES, LINEAR_STYLES, MODULE_STYLES
from .validate import local_head_counts

T = TypeVar("T")


def resolve(model: nn.Module | ModelView, plan: Plan, tp_size: int) -> ShardingSpec:
    """Apply ``plan`` to the module tree of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        plan: the selected plan.
        tp_size: number of ranks on the tp axis.

    Returns:
        The spec of every parameter that is sharded or has a Partial gradient, and of every module with tp hooks.

    Raises:
        PlanError: an explicit entry matches nothing, a style does not fit the layer it names, or a dimension does not
            divide.
        UnsupportedError: a PEFT or quantised layer that cannot be sharded.
    """
    return _Resolver(ModelView.of(model), plan, tp_size).run()


@dataclass
class _Resolver:
    view: ModelView
    plan: Plan
    tp_size: int
    spec: ShardingSpec = field(default_factory=ShardingSpec)

    def run(self) -> ShardingSpec:
        self.model = self.view.model
        check_peft_method(self.model)
        inner = self.view.inner
        self.config = getattr(inner, "config", None)
        self.spec.notes.extend(self.plan.notes)
        modules, parameters = self._plan_targets()
        matches = self._match_entries(modules, parameters)
        if not matches:
            raise PlanError(
                f"none of the {len(self.plan.entries)} entries of the {self.plan.origin} plan matches a module or "
                f"parameter of {type(inner).__name__}: {', '.join(list(self.plan.entries)[:4])}, ... Keys are paths as "
                f"in model.named_modules(), without PEFT's prefix."
            )
        from .torch_styles import read_torch_styles  # imports torch's styles, which not every plan needs

        matches, notes = read_torch_styles(matches, modules, parameters)
        self.spec.notes.extend(notes)
        placements = self._place_entries(matches, modules, parameters)
        # After the entries: a tied name that no entry matched gets the placement of one that was matched.
        self._place_tied_parameters()
        self._check_experts_are_sharded()
        # Plans of transformers are written for classes that infer the number of heads from the tensor; a derived plan
        # lists the attributes that count heads itself.
        if self.plan.origin not in ("hf", "derived"):
            self.spec.head_counts |= local_head_counts(self.model, self.spec, self.tp_size)
        self._divide_counts(modules)
        self._note_head_arguments(modules)
        for name in replicate_key_value_heads(self.model, self.spec, self.tp_size):
            if name in matches:
                placements[matches[name].pattern] = "Replicate, ranks share heads"
        for pattern, entry in self.plan.entries.items():
            count = sum(1 for e in matches.values() if e.pattern == pattern)
            if count:
                self.spec.rows.append((pattern, entry.style_name, count, placements[pattern], entry.source))
        return self.spec

    # ---- matching: names of the model and entries of the plan --------------------------------------------------

    def _plan_targets(self) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
        """Modules and parameters that a plan can name: the model's own, without those that PEFT added inside layers."""
        tuner, auxiliary = compat.peft_tuner_layer_type(), compat.peft_auxiliary_wrapper_type()
        modules: dict[str, nn.Module] = {}
        parameters: dict[str, nn.Parameter] = {}

        def visit(name: str, module: nn.Module, is_base_layer: bool) -> None:
            if not is_base_layer:  # in a plan, the name of a base layer means the adapter around it
                modules[name] = module
            for key, parameter in module.named_parameters(recurse=False):
                parameters[f"{name}.{key}" if name else key] = parameter
            if auxiliary is not None and isinstance(module, auxiliary):
                return
            for key, child in module.named_children():
                child_name = f"{name}.{key}" if name else key
                if tuner is None or not isinstance(module, tuner):
                    visit(child_name, child, False)
                elif key == "base_layer":
                    visit(child_name, child, True)

        visit("", self.model, False)
        return modules, parameters

    def _match_entries(
        self, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
    ) -> dict[str, PlanEntry]:
        """Name -> the matching entry with the fewest wildcards; raises if an explicit entry matches nothing."""
        names = [*modules, *parameters]
        # Patterns are without PEFT's levels, so one plan fits a model with and without adapters.
        short = {name: without_wrappers(plan_name(name, self.view.prefix)) for name in names}
        best: dict[str, PlanEntry] = {}
        for pattern, entry in self.plan.entries.items():
            regex = pattern_regex(pattern)
            hits = [name for name in names if regex.fullmatch(short[name])]
            if not hits:
                self.spec.unmatched.append(entry)
            for name in hits:
                known = best.get(name)
                if known is None or precision(pattern) >= precision(known.pattern):
                    best[name] = entry
        if self.plan.strict and self.spec.unmatched:
            keys = ", ".join(repr(entry.pattern) for entry in self.spec.unmatched)
            raise PlanError(
                f"the tp_plan entries {keys} match no module or parameter of the model. Keys are paths as in "
                "model.named_modules() without PEFT's prefix, '*' stands for one path component; remove or correct "
                "them."
            )
        return best

    # ---- parameters and modules named by the plan --------------------------------------------------------------

    def _place_entries(
        self, matches: dict[str, PlanEntry], modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
    ) -> dict[str, str]:
        """Fill the spec from the matched entries; returns pattern -> placement, for the plan table."""
        placements: dict[str, str] = {}
        # Parameters first: an entry of their own wins over "replicated_with_grad_allreduce" of their module.
        for name, entry in matches.items():
            if name in parameters:
                placements[entry.pattern] = self._place_parameter(name, parameters[name], entry)
        first_names: dict[int, str] = {}  # a module with several names gets its hooks once
        for name, entry in matches.items():
            if name not in modules:
                continue
            first = first_names.setdefault(id(modules[name]), name)
            if first == name:
                for target_name, target in expand_wrappers(name, modules[name]):
                    placements[entry.pattern] = self._place_module(target_name, target, entry)
            elif matches[first].style == entry.style:
                placements.setdefault(entry.pattern, placements[matches[first].pattern])
            else:
                raise PlanError(
                    f"{first} and {name} are one module, which the plan entries {matches[first].pattern!r} and "
                    f"{entry.pattern!r} shard in different ways. Leave one of them out."
                )
        return placements

    def _place_parameter(self, name: str, parameter: nn.Parameter, entry: PlanEntry) -> str:
        style, rank = entry.style, parameter.ndim
        if style == "replicate":
            spec = REPLICATED
        elif style == "replicated_with_grad_allreduce":
            spec = PARTIAL_GRADIENT
        # Fused experts are (experts, out, in), so the matrix is in the last two dimensions.
        elif style in ("colwise", "packed_colwise"):
            spec = ParameterSpec(max(rank - 2, 0), LINEAR_STYLES[style].blocks)
        elif style in ("rowwise", "packed_rowwise"):
            spec = ParameterSpec(rank - 1, LINEAR_STYLES[style].blocks)
        else:
            raise PlanError(
                f"the plan entry {entry.pattern!r} names a parameter, to which the style {entry.style_name!r} cannot "
                f"be applied; use colwise, rowwise, packed_colwise, packed_rowwise, replicate or "
                f"replicated_with_grad_allreduce."
            )
        self._check_divides(name, tuple(parameter.shape), spec)
        self.spec.parameters[name] = spec
        place_parameter_adapters(self.model, self.spec, name, self.tp_size)
        return str(spec)

    def _check_divides(self, name: str, shape: tuple[int, ...], spec: ParameterSpec) -> None:
        if spec.dim is None:
            return
        size = shape[spec.dim]
        if size % (spec.blocks * self.tp_size):
            packed = f" packed in {spec.blocks} blocks" if spec.blocks > 1 else ""
            raise PlanError(
                f"{name} of shape {tuple(shape)} cannot be sharded: dimension {spec.dim} has {size} entries{packed}, "
                f"which tp_size={self.tp_size} does not divide. Choose a tp_size that divides it, or leave the entry "
                "out of the plan."
            )

    def _place_module(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        style = entry.style
        if not isinstance(style, str) or style not in (*LINEAR_STYLES, *EMBEDDING_STYLES, *MODULE_STYLES):
            return self._place_native_style(name, module, entry)
        tuner = compat.peft_tuner_layer_type()
        adapter, base_name, base = None, name, module
        # Wrappers of `target_parameters` are nested around the layer; they are placed with the parameter they adapt.
        while tuner is not None and isinstance(base, tuner):
            check_adapter(base_name, base)
            adapter = None if is_parameter_adapter(base) else base
            base_name, base = f"{base_name}.base_layer", base.base_layer  # type: ignore[assignment]
        if trains_rows(adapter) and style in (*LINEAR_STYLES, *EMBEDDING_STYLES):
            return place_trained_rows(self.spec, name, adapter, base_name, base, self.tp_size)  # type: ignore[arg-type]
        if is_parametrized(base, "weight") and self._stands_alone(style):
            return self._leave_parametrized(name, entry)
        if style in LINEAR_STYLES:
            matrix = as_matrix(base, name)
            if matrix is None and self._stands_alone(style) and not self.plan.strict:
                self.spec.notes.append(f"{name} is a {type(base).__name__} and no linear layer, so it is replicated.")
                return "Replicate"
            if matrix is None:
                raise PlanError(
                    f"the plan entry {entry.pattern!r} has the style {style!r}, which shards linear layers, but {name} "
                    f"is a {type(base).__name__}. Name its parameters instead, or use another style."
                )
            return self._place_linear(name, base_name, matrix, adapter, entry)
        if style in EMBEDDING_STYLES:
            return self._place_embedding(base_name, base, entry)
        return self._place_hooks(name, module, entry)

    @staticmethod
    def _stands_alone(style: str) -> bool:
        """Whether activations are replicated on both sides of a layer of this style: a head, an embedding."""
        return style in EMBEDDING_STYLES or (style in LINEAR_STYLES and LINEAR_STYLES[style].swap is not None)

    def _leave_parametrized(self, name: str, entry: PlanEntry) -> str:
        """A weight that is computed from other parameters is not sharded. Within layers the run of the layers says so.

        Raises:
            PlanError: the plan is the user's own.
        """
        reason = f"{name} has a parametrization (torch.nn.utils.parametrize), whose weight is computed in full"
        if self.plan.strict:
            raise PlanError(f"{reason}; leave the entry {entry.pattern!r} out of the plan.")
        self.spec.notes.append(f"{reason}, so it is replicated.")
        return "Replicate"

    def _place_linear(
        self, name: str, base_name: str, matrix: Matrix, adapter: nn.Module | None, entry: PlanEntry
    ) -> str:
        style = self._style_that_divides(name, matrix, entry.style)
        if style is None:
            return "Replicate"
        row = LINEAR_STYLES[style]
        weight = ParameterSpec(matrix.dim(row.side), row.blocks)
        self._check_divides(f"{base_name}.weight", matrix.shape, weight)
        self.spec.parameters[f"{base_name}.weight"] = weight
        place_parameter_adapters(self.model, self.spec, f"{base_name}.weight", self.tp_size)
        has_bias = getattr(matrix.module, "bias", None) is not None
        if has_bias and row.side == "out":
            self.spec.parameters[f"{base_name}.bias"] = feature_vector(row.blocks, self.tp_size)
        if row.side == "out" and vars(matrix.module).get("nf") == matrix.out_features:
            # transformers' Conv1D reshapes its output to nf features
            self.spec.head_counts[base_name] = {"nf": matrix.out_features // self.tp_size}
        # A row-wise bias is added after the all-reduce; before it, it would be added once per rank.
        deferred = has_bias and row.side == "in"
        if deferred and not isinstance(matrix.module, nn.Linear):  # transformers' Conv1D needs its bias
            self.spec.parameters[f"{base_name}.bias"] = RANK_ZERO_ONLY
            deferred = False
        self.spec.modules[name] = ModuleSpec(
            row.input, row.output, deferred_bias=base_name.removeprefix(name).lstrip(".") if deferred else None
        )
        if adapter is not None:
            place_adapter(self.spec, name, adapter, row.side, row.blocks, self.tp_size)
        return str(weight) + ("" if style == entry.style else f" ({style})")

    def _style_that_divides(self, name: str, matrix: Matrix, style: str) -> str | None:
        """``style``; its swap if tp_size divides the other side only; None if it divides neither.

        A swap is possible where activations are replicated on both sides of the layer. It avoids padding a vocabulary
        that tp_size does not divide.
        """
        row = LINEAR_STYLES[style]
        if row.swap is None or matrix.size(row.side) % self.tp_size == 0:
            return style
        other = LINEAR_STYLES[row.swap]
        size = matrix.size(row.side)
        if matrix.size(other.side) % self.tp_size == 0:
            self.spec.notes.append(
                f"{name}: {size} {row.side}put features do not divide by tp_size={self.tp_size}; sharded on the other "
                "side."
            )
            return row.swap
        self.spec.notes.append(f"{name}: neither side divides by tp_size={self.tp_size}; replicated.")
        return None

    def _place_embedding(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        if not isinstance(module, nn.Embedding):
            raise PlanError(
                f"the plan entry {entry.pattern!r} has the style {entry.style!r}, which shards an nn.Embedding, but "
                f"{name} is a {type(module).__name__}."
            )
        if not only_looks_up(module):
            others = ", ".join(key for key, _ in module.named_parameters() if key != "weight")
            reason = f"{name} ({type(module).__name__}) has parameters beside its table ({others})"
            if self.plan.strict:
                raise PlanError(
                    f"{reason}, which would be applied to the rows of one rank alone; leave it out of the plan."
                )
            self.spec.notes.append(f"{reason}, so it is replicated.")
            return "Replicate"
        if module.max_norm is None and module.scale_grad_by_freq and not self.plan.strict:
            self.spec.notes.append(f"{name} has scale_grad_by_freq=True, so it is replicated.")
            return "Replicate"
        if module.max_norm is not None or module.scale_grad_by_freq:
            what = "max_norm set, which renormalises full rows in place"
            if module.max_norm is None:
                what = "scale_grad_by_freq=True, and a rank sees the tokens of its own rows only"
            raise PlanError(f"{name} has {what}; leave it out of the plan.")
        # The other dimension as a fallback, instead of padding a vocabulary that tp_size does not divide.
        dims = (EMBEDDING_STYLES[entry.style], 1 - EMBEDDING_STYLES[entry.style])
        dim = next((d for d in dims if module.weight.shape[d] % self.tp_size == 0), None)
        if dim is None:
            self.spec.notes.append(f"{name}: neither dimension divides by tp_size={self.tp_size}; replicated.")
            return "Replicate"
        if dim != dims[0]:
            self.spec.notes.append(
                f"{name}: dimension {dims[0]} ({module.weight.shape[dims[0]]}) does not divide by "
                f"tp_size={self.tp_size}; sharded on dimension {dim}."
            )
        self._shard_embedding(name, dim)
        return str(self.spec.parameters[f"{name}.weight"])

    def _shard_embedding(self, name: str, dim: int) -> None:
        self.spec.parameters[f"{name}.weight"] = ParameterSpec(dim)
        self.spec.modules[name] = (
            ModuleSpec(InputHook.MASK_IDS, OutputHook.REDUCE_FROM_TP)
            if dim == 0
            else ModuleSpec(InputHook.NONE, OutputHook.GATHER)
        )

    def _place_hooks(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        style = entry.style
        if style == "replicated_with_grad_allreduce":
            for parameter_name, _ in module.named_parameters():
                self.spec.parameters.setdefault(f"{name}.{parameter_name}", PARTIAL_GRADIENT)
            return str(PARTIAL_GRADIENT)
        hooks = {
            "all_reduce": ModuleSpec(output=OutputHook.REDUCE_FROM_TP),
            "moe_tp_experts": ModuleSpec(InputHook.COPY_ALL_TO_TP, OutputHook.REDUCE_FROM_TP),
            "moe_identity_expert": ModuleSpec(InputHook.DIVIDE),
        }.get(style)
        if style == "mla_kv_a_proj":
            hooks = ModuleSpec(output=OutputHook.COPY_TAIL_TO_TP, tail=self._rope_features(name))
        if hooks is None:
            return "Replicate"
        self.spec.modules[name] = hooks
        return "activations"

    def _rope_features(self, name: str) -> int:
        tail = getattr(self.model.get_submodule(name.rpartition(".")[0]), "qk_rope_head_dim", None)
        if tail is None and self.config is not None:
            tail = getattr(self.config.get_text_config(), "qk_rope_head_dim", None)
        if not tail:
            raise PlanError(
                f"{name} has the style 'mla_kv_a_proj', which needs qk_rope_head_dim in the model's config (the number "
                f"of rotary features of its output); it is missing."
            )
        return int(tail)

    def _place_native_style(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        tuner = compat.peft_tuner_layer_type()
        if tuner is not None and isinstance(module, tuner):
            raise PlanError(
                f"{name} carries a PEFT adapter, and the plan entry {entry.pattern!r} has a style of torch or of your "
                f"own ({entry.style_name}), whose engine cannot handle adapters. Use a style name, or exclude it from "
                "PEFT."
            )
        style = entry.style
        if isinstance(style, str):
            style = compat.transformers_parallel_styles()[style]
        self.spec.modules[name] = ModuleSpec(native_style=style)
        return f"by {entry.style_name}"

    def _check_experts_are_sharded(self) -> None:
        """Raise unless experts in front of an all-reduce are sharded: replicated ones would be added tp_size times."""
        for name, module in self.spec.modules.items():
            if module.input is not InputHook.COPY_ALL_TO_TP:
                continue
            if not any(n.startswith(f"{name}.") and s.dim is not None for n, s in self.spec.parameters.items()):
                raise UnsupportedError(
                    f"{name} has the style 'moe_tp_experts', but the plan shards none of its weights there (a copy "
                    f"made by modules_to_save, or a plan without entries for them). Use LoRA's target_parameters on "
                    f"the experts instead of modules_to_save, or add entries for the weights, or use tp_size=1."
                )

    def _divide_counts(self, modules: dict[str, nn.Module]) -> None:
        """Add to the spec the local values of the attributes that the plan lists as counts of sharded features."""
        for name, attributes in self._modules_matching(self.plan.counts, modules):
            for attribute in attributes:
                value = getattr(modules[name], attribute)
                if value % self.tp_size:
                    raise PlanError(
                        f"{name}.{attribute}={value} does not divide by tp_size={self.tp_size}, and each rank "
                        f"works on an equal part. Choose a tp_size that divides it, or tp_size=1."
                    )
                self.spec.head_counts.setdefault(name, {})[attribute] = value // self.tp_size

    def _note_head_arguments(self, modules: dict[str, nn.Module]) -> None:
        """Add to the spec the forward arguments that the plan lists as having one value for each head."""
        for name, arguments in self._modules_matching(self.plan.head_arguments, modules):
            self.spec.head_arguments[name] = {
                argument: (dim, getattr(modules[name], attribute)) for argument, (dim, attribute) in arguments.items()
            }

    def _modules_matching(self, table: Mapping[str, T], modules: dict[str, nn.Module]) -> Iterator[tuple[str, T]]:
        for pattern, value in table.items():
            regex = pattern_regex(pattern)
            for name in modules:
                if regex.fullmatch(plan_name(name, self.view.prefix)):
                    yield name, value

    # ---- tied parameters ---------------------------------------------------------------------------------------

    def _place_tied_parameters(self) -> None:
        """Give every name of a tied parameter the same placement, or raise if that is impossible."""
        for names in self.view.names_of.values():
            planned = {self.spec.parameters[n] for n in names if n in self.spec.parameters}
            if len(names) < 2 or not planned:
                continue
            if len(planned) > 1:
                raise PlanError(
                    f"the parameter shared by {', '.join(names)} is planned in different ways "
                    f"({', '.join(sorted(map(str, planned)))}). Plan all its names alike, for example "
                    f"'embedding_rowwise' with 'colwise_gather_output'."
                )
            (spec,) = planned
            for name in names:
                if name not in self.spec.parameters:
                    self._place_tied_name(name, spec, names)

    def _place_tied_name(self, name: str, spec: ParameterSpec, names: list[str]) -> None:
        """Place a name of a tied parameter that no entry matched, like the other ``names``."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        known = [n.rpartition(".")[0] for n in names if n in self.spec.parameters]
        if any(self.model.get_submodule(n) is owner for n in known):  # another name of a module that is planned already
            self.spec.parameters[name] = spec
            return
        if spec.dim is not None:
            matrix = as_matrix(owner, owner_name)
            adapters = self.model.named_modules()
            editor = next(((n, m) for n, m in adapters if trains_rows(m) and m.base_layer is owner), None)
            if editor is not None and spec == ParameterSpec(1):  # it reads the table, so it gets the hooks
                place_trained_rows(self.spec, *editor, owner_name, owner, self.tp_size)
            elif editor is None and isinstance(owner, nn.Embedding) and only_looks_up(owner):
                self._shard_embedding(owner_name, spec.dim)
            elif (
                editor is None
                and matrix is not None
                and leaf == "weight"
                and spec.blocks == 1
                and getattr(owner, "bias", None) is None  # a bias would need a plan of its own
            ):
                style = "colwise_gather_output" if spec.dim == matrix.out_dim else "rowwise_split_input"
                row = LINEAR_STYLES[style]
                self.spec.modules[owner_name] = ModuleSpec(row.input, row.output)
            else:
                raise PlanError(
                    f"{name} shares its parameter with {', '.join(n for n in names if n != name)}, which the plan "
                    f"shards, but a {type(owner).__name__} cannot be sharded alike. Untie them, or leave both out of "
                    "the plan."
                )
        self.spec.parameters[name] = replace(spec)
        self.spec.notes.append(f"{name}: placed like the parameter it is tied to ({spec}).")
