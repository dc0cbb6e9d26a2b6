"""Which layers of a model belong to a tower: a forward without images (sound, video) does not run them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

#: Where FSDP2 keeps the parameters of towers; the first is the default.
#: root: with the root, which every forward gathers, so that a rank may leave the tower out while another runs it.
#: layers: each layer a unit, as in the language part; all data-parallel ranks have to run the tower, or none.
#: replicated: frozen parameters whole on every data-parallel rank, trained ones as with root.
PLACEMENTS = ("root", "layers", "replicated")

_TEXT_INPUTS = ("input_ids", "inputs_embeds")
_TEXT_CONFIGS = ("", "text_config")


def find_modality_encoders(model: nn.Module, layers: list[nn.Module], embedding: nn.Module | None) -> list[nn.Module]:
    """The towers of ``model`` (unwrapped), each the largest module around its layers without a layer of the main part.

    The main part is the smallest model around the input embedding that has layers. Of the other layers those are in a
    tower whose own model (the next one around them) does not take text: by its main input, its input modalities, or the
    place of its config, all of which transformers writes down. Encoders with decoders have no towers, since each
    forward runs both.

    Args:
        model: the model.
        layers: its repeated layers.
        embedding: its input embedding; without one there is no main part and no tower.

    Returns:
        The towers in the order of the module tree; none lies in another.
    """
    if embedding is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {id(layer) for layer in layers}
    places = [name for name, module in modules.items() if id(module) in wanted]
    main = _main_part([name for name, module in modules.items() if module is embedding], places)
    if all(_inside(place, main) for place in places):
        return []
    kept = [place for place in places if _inside(place, main) or _takes_text(place, modules, main)]
    towers: dict[str, nn.Module] = {}
    for place in places:
        if place not in kept and not any(_inside(place, [known]) for known in towers):
            owner = _largest_without(place, [*kept, *main])
            towers[owner] = modules[owner]
    return list({id(tower): tower for tower in towers.values()}.values())


def layers_of_modality_encoders(layers: Iterable[nn.Module], towers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of ``layers`` that are in one of ``towers``."""
    inside = {id(module) for tower in towers for module in tower.modules()}
    return [layer for layer in layers if id(layer) in inside]


def _main_part(embeddings: list[str], places: list[str]) -> list[str]:
    """The names of the smallest modules that have a place of the embedding and a layer in them."""
    found = []
    for owner in embeddings:
        while owner:
            owner = owner.rpartition(".")[0]
            if any(_inside(place, [owner]) for place in places):
                found.append(owner)
                break
    return found or [""]


def _inside(name: str, owners: Iterable[str]) -> bool:
    return any(not owner or name == owner or name.startswith(f"{owner}.") for owner in owners)


def _takes_text(place: str, modules: dict[str, nn.Module], main: list[str]) -> bool:
    """True if the layer at ``place`` belongs to a model beside the main part that says it takes text."""
    owner = place
    while owner:
        owner = owner.rpartition(".")[0]
        if any(_inside(part, [owner]) for part in main):
            return False  # nothing between the layer and the whole model says anything
        if hasattr(modules[owner], "main_input_name"):  # a model of transformers, not merely a part with a config
            return _is_of_text(modules[owner])
    return False


def _is_of_text(model: Any) -> bool:
    modalities = getattr(model, "input_modalities", "text")
    return (
        model.main_input_name in _TEXT_INPUTS
        and "text" in ((modalities,) if isinstance(modalities, str) else modalities)
        and getattr(getattr(model, "config", None), "base_config_key", "") in _TEXT_CONFIGS
    )


def _largest_without(place: str, others: list[str]) -> str:
    """The longest way up from ``place`` that has none of ``others`` in it."""
    owner = place
    while (above := owner.rpartition(".")[0]) and not any(_inside(other, [above]) for other in others):
        owner = above
    return owner
