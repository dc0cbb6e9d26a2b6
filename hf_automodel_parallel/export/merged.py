"""Writes a model with its adapters merged into the base weights, layer by layer; the model itself stays unmerged.

On the rank that writes, PEFT's own ``merge`` runs on one layer at a time, with full tensors in place of the shards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.model_view import ModelView
from ..core.rendezvous import rendezvous
from ..core.swap import swapped_parameters
from ..errors import ConfigError, UnsupportedError
from ..tensor_parallel.dora import unsharded_weight_norm
from .files import completed_at_end
from .gathering import Fetch, Progress, Shapes, ShardedState, file_dtypes, shapes_of
from .pretrained import write_pretrained


def save_merged(
    model: nn.Module,
    directory: str | Path,
    adapters: list[str] | None = None,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
) -> None:
    """Write the files of ``model.merge_and_unload().save_pretrained(directory)`` without merging ``model``; collective.

    Args:
        model: a prepared ``PeftModel``, whose shards are gathered one layer at a time, or an unsharded one.
        directory: the model directory to write to.
        adapters: names of the adapters to merge; None for the active ones.
        max_shard_size: largest size of a file, in bytes or as text such as ``"5GB"``.
        variant: file names become ``model.<variant>.safetensors``.

    Raises:
        ConfigError: ``model`` is not a ``PeftModel``, or lacks one of the ``adapters``.
        UnsupportedError: adapters or base weights that cannot be merged layer by layer.
        ExportError: on the other ranks, if the writing rank failed; or a rank did not call it in time.
    """
    if not compat.is_peft_model(model):
        raise ConfigError(f"save_merged() needs a PeftModel; this is a {type(model).__name__}: use save_pretrained().")
    merging = MergedWeights(model, adapters)
    target = Path(directory)

    def write(fetch: Fetch, tensors: Mapping[str, torch.Tensor]) -> None:
        shapes = shapes_of(tensors, file_dtypes(model))
        with completed_at_end(target) as incomplete:
            merging.write(shapes, fetch, incomplete, max_shard_size, variant)

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        state = model.state_dict()
        write(lambda name: state[name].detach().cpu(), state)
        return
    details = {"adapters": adapters, "max_shard_size": max_shard_size, "variant": variant}
    (writer,) = rendezvous("save_merged()", details)
    shards = ShardedState(model, torch.distributed.get_rank() == writer)
    shards.led_by(writer, lambda fetch: write(fetch, shards.tensors))


@dataclass
class _Layer:
    """A PEFT layer and its base module, which holds the merged weights.

    Attributes:
        path: name of ``outer`` in the model, with a trailing dot.
        outer: the outermost PEFT layer.
        tuners: ``outer`` and the PEFT layers nested in it.
        base: the base module inside of them.
        base_path: name of ``base`` in the model, with a trailing dot.
    """

    path: str
    outer: nn.Module
    tuners: list[Any] = field(default_factory=list)
    base: Any = None
    base_path: str = ""


class MergedWeights:
    """Maps weights of the plain model (transformers' model without adapters) to those of a ``PeftModel``, and merges.

    Args:
        model: the ``PeftModel``, sharded or on the meta device.
        adapters: names of those to merge; None for the active ones.
        merge: False for the base weights as they are without adapters.
        call: the user's call, for errors.

    Attributes:
        sources: name in the plain model -> name in the state dict of ``model``.
        layers: name in the plain model -> the layer whose merge yields the weight.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: list[str] | None = None,
        merge: bool = True,
        call: str = "save_merged()",
    ) -> None:
        self.model, self.adapters, self.merge, self.call = model, adapters, merge, call
        unknown = [name for name in adapters or () if name not in model.peft_config]  # type: ignore[operator]
        if unknown:
            known: Any = model.peft_config
            raise ConfigError(f"adapters={adapters!r}: this model has {list(known)}.")
        prompts = [n for n, c in model.peft_config.items() if c.is_prompt_learning]  # type: ignore[union-attr,operator]
        if prompts and merge:
            raise UnsupportedError(
                f"the adapter {prompts[0]!r} is a learned prompt, which cannot be merged into weights."
            )
        view = ModelView.of(model)
        self.inner, self.prefix = view.inner, view.prefix
        if any(getattr(module, "quant_state", None) is not None for module in model.modules()):
            raise UnsupportedError(
                f"{call} with quantised weights is not available: merging quantises them anew. Save the adapter, "
                "load the base model unquantised, and merge there (`hf-automodel-parallel export ... --merge --base`)."
            )
        self.sources: dict[str, str] = {}
        self.layers: dict[str, _Layer] = {}
        self._find()
        self._values: dict[str, torch.Tensor] = {}

    def _find(self) -> None:
        tuner: Any = compat.peft_tuner_layer_type()
        auxiliary: Any = compat.peft_auxiliary_wrapper_type()
        known = set(self.model.state_dict())
        shared: dict[int, _Layer] = {}

        def visit(module: Any, plain: str, path: str) -> None:
            # modules_to_save, trainable tokens: descend to the module that unloading would keep.
            if isinstance(module, auxiliary):
                inside = self._inside_wrapper(module)
                visit(module.get_submodule(inside), plain, f"{path}{inside}.")
                return
            if isinstance(module, tuner):
                layer = _Layer(path, module)
                base: Any = module
                below = path
                while isinstance(base, tuner):
                    layer.tuners.append(base)
                    base, below = base.base_layer, f"{below}base_layer."
                layer.base, layer.base_path = base, below
                if not self.merge:
                    visit(base, plain, below)
                    return
                for name in base.state_dict():
                    if any(isinstance(m, tuner) for m in base.modules()):
                        raise UnsupportedError(
                            f"{path[:-1]}: adapters inside of an adapted layer cannot be merged layer by layer; merge "
                            f"in one process."
                        )
                    self.sources[plain + name], self.layers[plain + name] = below + name, layer
                # Each merge starts from the unmerged weight, so a second adapter on a tied weight would be lost.
                for weight in base.parameters():
                    if shared.setdefault(id(weight), layer) is not layer:
                        raise UnsupportedError(
                            f"{path[:-1]}: two adapters change one tied weight; merge in one process."
                        )
                return
            for name in [*module._parameters, *module._buffers]:
                if path + name in known:
                    self.sources[plain + name] = path + name
                    parameter = module._parameters.get(name)
                    if parameter is not None:
                        tied.setdefault(id(parameter), []).append(plain + name)
            for name, child in module.named_children():
                visit(child, f"{plain}{name}.", f"{path}{name}.")

        tied: dict[int, list[str]] = {}
        visit(self.inner, "", self.prefix)
        for key, layer in shared.items():  # a merged embedding changes the head that is tied to it
            for name in tied.get(key, ()):
                self.layers[name] = layer
                self.sources[name] = next(layer.base_path + n for n, p in layer.base.named_parameters() if id(p) == key)

    def _inside_wrapper(self, wrapper: Any) -> str:
        """Path below one of PEFT's auxiliary wrappers to the module that ``merge_and_unload`` would keep; without a
        merge to the one that PEFT wrapped.
        """
        if hasattr(wrapper, "token_adapter"):
            return "token_adapter" if self.merge else "token_adapter.base_layer"
        if not hasattr(wrapper, "modules_to_save"):
            raise UnsupportedError(f"{self.call} does not know PEFT's {type(wrapper).__name__}; merge in one process.")
        active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save and self.merge]
        return f"modules_to_save.{active[0]}" if active else "original_module"

    def plain_model(self) -> nn.Module:
        """The plain model on the meta device, built from its config.

        Raises:
            UnsupportedError: the model was changed after it was built, so its config does not describe it.
        """
        with torch.device("meta"):
            plain = type(self.inner)(copy.deepcopy(self.inner.config))
        if hasattr(self.inner, "generation_config"):
            plain.generation_config = copy.deepcopy(self.inner.generation_config)
        compat.copy_weight_conversions(self.inner, plain)
        # Weights that the config does not account for would be missing from the files, without an error.
        names = set(plain.state_dict())
        if names != set(self.sources):
            other = sorted(names ^ set(self.sources))[:3]
            raise UnsupportedError(
                f"{self.call}: {type(self.inner).__name__} built from its config and the model under the adapters "
                f"differ in {', '.join(other)}. Merge in one process."
            )
        return plain

    def write(
        self,
        shapes: Shapes,
        fetch: Fetch,
        directory: Path,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write the plain model.

        Args:
            shapes: of the state dict of the model with adapters, with the dtypes in files.
            fetch: returns its full tensors on the CPU.
            directory: an existing directory.
            max_shard_size: largest size of a file, in bytes or as text such as ``"5GB"``.
            variant: file names become ``model.<variant>.safetensors``.
            progress: called with name and bytes of each tensor.
        """
        plain = self.plain_model()
        wanted = {name: shapes[self.sources[name]] for name in plain.state_dict()}
        self._values.clear()
        write_pretrained(
            plain,
            wanted,
            lambda name: self.value(name, fetch).to(wanted[name][1]),
            directory,
            max_shard_size,
            variant,
            progress=progress,
        )

    def value(self, name: str, fetch: Fetch) -> torch.Tensor:
        """The merged weight ``name`` of the plain model, a full tensor on the CPU.

        A merge yields all weights of a layer; the others are kept until they are asked for, or another layer is merged.
        """
        layer = self.layers.get(name)
        if layer is None:
            return fetch(self.sources[name])
        source = self.sources[name]
        if source not in self._values:
            self._values = self._merge(layer, fetch)
        return self._values.pop(source)

    @torch.no_grad()
    def _merge(self, layer: _Layer, fetch: Fetch) -> dict[str, torch.Tensor]:
        # merge() notes the merged adapters on the layer, whose own weights stay unmerged: restore the notes.
        merged_before = [list(tuner.merged_adapters) for tuner in layer.tuners]
        saved = set(layer.outer.state_dict())

        def full(name: str, old: torch.Tensor) -> torch.Tensor | None:
            if name not in saved:  # a non-persistent buffer
                return None
            value = fetch(layer.path + name).clone()  # PEFT merges in place
            return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value

        try:
            with unsharded_weight_norm(layer.outer), swapped_parameters(layer.outer, full, buffers=True):
                for tuner in layer.tuners:
                    type(tuner).merge(tuner, adapter_names=self.adapters)
                return {layer.base_path + n: v.detach() for n, v in layer.base.state_dict().items()}
        finally:
            for tuner, before in zip(layer.tuners, merged_before, strict=True):
                tuner.merged_adapters = before
