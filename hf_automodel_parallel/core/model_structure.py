"""Where the repeated layers of a model are: the units of FSDP2 and the regions of tensor parallelism."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .. import compat
from ..errors import ConfigError, UnsupportedError
from .modality_encoders import find_modality_encoders, layers_of_modality_encoders
from .model_view import ModelView

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelStructure:
    """The parts of a model that sharding treats apart.

    Attributes:
        layers: the repeated layers in forward order, each once.
        embedding: the input embedding, if any.
        head: modules at the end that are used together (final norm and output projection), may be empty.
        tied: the output projection shares its weight with the input embedding.
        towers: parts that only some forwards run (vision towers), each the module around some of ``layers``.
        skipped: layers outside of towers that a forward of text alone skips.
    """

    layers: list[nn.Module]
    embedding: nn.Module | None
    head: list[nn.Module]
    tied: bool
    towers: list[nn.Module] = field(default_factory=list)
    skipped: list[nn.Module] = field(default_factory=list)

    @property
    def tower_layers(self) -> list[nn.Module]:
        """Those of ``layers`` that are in towers."""
        return layers_of_modality_encoders(self.layers, self.towers)

    @property
    def main_layers(self) -> list[nn.Module]:
        """Those of ``layers`` that every forward runs."""
        others = {id(layer) for layer in (*self.tower_layers, *self.skipped)}
        return [layer for layer in self.layers if id(layer) not in others]


def find_structure(model: nn.Module, layer_classes: list[str] | None = None) -> ModelStructure:
    """Find layers, embedding and head of ``model``.

    Args:
        model: the model, plain or PEFT-wrapped.
        layer_classes: class names of the layers if the user gave them, else ``_no_split_modules`` and, failing that,
            the longest ``ModuleList`` are used.

    Raises:
        ConfigError: a class name given by the user does not occur in the model.
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
    """The repeated layers of ``model`` in the order of its module tree, without duplicates; empty if there are none.

    Without ``layer_classes`` they are found by what the model says of itself: ``_no_split_modules`` of it and of every
    model inside of it (both towers of a vision-language model), and transformers' base class of layers. A layer is an
    item of a container (``ModuleList``, ``Sequential``, or the ``ModuleDict`` keyed by numbers that a pipeline split
    leaves): some models list attentions, embeddings or whole towers as not to be split, too; the former stand for the
    layer around them. Only if nothing of this is found, the largest container is taken.
    """
    if layer_classes:
        return _layers_of_classes(model, set(layer_classes))
    wanted, layer_type = compat.no_split_module_names(model), compat.transformers_layer_type()
    items = _items_of_containers(model)
    around: dict[nn.Module, nn.Module] = {}  # module -> the item of a container that it is or lies in
    hits = []
    for module in model.modules():  # parents come before children
        if module in items:
            around[module] = module
        for child in module.children():
            if module in around:
                around.setdefault(child, around[module])
        named = any(cls.__name__ in wanted for cls in type(module).__mro__)  # FSDP2 extends the class
        if named or (module in items and layer_type is not None and isinstance(module, layer_type)):
            hits.append(module)
    hits = [m for m in hits if any(True for _ in m.parameters())]
    found = list(dict.fromkeys(around[m] for m in hits if m in around)) or hits
    inside = {inner for layer in found for inner in layer.modules() if inner is not layer}
    return [layer for layer in found if layer not in inside] or _layers_by_layout(model)


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


def is_layer_container(module: nn.Module) -> bool:
    """True for a ``ModuleList``, and for a ``ModuleDict`` whose keys are numbers, into which pipeline splitting turns
    one.
    """
    if isinstance(module, nn.ModuleDict):
        return len(module) > 0 and all(key.isdigit() for key in module)
    return isinstance(module, nn.ModuleList)


def largest_container(model: nn.Module) -> nn.ModuleList | nn.ModuleDict | None:
    """The container (:func:`is_layer_container`) in ``model`` with the most modules, the first of equal ones; None if
    there is none with a module in it."""
    containers = [m for m in model.modules() if is_layer_container(m) and any(True for _ in m.children())]
    return max(containers, key=lambda m: len(list(m.children())), default=None)  # type: ignore[arg-type,return-value]


def model_layers(model: nn.Module) -> list[nn.Module]:
    """All layers of ``model``, plain or PEFT-wrapped: those of every tower, see :func:`find_layers`.

    Raises:
        UnsupportedError: there are none.
    """
    inner = ModelView.of(model).inner
    layers = find_layers(inner)
    if not layers and (container := largest_container(inner)) is not None:
        layers = list(container.children())
    if not layers:
        raise UnsupportedError(
            f"{type(inner).__name__} has no repeated layers: no module of a class in _no_split_modules and no "
            f"ModuleList. Give the class a _no_split_modules with the class names of its layers."
        )
    return layers


def submodule(module: nn.Module, fqn: str) -> nn.Module | None:
    """The module at the dotted path ``fqn`` below ``module`` ("" is itself), None if there is no module of that
    name.
    """
    try:
        return module.get_submodule(fqn)
    except AttributeError:
        return None


def all_frozen(module: nn.Module) -> bool:
    """True if there are parameters below ``module`` and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _items_of_containers(model: nn.Module) -> set[nn.Module]:
    """The modules that containers hold; of one that PEFT has wrapped whole, the one inside, whose forward is the
    layer's.
    """
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
    """The layers of a model that says nothing of itself: where they usually are, else the largest container of such
    modules.
    """

    def items(container: nn.Module | None) -> list[nn.Module]:
        if container is None or not is_layer_container(container):
            return []
        children = list(container.children())
        usable = all(compat.has_implemented_forward(m) and any(True for _ in m.parameters()) for m in children)
        return children if usable else []

    best = items(submodule(model, "model.layers")) or items(submodule(model, "layers"))
    if not best:
        best = max(map(items, model.modules()), key=len)
    if best:
        logger.info("layers: no _no_split_modules matched; using a container of %d modules", len(best))
    return best


def _final_norm(model: nn.Module, layers: list[nn.Module], projection: nn.Module | None) -> nn.Module | None:
    """The norm between the last layer and the output projection: a sibling of the list that holds the layers.

    Of several, one as wide as what the projection reads (others normalise something else, as per-layer embeddings), and
    of these the first behind the layers.
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
