"""Find the modality encoders (vision, audio) of a model: a forward without such inputs does not run their layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

#: Placement of the parameters of modality encoders in FSDP2; the first is the default.
#: root: in the root's param group, which every forward all-gathers, so that only some ranks may run the encoder.
#: layers: an FSDP unit for each layer, as in the language model; all data-parallel ranks run the encoder, or none.
#: replicated: frozen parameters are replicated on each data-parallel rank, trained ones are placed as with root.
EncoderPlacement = Literal["root", "layers", "replicated"]
PLACEMENTS: tuple[str, ...] = get_args(EncoderPlacement)

_TEXT_INPUTS = ("input_ids", "inputs_embeds")
_TEXT_CONFIGS = ("", "text_config")


def find_modality_encoders(model: nn.Module, layers: list[nn.Module], embedding: nn.Module | None) -> list[nn.Module]:
    """Find the modality encoders of ``model``: each the largest module with layers that has no main layer inside.

    The main model is the smallest module around the input embedding that has layers. A layer outside of it belongs to a
    modality encoder if the closest transformers model around it does not take text. transformers declares that in
    ``main_input_name``, ``input_modalities`` and the config's ``base_config_key``. Encoder-decoder models have no
    modality encoders, because each forward runs both parts.

    Args:
        model: the model, without PEFT wrappers.
        layers: its repeated layers.
        embedding: its input embedding. Without one there is no main model, and the result is empty.

    Returns:
        The encoders in the order of the module tree. None of them contains another one.
    """
    if embedding is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {id(layer) for layer in layers}
    layer_names = [name for name, module in modules.items() if id(module) in wanted]
    main = _main_part([name for name, module in modules.items() if module is embedding], layer_names)
    if all(_inside(layer_name, main) for layer_name in layer_names):
        return []
    kept = [
        layer_name for layer_name in layer_names if _inside(layer_name, main) or _takes_text(layer_name, modules, main)
    ]
    towers: dict[str, nn.Module] = {}
    for layer_name in layer_names:
        if layer_name not in kept and not any(_inside(layer_name, [known]) for known in towers):
            owner = _largest_without(layer_name, [*kept, *main])
            towers[owner] = modules[owner]
    return list({id(tower): tower for tower in towers.values()}.values())


def layers_of_modality_encoders(layers: Iterable[nn.Module], towers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the ``layers`` that lie in one of the modality encoders ``towers``."""
    inside = {id(module) for tower in towers for module in tower.modules()}
    return [layer for layer in layers if id(layer) in inside]


def _main_part(embeddings: list[str], layer_names: list[str]) -> list[str]:
    """Names of the main models: for each name of the embedding the smallest module around it that also has a layer."""
    found = []
    for owner in embeddings:
        while owner:
            owner = owner.rpartition(".")[0]
            if any(_inside(layer_name, [owner]) for layer_name in layer_names):
                found.append(owner)
                break
    return found or [""]


def _inside(name: str, owners: Iterable[str]) -> bool:
    return any(not owner or name == owner or name.startswith(f"{owner}.") for owner in owners)


def _takes_text(layer_name: str, modules: dict[str, nn.Module], main: list[str]) -> bool:
    """True if the closest model around the layer ``layer_name`` is not a main model and declares that it takes text."""
    owner = layer_name
    while owner:
        owner = owner.rpartition(".")[0]
        if any(_inside(part, [owner]) for part in main):
            return False  # no transformers model between the layer and the main model
        if hasattr(modules[owner], "main_input_name"):  # a PreTrainedModel, not only a module with a config
            return _is_of_text(modules[owner])
    return False


def _is_of_text(model: Any) -> bool:
    modalities = getattr(model, "input_modalities", "text")
    return (
        model.main_input_name in _TEXT_INPUTS
        and "text" in ((modalities,) if isinstance(modalities, str) else modalities)
        and getattr(getattr(model, "config", None), "base_config_key", "") in _TEXT_CONFIGS
    )


def _largest_without(layer_name: str, others: list[str]) -> str:
    """Name of the largest module around ``layer_name`` that contains none of ``others``."""
    owner = layer_name
    while (above := owner.rpartition(".")[0]) and not any(_inside(other, [above]) for other in others):
        owner = above
    return owner
