"""Find the repeated layers, the embedding and the head of a model: the FSDP units and the local-parameter scopes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import compat
from ..errors import ConfigError, UnsupportedError
from .modality_encoders import find_modality_encoders, layers_of_modality_encoders
from .model_view import ModelView

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelStructure:
    """The modules of a model that sharding treats differently.

    Attributes:
        layers: the repeated layers in forward order, each once.
        embedding: the input embedding, if any.
        head: the final norm and the output projection; either may be missing.
        tied: the output projection shares its weight with the input embedding.
        towers: the modality encoders (vision, audio), which only some forwards run; each contains some of ``layers``.
        skipped: layers outside of modality encoders that a text-only forward does not run.
    """

    layers: list[nn.Module]
    embedding: nn.Module | None
    head: list[nn.Module]
    tied: bool
    towers: list[nn.Module] = field(default_factory=list)
    skipped: list[nn.Module] = field(default_factory=list)

    @property
    def tower_layers(self) -> list[nn.Module]:
        """The layers of modality encoders."""
        return layers_of_modality_encoders(self.layers, self.towers)

    @property
    def main_layers(self) -> list[nn.Module]:
        """The layers that every forward runs."""
        others = {id(layer) for layer in (*self.tower_layers, *self.skipped)}
        return [layer for layer in self.layers if id(layer) not in others]


def find_structure(model: nn.Module | ModelView, layer_classes: list[str] | None = None) -> ModelStructure:
    """Find layers, embedding, head and modality encoders of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped.
        layer_classes: class names of the layers, if the user gave them; None: see :func:`find_layers`.

    Returns:
        The structure, with ``skipped`` empty: only a run of the model shows which layers a text-only forward skips.

    Raises:
        ConfigError: the model has no module of a class in ``layer_classes``.
    """
    inner = ModelView.of(model).inner
    layers = find_layers(inner, layer_classes)
    inside = {id(m) for layer in layers for m in layer.modules()}

    def outside(module: nn.Module | None) -> nn.Module | None:
        return None if module is None or id(module) in inside or module is inner else module

    embedding = outside(compat.input_embedding_module(inner))
    projection = outside(compat.lm_head_module(inner))
    towers = find_modality_encoders(inner, layers, embedding)
    beside = {id(layer) for layer in layers_of_modality_encoders(layers, towers)}
    norm = outside(_final_norm(inner, [layer for layer in layers if id(layer) not in beside], projection))
    tied = False
    if embedding is not None and projection is not None:
        shared = {id(p) for p in embedding.parameters()} & {id(p) for p in projection.parameters()}
        tied = bool(shared)
    head = [m for m in (norm, projection) if m is not None and any(True for _ in m.parameters())]
    return ModelStructure(layers, embedding, head, tied, towers)


def find_layers(model: nn.Module, layer_classes: list[str] | None = None) -> list[nn.Module]:
    """Return the repeated layers of ``model`` in the order of its module tree, each once; empty if it has none.

    Without ``layer_classes`` the model's own declarations decide: ``_no_split_modules`` of the model and of each model
    inside (language model and vision encoder), and transformers' base class ``GradientCheckpointingLayer``. A layer is
    an item of a container: a ``ModuleList``, a ``Sequential``, or the ``ModuleDict`` with numeric keys that a pipeline
    split leaves. Some models also list attention modules, embeddings or entire encoders in ``_no_split_modules``; a
    module inside of a container item stands for this item. If no declaration matches, the largest container is used.

    Raises:
        ConfigError: the model has no module of a class in ``layer_classes``.
    """
    if layer_classes:
        return _layers_of_classes(model, set(layer_classes))
    return _declared_layers(model) or _layers_by_layout(model)


def _declared_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that the model's own declarations name; empty if they match nothing (see :func:`find_layers`)."""
    wanted, layer_type = compat.no_split_module_names(model), compat.transformers_layer_type()
    # An item with an entire model inside is a part of what stands around the model, and none of its layers.
    items = _items_of_containers(model) - _around(models_inside(model).values(), model)
    around: dict[nn.Module, nn.Module] = {}  # module -> the item of a container that it is or lies in
    hits = []
    for module in model.modules():  # parents come before children
        if module in items:
            around[module] = module
        for child in module.children():
            if module in around:
                around.setdefault(child, around[module])
        named = any(cls.__name__ in wanted for cls in type(module).__mro__)  # fully_shard replaces it by a subclass
        if named or (module in items and layer_type is not None and isinstance(module, layer_type)):
            hits.append(module)
    hits = [m for m in hits if any(True for _ in m.parameters())]
    # In a model without containers the declared modules themselves are the layers. Of nested layers keep the outer one.
    found = list(dict.fromkeys(around[m] for m in hits if m in around)) or hits
    inside = {inner for layer in found for inner in layer.modules() if inner is not layer}
    return [layer for layer in found if layer not in inside]


def _layers_of_classes(model: nn.Module, wanted: set[str]) -> list[nn.Module]:
    found = [m for m in model.modules() if type(m).__name__ in wanted and any(True for _ in m.parameters())]
    missing = wanted - {type(m).__name__ for m in found}
    if missing:
        raise ConfigError(
            f"transformer_cls_names_to_wrap={sorted(wanted)!r}: no module of class {', '.join(sorted(missing))} in "
            f"{type(model).__name__}. Its most frequent classes: "
            f"{', '.join(name for name, _ in Counter(type(m).__name__ for m in model.modules()).most_common(6))}."
        )
    return found


#: Where the layers of a language model usually are, whatever other container is larger.
_USUAL_PATHS = ("model.layers", "layers", "language_model.layers")


def models_inside(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> Hugging Face model, for the outermost ones inside of ``model``; empty if it is one itself.

    ``model`` is a module around Hugging Face models: a classifier with a head of its own, a SentenceTransformer.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # parents come before children
        # By the class: PEFT's wrappers show the attributes of the model inside as theirs.
        is_model = hasattr(type(module), "main_input_name") and hasattr(module, "config")
        if is_model and not any(name.startswith(f"{outer}.") for outer in found):
            if not name:
                return {}
            found[name] = module
    return found


def is_layer_container(module: nn.Module) -> bool:
    """True for a ``ModuleList``, and for a ``ModuleDict`` with numeric keys, which a pipeline split makes of one."""
    if isinstance(module, nn.ModuleDict):
        return len(module) > 0 and all(key.isdigit() for key in module)
    return isinstance(module, nn.ModuleList)


def largest_container(model: nn.Module) -> nn.ModuleList | nn.ModuleDict | None:
    """Return the container (:func:`is_layer_container`) with the most children, the first one of several.

    None if ``model`` (a module, or a stand-in with ``named_children``) has no container with a child.
    """
    return max(_containers(model).values(), key=len, default=None)  # type: ignore[arg-type]


def model_layers(model: nn.Module) -> list[nn.Module]:
    """Return all repeated layers of ``model``: those of :func:`layer_groups`, the language model's first.

    Raises:
        UnsupportedError: the model has no layers.
    """
    layers = [layer for group in layer_groups(model).values() for layer in group]
    if not layers:
        raise UnsupportedError(
            f"{type(ModelView.of(model).inner).__name__} has no repeated layers: no ModuleList or ModuleDict found "
            f"that holds layers, and no module of a class in _no_split_modules. Give the class a _no_split_modules "
            f"with the class names of its layers."
        )
    return layers


def layer_groups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the repeated layers of ``model`` by modality: "language", "vision", "audio", as far as it has them.

    They are the layers that the model's declarations name (:func:`find_structure`). In a model without declarations
    they are the items of one container for each modality: for the language model the first of :data:`_USUAL_PATHS`,
    else the largest container, and for the others the largest container in a module with "vision", "visual", "vit",
    "image" or "audio" in its name.

    Args:
        model: the model, plain or PEFT-wrapped, or a stand-in: any object with attributes or ``named_children``.
    """
    inner = ModelView.of(model).inner
    groups: dict[str, list[nn.Module]] = {}
    if isinstance(inner, nn.Module) and _declared_layers(inner):
        structure = find_structure(inner)
        names = {id(module): name for name, module in inner.named_modules()}
        encoders = {id(layer) for layer in structure.tower_layers}
        groups["language"] = [layer for layer in structure.layers if id(layer) not in encoders]
        for encoder in structure.towers:
            kind = "audio" if _modality(f"{names[id(encoder)]}.{type(encoder).__name__}") == "audio" else "vision"
            groups.setdefault(kind, []).extend(layers_of_modality_encoders(structure.layers, [encoder]))
    else:
        containers = _containers(inner)
        for kind in ("language", "vision", "audio"):
            own = {name: module for name, module in containers.items() if _modality(name) == kind}
            usual = [submodule(inner, path) for path in _USUAL_PATHS] if kind == "language" else []
            best: nn.Module | None = next((m for m in usual if m is not None and is_layer_container(m)), None)
            best = best or max(own.values(), key=_usable_items, default=None)
            if best is not None:
                groups[kind] = list(best.children())
    return {kind: groups[kind] for kind in ("language", "vision", "audio") if groups.get(kind)}


def _modality(name: str) -> str:
    """The modality that a component of a dotted module name, or a class name, stands for; "language" without any."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    if any(word in ("audio", "speech", "sound") for word in words):
        return "audio"
    return "vision" if any(word in ("vision", "visual", "vit", "image") for word in words) else "language"


def _containers(model: Any) -> dict[str, nn.ModuleList | nn.ModuleDict]:
    """Name -> container of layers (:func:`is_layer_container`) with a child."""
    return {name: m for name, m in _named_modules(model) if is_layer_container(m) and len(m) > 0}  # type: ignore[misc]


def _named_modules(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``named_modules`` of a module, or of a stand-in that has ``named_children`` alone, or none."""
    if isinstance(model, nn.Module):
        yield from model.named_modules(prefix=prefix)
        return
    yield prefix, model
    for name, child in getattr(model, "named_children", tuple)():
        yield from _named_modules(child, f"{prefix}.{name}" if prefix else name)


def _usable_items(container: nn.Module) -> tuple[bool, int]:
    """Sort key: containers of modules that have a forward and parameters, then the larger ones."""
    children = list(container.children())
    usable = all(compat.has_implemented_forward(m) and any(True for _ in m.parameters()) for m in children)
    return usable, len(children)


def submodule(module: nn.Module, fqn: str) -> nn.Module | None:
    """Return the module at the dotted path ``fqn`` below ``module`` ("" is ``module``), or None if there is none.

    Stand-ins on the path may be any objects; what is returned is a module.
    """
    found: Any = module
    for part in filter(None, fqn.split(".")):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def references(model: nn.Module) -> Counter[int]:
    """How often each module and each parameter, by its id, is a child or a parameter of a module of ``model``."""
    counts: Counter[int] = Counter()
    for module in model.modules():
        counts.update(id(child) for child in module._modules.values() if child is not None)
        counts.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return counts


def all_frozen(module: nn.Module) -> bool:
    """True if ``module`` has parameters, submodules included, and none requires a gradient."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _around(parts: Iterable[nn.Module], model: nn.Module) -> set[nn.Module]:
    """The modules of ``model`` that are one of ``parts`` or have one inside."""
    wanted = set(parts)
    return (
        {module for module in model.modules() if any(inner in wanted for inner in module.modules())}
        if wanted
        else set()
    )


def _items_of_containers(model: nn.Module) -> set[nn.Module]:
    """Return the items of all containers. If PEFT has wrapped an entire item, return the base layer inside."""
    tuner = compat.peft_tuner_layer_type()
    items: set[nn.Module] = set()
    for container in (m for m in model.modules() if is_layer_container(m) or isinstance(m, nn.Sequential)):
        for item in container.children():
            while tuner is not None and isinstance(item, tuner) and isinstance(item.base_layer, nn.Module):
                item = item.base_layer
            if compat.has_implemented_forward(item):
                items.add(item)
    return items


def _layers_by_layout(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model without declarations: ``model.layers`` or ``layers``, else the largest container.

    All items of the container must have a forward and parameters.
    """

    def items(container: nn.Module | None) -> list[nn.Module]:
        if container is None or not is_layer_container(container) or not _usable_items(container)[0]:
            return []
        return list(container.children())

    best = items(submodule(model, "model.layers")) or items(submodule(model, "layers"))
    if not best:
        best = max(map(items, model.modules()), key=len)
    if best:
        logger.info("layers: no _no_split_modules matched; using a container of %d modules", len(best))
    return best


def _final_norm(model: nn.Module, layers: list[nn.Module], projection: nn.Module | None) -> nn.Module | None:
    """Return the norm between the last layer and the output projection: a sibling of the container of the layers.

    If there are several norms, prefer those with the input width of the projection, because the others normalise
    something else (per-layer embeddings). Of these take the first one behind the layers.
    """
    if not layers:
        return None
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    container = parents.get(layers[-1])
    base = parents.get(container) if container is not None else None
    if base is None:
        return None
    children = list(base.children())
    norms = [child for child in children if "norm" in type(child).__name__.lower()]
    width = getattr(projection, "in_features", None)
    fitting = [n for n in norms if width in {p.shape[-1] for p in n.parameters() if p.ndim}] if width else []
    norms = fitting or norms
    behind = [norm for norm in norms if children.index(norm) > children.index(container)]  # type: ignore[arg-type]
    return behind[0] if behind else norms[-1] if norms else None
