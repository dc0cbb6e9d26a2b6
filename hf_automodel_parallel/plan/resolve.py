"""From a plan to a sharding spec: which parameter of this model goes where, and where activations cross the
boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from .. import compat
from ..core.model_view import ModelView, plan_name, without_wrappers
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
from .heads import local_head_counts
from .kv_head_replication import replicate_key_value_heads
from .layer_kinds import (
    Matrix,
    as_matrix,
    check_adapter,
    check_peft_method,
    edits_rows,
    expand_wrappers,
    is_parameter_adapter,
    only_looks_up,
    parameter_adapter_out_dim,
)
from .patterns import pattern_regex, precision
from .styles import EMBEDDING_STYLES, LINEAR_STYLES, MODULE_STYLES


def resolve(model: nn.Module, plan: Plan, tp_size: int) -> ShardingSpec:
    """Apply ``plan`` to the module tree of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped, on any device including meta. It is only read.
        plan: the selected plan.
        tp_size: number of ranks on the tp axis.

    Returns:
        The spec of every sharded or partially differentiated parameter and of every module with a boundary.

    Raises:
        PlanError: an explicit entry matches nothing, a style does not fit the layer it names, a dimension does not
        divide.
        UnsupportedError: a PEFT or quantised layer that cannot be sharded.
    """
    return _Resolver(model, plan, tp_size).run()


@dataclass
class _Resolver:
    model: nn.Module
    plan: Plan
    tp_size: int
    spec: ShardingSpec = field(default_factory=ShardingSpec)

    def run(self) -> ShardingSpec:
        check_peft_method(self.model)
        view = ModelView.of(self.model)
        inner, self.prefix = view.inner, view.prefix
        self.config = getattr(inner, "config", None)
        self.spec.notes.extend(self.plan.notes)
        modules, parameters = self._addressable()
        matches = self._match(modules, parameters)
        if not matches:
            raise PlanError(
                f"none of the {len(self.plan.entries)} entries of the {self.plan.origin} plan matches a module or "
                f"parameter of {type(inner).__name__}: {', '.join(list(self.plan.entries)[:4])}, ... Keys are paths as "
                f"in model.named_modules(), without PEFT's prefix."
            )
        from .torch_styles import read_torch_styles  # imports torch's styles, which not every plan needs

        matches, notes = read_torch_styles(matches, modules, parameters)
        self.spec.notes.extend(notes)
        placements: dict[str, str] = {}
        for name, entry in matches.items():
            if name in parameters:
                placements[entry.pattern] = self._parameter(name, parameters[name], entry)
        first_names: dict[int, str] = {}  # a module with several names gets one boundary
        for name, entry in matches.items():
            if name not in modules:
                continue
            first = first_names.setdefault(id(modules[name]), name)
            if first == name:
                placements[entry.pattern] = self._module(name, modules[name], entry)
            elif matches[first].style == entry.style:
                placements.setdefault(entry.pattern, placements[matches[first].pattern])
            else:
                raise PlanError(
                    f"{first} and {name} are one module, which the plan entries {matches[first].pattern!r} and "
                    f"{entry.pattern!r} shard in different ways. Leave one of them out."
                )
        self._tie(modules)
        self._check_experts()
        # transformers writes its plans for classes that take the number from the tensor; a derived plan says what
        # counts.
        if self.plan.origin not in ("hf", "derived"):
            self.spec.head_counts |= local_head_counts(self.model, self.spec, self.tp_size)
        self._local_attributes(modules)
        for name in replicate_key_value_heads(self.model, self.spec, self.tp_size):
            if name in matches:
                placements[matches[name].pattern] = "Replicate, ranks share heads"
        for pattern, entry in self.plan.entries.items():
            count = sum(1 for e in matches.values() if e.pattern == pattern)
            if count:
                self.spec.rows.append((pattern, entry.style_name, count, placements[pattern], entry.source))
        return self.spec

    # ---- matching ----------------------------------------------------------------------------------------------

    def _addressable(self) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
        """Modules and parameters a plan can name: those of the model, not what PEFT added inside its layers."""
        tuner, auxiliary = compat.peft_tuner_layer_type(), compat.peft_auxiliary_wrapper_type()
        modules: dict[str, nn.Module] = {}
        parameters: dict[str, nn.Parameter] = {}

        def visit(name: str, module: nn.Module, is_base_layer: bool) -> None:
            if not is_base_layer:  # an adapter answers to the name of the layer below it
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

    def _match(self, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]) -> dict[str, PlanEntry]:
        """Name -> entry, most precise pattern first; complains about explicit entries that match nothing."""
        names = [*modules, *parameters]
        short = {name: without_wrappers(plan_name(name, self.prefix)) for name in names}
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

    # ---- parameters named by the plan --------------------------------------------------------------------------

    def _parameter(self, name: str, parameter: nn.Parameter, entry: PlanEntry) -> str:
        style, rank = entry.style, parameter.ndim
        if style == "replicate":
            spec = REPLICATED
        elif style == "replicated_with_grad_allreduce":
            spec = PARTIAL_GRADIENT
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
        self._parameter_adapters(name, spec)
        return str(spec)

    def _parameter_adapters(self, name: str, spec: ParameterSpec) -> None:
        """LoRA on a bare parameter: its two factors follow the side of the parameter that is sharded."""
        owner, _, leaf = name.rpartition(".")
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            adapter = self.model.get_submodule(owner)
            if getattr(adapter, "parameter_name", None) == leaf and spec.dim is not None:
                check_adapter(owner, adapter)
                side = "out" if spec.dim == parameter_adapter_out_dim(adapter) else "in"
                self._lora(owner, adapter, side, spec.blocks)

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

    # ---- modules named by the plan -----------------------------------------------------------------------------

    def _module(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        shown = ""
        for target_name, target in expand_wrappers(name, module):
            shown = self._one_module(target_name, target, entry)
        return shown

    def _one_module(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        style = entry.style
        if not isinstance(style, str) or style not in (*LINEAR_STYLES, *EMBEDDING_STYLES, *MODULE_STYLES):
            return self._foreign(name, module, entry)
        tuner = compat.peft_tuner_layer_type()
        adapter, base_name, base = None, name, module
        while tuner is not None and isinstance(base, tuner):
            check_adapter(base_name, base)
            adapter = None if is_parameter_adapter(base) else base
            base_name, base = f"{base_name}.base_layer", base.base_layer  # type: ignore[assignment]
        if edits_rows(adapter) and style in (*LINEAR_STYLES, *EMBEDDING_STYLES):
            return self._edited_rows(name, adapter, base_name, base)  # type: ignore[arg-type]
        if style in LINEAR_STYLES:
            matrix = as_matrix(base, name)
            if matrix is None:
                raise PlanError(
                    f"the plan entry {entry.pattern!r} has the style {style!r}, which shards linear layers, but {name} "
                    f"is a {type(base).__name__}. Name its parameters instead, or use another style."
                )
            return self._linear(name, base_name, matrix, adapter, entry)
        if style in EMBEDDING_STYLES:
            return self._embedding(base_name, base, entry)
        return self._activation_style(name, module, entry)

    def _linear(self, name: str, base_name: str, matrix: Matrix, adapter: nn.Module | None, entry: PlanEntry) -> str:
        style = self._fitting_style(name, matrix, entry.style)
        if style is None:
            return "Replicate"
        row = LINEAR_STYLES[style]
        weight = ParameterSpec(matrix.dim(row.side), row.blocks)
        self._check_divides(f"{base_name}.weight", tuple(matrix.weight.shape), weight)
        self.spec.parameters[f"{base_name}.weight"] = weight
        self._parameter_adapters(f"{base_name}.weight", weight)
        has_bias = getattr(matrix.module, "bias", None) is not None
        if has_bias and row.side == "out":
            self.spec.parameters[f"{base_name}.bias"] = self._features(row.blocks)
        if (
            row.side == "out" and vars(matrix.module).get("nf") == matrix.out_features
        ):  # Conv1D reshapes its output to this
            self.spec.head_counts[base_name] = {"nf": matrix.out_features // self.tp_size}
        deferred = has_bias and row.side == "in"
        if deferred and not isinstance(matrix.module, nn.Linear):  # transformers' Conv1D cannot do without its bias
            self.spec.parameters[f"{base_name}.bias"] = RANK_ZERO_ONLY
            deferred = False
        self.spec.modules[name] = ModuleSpec(
            row.input, row.output, deferred_bias=base_name.removeprefix(name).lstrip(".") if deferred else None
        )
        if hasattr(adapter, "ia3_l"):
            self._ia3(name, adapter, row.side, row.blocks)  # type: ignore[arg-type]
        elif adapter is not None:
            self._lora(name, adapter, row.side, row.blocks)
        return str(weight) + ("" if style == entry.style else f" ({style})")

    def _features(self, blocks: int) -> ParameterSpec:
        """One number for each sharded output feature.

        Packed along its only dimension it would have none left for FSDP2 to shard, so it stays whole at rest.
        """
        if blocks == 1:
            return ParameterSpec(0)
        return ParameterSpec(None, blocks, partial_gradient=True, forward_shard_dim=0, forward_shards=self.tp_size)

    def _lora(self, name: str, adapter: nn.Module, side: str, blocks: int) -> None:
        """Adapters are linear, so they live between the boundaries of their base layer and add no collective to
        them.
        """
        for key in adapter.lora_A:  # type: ignore[union-attr]
            a, b = f"{name}.lora_A.{key}.weight", f"{name}.lora_B.{key}.weight"
            if side == "out":
                self.spec.parameters[a] = PARTIAL_GRADIENT
                self.spec.parameters[b] = ParameterSpec(0, blocks)
            else:
                self.spec.parameters[a] = ParameterSpec(1, blocks)
                self.spec.parameters[b] = PARTIAL_GRADIENT
            if getattr(adapter.lora_B[key], "bias", None) is not None:  # type: ignore[index,union-attr]
                bias = f"{name}.lora_B.{key}.bias"
                self.spec.parameters[bias] = self._features(blocks) if side == "out" else RANK_ZERO_ONLY
        for key in getattr(adapter, "lora_magnitude_vector", {}):
            magnitude = f"{name}.lora_magnitude_vector.{key}"
            self.spec.parameters[f"{magnitude}.weight"] = self._features(blocks) if side == "out" else PARTIAL_GRADIENT
            if side == "in":
                self.spec.reduced_dora_norms.append(magnitude)

    def _ia3(self, name: str, adapter: nn.Module, side: str, blocks: int) -> None:
        """A vector that scales the input or the output features; on the side that is not sharded it scales summands."""
        own = "in" if adapter.is_feedforward else "out"
        module = self.spec.modules[name]
        if own == "out" and module.deferred_bias is not None:
            raise UnsupportedError(
                f"{name} has a bias and is row-wise; IA3 on its output would have to scale the bias too, which is "
                "added after the reduction. List it in feedforward_modules, exclude it from target_modules, or use "
                "tp_size=1."
            )
        for key in adapter.ia3_l:  # type: ignore[union-attr]
            sharded = self._features(blocks) if own == "out" else ParameterSpec(1, blocks)
            spec = sharded if own == side else PARTIAL_GRADIENT
            self.spec.parameters[f"{name}.ia3_l.{key}"] = spec

    def _edited_rows(self, name: str, adapter: nn.Module, base_name: str, base: nn.Module) -> str:
        """PEFT replaces rows of the whole table, so the table (and a head tied to it) is sharded on the hidden
        dimension.
        """
        hidden = base.weight.shape[1]  # type: ignore[union-attr,index]
        if hidden % self.tp_size:
            self.spec.notes.append(f"{name}: {hidden} features do not divide by tp_size={self.tp_size}; replicated.")
            return "Replicate"
        shard = ParameterSpec(1)
        self.spec.parameters[f"{base_name}.weight"] = shard
        for key in adapter.trainable_tokens_delta:  # type: ignore[union-attr]
            self.spec.parameters[f"{name}.trainable_tokens_delta.{key}"] = shard
        is_table = isinstance(base, nn.Embedding)
        self.spec.modules[name] = (
            ModuleSpec(output=OutputHook.GATHER)
            if is_table
            else ModuleSpec(InputHook.SCATTER, OutputHook.REDUCE_FROM_TP)
        )
        return f"{shard} (rows are trained)"

    def _fitting_style(self, name: str, matrix: Matrix, style: str) -> str | None:
        """``style``, or its swap when this side does not divide and the layer's outer activations stay the same."""
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

    def _embedding(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        if not isinstance(module, nn.Embedding):
            raise PlanError(
                f"the plan entry {entry.pattern!r} has the style {entry.style!r}, which shards an nn.Embedding, but "
                f"{name} is a {type(module).__name__}."
            )
        if not only_looks_up(module):
            others = ", ".join(key for key, _ in module.named_parameters() if key != "weight")
            reason = f"{name} ({type(module).__name__}) has parameters beside its table ({others})"
            if self.plan.strict:
                raise PlanError(f"{reason}, which would meet the rows of one rank alone; leave it out of the plan.")
            self.spec.notes.append(f"{reason}, so it is left whole on every rank.")
            return "Replicate"
        if module.max_norm is not None or module.scale_grad_by_freq:
            what = "max_norm set, which renormalises whole rows in place"
            if module.max_norm is None:
                what = "scale_grad_by_freq=True, and a rank sees the tokens of its own rows only"
            raise PlanError(f"{name} has {what}; leave it out of the plan.")
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

    def _activation_style(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        style = entry.style
        if style == "replicated_with_grad_allreduce":
            for parameter_name, _ in module.named_parameters():
                self.spec.parameters.setdefault(f"{name}.{parameter_name}", PARTIAL_GRADIENT)
            return str(PARTIAL_GRADIENT)
        boundary = {
            "all_reduce": ModuleSpec(output=OutputHook.REDUCE_FROM_TP),
            "moe_tp_experts": ModuleSpec(InputHook.COPY_ALL_TO_TP, OutputHook.REDUCE_FROM_TP),
            "moe_identity_expert": ModuleSpec(InputHook.DIVIDE),
        }.get(style)
        if style == "mla_kv_a_proj":
            boundary = ModuleSpec(output=OutputHook.COPY_TAIL_TO_TP, tail=self._rope_features(name))
        if boundary is not None:
            self.spec.modules[name] = boundary
        return "activations" if boundary is not None else "Replicate"

    def _rope_features(self, name: str) -> int:
        tail = getattr(self.model.get_submodule(name.rpartition(".")[0]), "qk_rope_head_dim", None)
        if tail is None and self.config is not None:
            tail = getattr(self.config.get_text_config(), "qk_rope_head_dim", None)
        if not tail:
            raise PlanError(
                f"{name} has the style 'mla_kv_a_proj', which needs qk_rope_head_dim in the model's config to tell the "
                f"rotary part of its output; it is missing."
            )
        return int(tail)

    def _foreign(self, name: str, module: nn.Module, entry: PlanEntry) -> str:
        tuner = compat.peft_tuner_layer_type()
        if tuner is not None and isinstance(module, tuner):
            raise PlanError(
                f"{name} carries a PEFT adapter, and the plan entry {entry.pattern!r} has a style of torch or of your "
                f"own ({entry.style_name}), whose engine does not know adapters. Use a style name, or exclude it from "
                "PEFT."
            )
        style = entry.style
        if isinstance(style, str):
            style = compat.transformers_parallel_styles()[style]
        self.spec.modules[name] = ModuleSpec(native_style=style)
        return f"by {entry.style_name}"

    def _check_experts(self) -> None:
        """A sum over the ranks is right only for experts whose weights are sharded; whole ones would count tp times."""
        for name, module in self.spec.modules.items():
            if module.input is not InputHook.COPY_ALL_TO_TP:
                continue
            if not any(n.startswith(f"{name}.") and s.dim is not None for n, s in self.spec.parameters.items()):
                raise UnsupportedError(
                    f"{name} has the style 'moe_tp_experts', but the plan shards none of its weights there (a copy "
                    f"made by modules_to_save, or a plan without entries for them). Use LoRA's target_parameters on "
                    f"the experts instead of modules_to_save, or add entries for the weights, or use tp_size=1."
                )

    def _local_attributes(self, modules: dict[str, nn.Module]) -> None:
        """What the plan says of attributes that count what is sharded, and of arguments that have a value for each
        head.
        """
        for pattern, attributes in self.plan.counts.items():
            regex = pattern_regex(pattern)
            for name, module in modules.items():
                if not regex.fullmatch(plan_name(name, self.prefix)):
                    continue
                for attribute in attributes:
                    value = getattr(module, attribute)
                    if value % self.tp_size:
                        raise PlanError(
                            f"{name}.{attribute}={value} does not divide by tp_size={self.tp_size}, and each rank "
                            f"works on an equal part. Choose a tp_size that divides it, or tp_size=1."
                        )
                    self.spec.head_counts.setdefault(name, {})[attribute] = value // self.tp_size
        for pattern, arguments in self.plan.head_arguments.items():
            regex = pattern_regex(pattern)
            for name, module in modules.items():
                if regex.fullmatch(plan_name(name, self.prefix)):
                    self.spec.head_arguments[name] = {
                        argument: (dim, getattr(module, attribute)) for argument, (dim, attribute) in arguments.items()
                    }

    # ---- shared parameters -------------------------------------------------------------------------------------

    def _tie(self, modules: dict[str, nn.Module]) -> None:
        """Give every place of a shared parameter the same placement, or say why that is impossible."""
        places: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        for names in places.values():
            planned = {self.spec.parameters[n] for n in names if n in self.spec.parameters}
            if len(names) < 2 or not planned:
                continue
            if len(planned) > 1:
                raise PlanError(
                    f"the parameter shared by {', '.join(names)} is planned in different ways "
                    f"({', '.join(sorted(map(str, planned)))}). Plan all its places alike, for example "
                    f"'embedding_rowwise' with 'colwise_gather_output'."
                )
            (spec,) = planned
            for name in names:
                if name not in self.spec.parameters:
                    self._adopt(name, spec, names)

    def _adopt(self, name: str, spec: ParameterSpec, names: list[str]) -> None:
        """Plan a place of a shared parameter that no entry named, so that it agrees with the others."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        known = [n.rpartition(".")[0] for n in names if n in self.spec.parameters]
        if any(self.model.get_submodule(n) is owner for n in known):  # another name of a module that is planned already
            self.spec.parameters[name] = spec
            return
        if spec.dim is not None:
            matrix = as_matrix(owner, owner_name)
            adapters = self.model.named_modules()
            editor = next(((n, m) for n, m in adapters if edits_rows(m) and m.base_layer is owner), None)
            if editor is not None and spec == ParameterSpec(1):  # it reads the table, so the boundary is its
                self._edited_rows(*editor, owner_name, owner)
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
                    f"shards, but a {type(owner).__name__} cannot follow. Untie them or leave both out of the plan."
                )
        self.spec.parameters[name] = replace(spec)
        self.spec.notes.append(f"{name}: follows the parameter it is tied to ({spec}).")
