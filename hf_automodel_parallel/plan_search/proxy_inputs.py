"""Batches for a forward of a tiny proxy model, built from its signature, its ``main_input_name`` and its config.

Signatures do not show everything (that multiple choice has one more dimension, whether sound comes as frames of
frequencies or as frequencies over frames, that a classifier reads the end of the text), so there are several
batches, the most usual one first. The first that the model runs is the one to use.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from .proxy_model import BATCH, LENGTH, PIXELS, VOCABULARY

#: Choices of a multiple-choice batch, and frames of sound.
CHOICES, FRAMES = 2, 100
#: Batches that are tried.
_TRIED = 12

Inputs = dict[str, Any]


def possible_inputs(model: nn.Module, length: int = LENGTH) -> Iterator[Inputs]:
    """Batches that a forward of a proxy model may take, the most usual one first, at most :data:`_TRIED`.

    Args:
        model: the proxy model; its forward's signature, its class's ``main_input_name`` and its config are read.
        length: number of tokens in each row, where the model takes tokens.

    Yields:
        Keyword arguments: int64 token ids of shape (BATCH, length) with padding in one row, float32 images
        (BATCH, channels, height, width), sound, boxes, or series.

    Raises:
        PlanError: the forward needs an argument that is none of these; with its name.
    """
    arguments = inspect.signature(model.forward).parameters
    builder = _Builder(model, length)
    kinds = builder.kinds()
    known = [name for name in arguments if name in kinds]
    required = [
        name
        for name, p in arguments.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if unknown := [name for name in required if name not in kinds]:
        raise PlanError(f"the forward of {type(model).__name__} needs {unknown[0]}, and no values for it are known.")
    main = getattr(type(model), "main_input_name", "input_ids")
    first = [name for name in known if name in required or name in (main, "input_ids" if main not in known else main)]
    if not known:
        raise PlanError(
            f"the forward of {type(model).__name__} takes none of {', '.join(kinds)}, so no plan of it can be verified."
        )
    seen: list[list[str]] = []
    batches: list[Iterator[Inputs]] = []
    for names in (first or known, known):
        if names not in seen:
            seen.append(names)
            batches.append(_combined(kinds, names, set(arguments)))
    yield from itertools.islice(itertools.chain(*batches), _TRIED)


def labelled(model: nn.Module, inputs: Inputs) -> Inputs:
    """``inputs`` with labels of the first shape and dtype that ``model`` runs with; as they are if there is none."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    classes = torch.arange(BATCH) % 2
    tokens = [inputs[name] % 2 for name in ("decoder_input_ids", "input_ids") if name in inputs]
    for labels in (*tokens, classes, classes.float()):
        try:
            model(**inputs, labels=labels)
        except Exception:  # code of the model
            continue
        return {**inputs, "labels": labels}
    return inputs


def _combined(kinds: dict[str, list[Inputs]], names: list[str], accepted: set[str]) -> Iterator[Inputs]:
    """Every combination of the alternatives for ``names``, without arguments that are not in ``accepted``."""
    groups: list[list[Inputs]] = []
    for name in names:
        if not any(kinds[name] is group for group in groups):
            groups.append(kinds[name])
    for choice in itertools.product(*groups):
        batch = {key: value for part in choice for key, value in part.items() if key in accepted}
        if "use_cache" in accepted:
            batch["use_cache"] = False
        yield batch


class _Builder:
    """Tensors for one proxy model."""

    def __init__(self, model: nn.Module, length: int) -> None:
        self.length = length
        config: Any = getattr(model, "config", None)
        self.fields = _flat(config.to_dict()) if hasattr(config, "to_dict") else {}
        self.generator = torch.Generator().manual_seed(1)

    def kinds(self) -> dict[str, list[Inputs]]:
        """Argument of a forward -> the alternatives for it and for those that belong to it."""
        text, pixels, features, raw = self.text(), self.pixels(), self.features(), self.raw()
        series = self.series()
        return {
            "input_ids": text,
            "bbox": text,
            "decoder_input_ids": self.decoder(),
            "pixel_values": pixels,
            "input_features": features,
            "input_values": raw + [{"input_values": f["input_features"]} for f in features],
            **dict.fromkeys(
                ("past_values", "past_time_features", "past_observed_mask", "future_time_features"), series
            ),
        }

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(4, VOCABULARY, shape, generator=self.generator)

    def size(self, *names: str, default: int = 0) -> int:
        """The first of the config's fields ``names`` that is a size; of a pair the first."""
        for name in names:
            value = self.fields.get(name)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if type(value) is int and value > 0:
                return value
        return default

    def text(self) -> list[Inputs]:
        """Token ids as they are, with the end of the text, and one set for each of several choices."""
        ids = self.ids(BATCH, self.length)
        mask = torch.ones_like(ids)
        mask[0, self.length - 2 :] = 0
        corners = torch.randint(0, 20, (BATCH, self.length, 4), generator=self.generator).sort(-1).values
        plain = {"input_ids": ids, "attention_mask": mask, "bbox": corners, "decoder_input_ids": ids.flip(1)}
        ended = ids.clone()
        ended[torch.arange(BATCH), mask.sum(1) - 1] = self.size("eos_token_id", default=2)
        choices = {
            name: value.unsqueeze(1).repeat(1, CHOICES, *[1] * (value.ndim - 1)) for name, value in plain.items()
        }
        choices["input_ids"][:, 1:] = choices["input_ids"][:, 1:].flip(2)
        return [plain, plain | {"input_ids": ended}, choices]

    def decoder(self) -> list[Inputs]:
        return [{"decoder_input_ids": self.ids(BATCH, self.length).flip(1)}]

    def pixels(self) -> list[Inputs]:
        """Images, or videos of them; the size that the config has, or any."""
        height = width = self.size("image_size", "img_size", "input_size", default=PIXELS)
        for name in ("image_size", "img_size"):
            pair = self.fields.get(name)
            if isinstance(pair, (list, tuple)) and len(pair) == 2:
                height, width = pair
        channels = self.size("num_channels", "in_channels", "in_chans", default=3)
        frames = self.size("num_frames", "frames_per_clip")
        image = {"pixel_values": self.random(BATCH, channels, height, width)}
        video = {"pixel_values": self.random(BATCH, frames or 2, channels, height, width)}
        return [video, image] if frames else [image, video]

    def features(self) -> list[Inputs]:
        """Frequencies over time, and time over frequencies."""
        bins = self.size(
            "num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim", default=80
        )
        positions = self.size("max_source_positions")
        frames = (
            2 * positions if positions and "num_mel_bins" in self.fields else self.size("max_length", default=FRAMES)
        )
        frames = frames if frames > 20 else FRAMES
        return [
            {"input_features": self.random(BATCH, bins, frames)},
            {"input_features": self.random(BATCH, frames, bins)},
        ]

    def raw(self) -> list[Inputs]:
        """Samples of sound, so many that the convolutions leave some tens of frames."""
        strides = self.fields.get("conv_stride") or self.fields.get("strides")
        product = math.prod(strides) if isinstance(strides, (list, tuple)) else 320
        samples = 30 * product
        return [{"input_values": self.random(BATCH, samples)}, {"input_values": self.random(BATCH, 1, samples)}]

    def series(self) -> list[Inputs]:
        """The past of a series, with its times."""
        lags = self.fields.get("lags_sequence") or [0]
        ahead = self.size("prediction_length", default=1)
        past = self.size("context_length", "prediction_length", default=self.length) + max(lags)
        several = (self.size("num_input_channels", "input_size", default=1),)
        times = self.fields.get("num_time_features", 1)
        result = []
        for tail in ((), several):
            values = self.random(BATCH, past, *tail)
            result.append(
                {
                    "past_values": values,
                    "past_time_features": self.random(BATCH, past, times),
                    "past_observed_mask": torch.ones_like(values),
                    "future_time_features": self.random(BATCH, ahead, times),
                    "future_values": self.random(BATCH, ahead, *tail),
                }
            )
        return result


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of a config, of the outer ones first."""
    found: dict[str, Any] = {}
    pending = [fields]
    while pending:
        for name, value in pending.pop(0).items():
            if isinstance(value, dict):
                pending.append(value)
            elif value is not None:
                found.setdefault(name, value)
    return found
