"""Converts a training checkpoint to a model, adapter or merged-model directory, tensor by tensor, in one process.

Models are built on the meta device from their configs. They say which tensors there are and how files name them; values
come from the checkpoint, one tensor at a time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..checkpoint.weights import SafetensorsWeights, Weights, open_checkpoint
from ..core.lazy_graph import Named, Node, Recording, assemble
from ..errors import ExportError, without_stop
from .adapters import keep_model_card, write_adapters
from .files import replaced_at_end
from .gathering import Progress, Shapes, cast, shapes_of
from .merged import MergedWeights
from .pretrained import write_pretrained, write_weights

_PEFT_PREFIX = "base_model.model."
#: Patterns of the tokenizer and processor files of a model directory.
_PROCESSOR_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


@dataclass
class Request:
    """Arguments of :func:`export`.

    Attributes:
        checkpoint: the training checkpoint.
        out: the directory to create.
        config: a directory with configs (and a tokenizer), or a ``config.json``; None if the checkpoint has them.
        base: directory of the base model that an adapter was trained on.
        merge: merge the adapter into the base weights.
        adapter: its name, if the checkpoint has several.
        dtype: of floating-point weights in the files; None keeps the dtypes of the checkpoint.
        max_shard_size: largest size of a file, in bytes or as text such as ``"5GB"``.
        force: replace ``out`` if it is not empty.
    """

    checkpoint: Path
    out: Path
    config: Path | None = None
    base: Path | None = None
    merge: bool = False
    adapter: str = "default"
    dtype: torch.dtype | None = None
    max_shard_size: int | str = "50GB"
    force: bool = False


@dataclass
class Summary:
    """Kind of the directory ("model", "adapter" or "merged model"), and numbers of tensors and bytes written."""

    kind: str
    tensors: int = 0
    bytes: int = 0


def export(request: Request, progress: Callable[[str, int, int], None] | None = None) -> Summary:
    """Create the directory that ``request`` describes; it appears when it is complete.

    Args:
        request: the arguments.
        progress: called for each tensor with its name, its bytes, and the bytes of all tensors of the checkpoint.

    Raises:
        ExportError: something is missing or does not match; nothing was changed.
        CheckpointError: a file of the checkpoint is damaged or malicious.
    """
    if request.out.exists() and not request.out.is_dir():
        raise ExportError(f"{request.out} is a file. Give a directory that does not exist yet.")
    if request.out.is_dir() and any(request.out.iterdir()) and not request.force:
        raise ExportError(f"{request.out} is not empty. Give another directory, or --force to replace it.")
    weights, beside = open_checkpoint(request.checkpoint)
    adapters = any("lora_" in n or n.startswith(_PEFT_PREFIX) for n in weights.shapes)
    summary = Summary("merged model" if request.merge else "adapter" if adapters else "model")
    total = sum(_bytes(entry) for entry in weights.shapes.values())

    def count(name: str, size: int) -> None:
        summary.tensors += 1
        summary.bytes += size
        if progress is not None:
            progress(name, size, total)

    if not adapters and (request.merge or request.base is not None):
        raise ExportError(f"{request.checkpoint} holds an entire model and no adapter; leave out --merge and --base.")
    if request.base is not None and not request.merge:
        raise ExportError("--base is the model to merge into; give --merge with it, or leave it out.")
    with replaced_at_end(request.out) as out:
        if not adapters:
            _model(request, weights, beside, out, count)
        elif not request.merge:
            _adapter(request, weights, beside, out, count)
        else:
            _merged(request, weights, beside, out, count)
    return summary


def _bytes(entry: tuple[Iterable[int], torch.dtype]) -> int:
    return torch.Size(entry[0]).numel() * entry[1].itemsize


def _with_dtype(shapes: Shapes, dtype: torch.dtype | None) -> dict[str, Any]:
    """``shapes`` with ``dtype`` for all floating-point tensors; unchanged if it is None."""
    return {n: (s, dtype if dtype is not None and d.is_floating_point else d) for n, (s, d) in shapes.items()}


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(request: Request, weights: Weights, beside: Path, out: Path, count: Progress) -> None:
    model = empty_model(_config_directory(request, beside, "config.json"), request)
    shapes = _in_order(model, weights.shapes, request.checkpoint)
    shapes = _with_dtype(shapes, request.dtype)
    write_pretrained(model, shapes, cast(weights.fetch, shapes), out, request.max_shard_size, progress=count)
    _copy_processor_files([request.config, beside], out)


def _in_order(model: nn.Module, shapes: Shapes, where: Path) -> dict[str, Any]:
    """``shapes`` in the order of the model's state dict; the order determines how the files are split."""
    state = model.state_dict()
    ordered = {name: shapes[name] for name in state if name in shapes}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    # A tied tensor is present if the checkpoint has it under any of its names.
    present = {name for names in tied.values() if any(n in shapes for n in names) for name in names}
    missing = [name for name in state if name not in shapes and name not in present]
    unexpected = [name for name in shapes if name not in state]
    wrong = [name for name, (shape, _) in ordered.items() if torch.Size(shape) != state[name].shape]
    for text, names in (("lacks", missing), ("has unknown", unexpected), ("has other shapes of", wrong)):
        if names:
            raise ExportError(
                f"{where} does not fit the config of {type(model).__name__}: it {text} {', '.join(names[:3])}"
                f"{', ...' if names[3:] else ''} ({len(names)} in all). Give the right one with --config."
            )
    return ordered


def empty_model(directory: Path | str, request: Request | None = None) -> nn.Module:
    """The model that the config in ``directory`` describes, on the meta device, with its generation config."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"cannot read a model's config from {directory}: {without_stop(error)}. Give one with --config."
        ) from error
    name = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, name, None)
    if name and cls is None:
        raise ExportError(
            f"{directory}: the architecture {name!r} is not a class of transformers; a model with custom code is "
            f"exported in the training job with model.save_pretrained()."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config) if cls is None else cls(config)
    if Path(directory, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _config_directory(request: Request, beside: Path, file: str) -> Path:
    """The directory that has ``file``: that of ``--config``, else ``beside`` the checkpoint's weights."""
    for candidate in (request.config, beside):
        if candidate is None:
            continue
        folder = candidate.parent if candidate.is_file() else candidate
        if (folder / file).is_file():
            return folder
        if candidate is request.config and candidate.is_file():
            raise ExportError(f"--config {candidate} is not a {file}.")
    raise ExportError(f"there is no {file} in {beside}. Give the directory that has one with --config.")


def _copy_processor_files(folders: Iterable[Path | None], out: Path) -> None:
    for folder in folders:
        if folder is None or not folder.is_dir():
            continue
        found = [path for pattern in _PROCESSOR_FILES for path in folder.glob(pattern) if path.is_file()]
        for path in found:
            shutil.copy2(path, out / path.name)
        if found:
            return


# ---- adapters --------------------------------------------------------------------------------------------------------


def _adapter_config(request: Request, beside: Path) -> tuple[Path, Any]:
    """The directory that has ``adapter_config.json``, and the config."""
    from peft import PeftConfig

    name = request.adapter
    for folder in (f for f in (request.config, beside) if f is not None):
        for directory in (folder / name, folder):
            if (directory / "adapter_config.json").is_file():
                return directory, PeftConfig.from_pretrained(directory)
    raise ExportError(f"there is no adapter_config.json in {beside}. Give the directory that has one with --config.")


def _with_adapter(request: Request, beside: Path, config: Any) -> nn.Module:
    """The model with its adapter, on the meta device."""
    from peft import get_peft_model

    for source in (request.base, request.config, beside, config.base_model_name_or_path):
        if source is None or (isinstance(source, Path) and not (source / "config.json").is_file()):
            continue
        base = empty_model(source)
        base.name_or_path = config.base_model_name_or_path or ""  # type: ignore[assignment]
        # PEFT freezes an adapter in inference mode; trainable parameters are those that the checkpoint has to hold.
        config.inference_mode = False
        with torch.device("meta"):
            return get_peft_model(base, config, adapter_name=request.adapter, low_cpu_mem_usage=True)
    raise ExportError(
        "the config of the base model is not known. Give its directory with --config (or --base with --merge)."
    )


def _named_by_file(shapes: Mapping[str, Any], adapter: str) -> bool:
    """True if the keys are those of PEFT's files, without the adapter's name; Accelerate saves sharded adapters so."""
    return not any(adapter in name.split(".") for name in shapes)


def _adapter(request: Request, weights: Weights, beside: Path, out: Path, count: Progress) -> None:
    folder, config = _adapter_config(request, beside)
    shapes = _with_dtype(weights.shapes, request.dtype)
    fetch = cast(weights.fetch, shapes)
    if _named_by_file(shapes, request.adapter):
        recording = Recording()
        state = recording.declare(dict(sorted(shapes.items())))
        # No size limit: PEFT reads an adapter from one file.
        write_weights(recording, state, fetch, out, "adapter_model.safetensors", 2**62, count)
        config.inference_mode = True
        config.save_pretrained(out)
    else:
        model = _with_adapter(request, beside, config)
        missing = [
            name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in shapes
        ]
        if missing:
            raise ExportError(
                f"{request.checkpoint} lacks {', '.join(missing[:3])} ({len(missing)} in all) of the adapter "
                f"{request.adapter!r}. Name the right adapter with --adapter, or its config with --config."
            )

        def counted(name: str) -> torch.Tensor:
            value = fetch(name)
            count(name, value.nbytes)
            return value

        write_adapters(model, shapes, counted, out, {"selected_adapters": [request.adapter]})
        if request.adapter != "default":
            _lift(out / request.adapter, out)
    keep_model_card(folder, out)
    _copy_processor_files([request.config, beside], out)


def _lift(folder: Path, out: Path) -> None:
    """Move the files of ``folder`` up: PEFT writes a named adapter to a folder, but here it is the only one."""
    for path in list(folder.iterdir()):
        path.replace(out / path.name)
    folder.rmdir()


# ---- merged ----------------------------------------------------------------------------------------------------------


def _merged(request: Request, weights: Weights, beside: Path, out: Path, count: Progress) -> None:
    _, config = _adapter_config(request, beside)
    base = request.base
    # Frozen base weights have names with `.base_layer.`; a checkpoint that has them needs no base model.
    complete = any("lora_" not in n and ".base_layer." in n for n in weights.shapes)
    # Only a local directory: weights of a base model are not downloaded.
    if base is None and not complete:
        named = config.base_model_name_or_path
        base = Path(named) if named and Path(named).is_dir() else None
        if base is None:
            raise ExportError(
                f"{request.checkpoint} holds the adapter alone. Give the model it was trained on with --base."
            )
    files = None if base is None or complete else SafetensorsWeights(base)
    model = _with_adapter(request, beside, config)
    merging = MergedWeights(model, [request.adapter])
    from_files = {} if files is None else _from_files(merging.plain_model(), files)
    plain_names = {source: name for name, source in merging.sources.items()}
    names = _file_names(model, weights.shapes, request.adapter)
    known: dict[str, Callable[[], torch.Tensor]] = {}
    shapes: dict[str, Any] = {}
    for name, stand_in in model.state_dict().items():
        plain, own = plain_names.get(name, ""), names.get(name, name)
        if own in weights.shapes:
            shapes[name] = weights.shapes[own]
            known[name] = functools.partial(weights.fetch, own)
        elif plain in from_files:
            shapes[name], known[name] = from_files[plain]
        else:  # tied to another weight, or missing, which fetch() below reports
            shapes[name] = (stand_in.shape, stand_in.dtype)
        if torch.Size(shapes[name][0]) != stand_in.shape:
            raise ExportError(
                f"{name} has the shape {tuple(shapes[name][0])} in {base or request.checkpoint} and "
                f"{tuple(stand_in.shape)} by the config of the base model. Give the right base model with --base."
            )

    def fetch(name: str) -> torch.Tensor:
        if name not in known:
            raise ExportError(
                f"neither {request.checkpoint} nor {base} has {name}. Give the right base model with --base."
            )
        return known[name]()

    merging.write(_with_dtype(shapes, request.dtype), fetch, out, request.max_shard_size, progress=count)
    _copy_processor_files([request.config, beside, base], out)


def _from_files(plain: nn.Module, files: SafetensorsWeights) -> dict[str, tuple[Any, Callable[[], torch.Tensor]]]:
    """Shape, dtype and value of each weight of ``plain``, by name.

    Files may have other names and shapes (one weight per expert, say). So transformers' conversion for saving runs on
    meta tensors, and the recorded graph is inverted. Weights that the files lack are left out.
    """
    recording = Recording()
    state = recording.declare(shapes_of(plain.state_dict()))
    leaves: dict[str, Any] = {name: recording.node(tensor) for name, tensor in state.items()}
    with recording:
        made = compat.as_in_files(plain, compat.without_tied_duplicates(plain, dict(state)))
    made_of: dict[str, dict[str, Node]] = {}
    for name, tensor in made.items():
        for leaf in recording.names(tensor):
            made_of.setdefault(leaf, {})[name] = recording.node(tensor)
    found: dict[str, tuple[Any, Callable[[], torch.Tensor]]] = {}
    for leaf, results in made_of.items():
        if all(n in files.shapes and files.shapes[n][0] == node.shape for n, node in results.items()):
            dtype = files.shapes[next(iter(results))][1]
            value = functools.partial(_from_results, leaves[leaf], results, files)
            found[leaf] = (leaves[leaf].shape, dtype), value
    return found


def _from_results(leaf: Named, results: dict[str, Node], files: SafetensorsWeights) -> torch.Tensor:
    return assemble(leaf, results, {name: files.fetch(name) for name in results})


def _file_names(model: nn.Module, shapes: Mapping[str, Any], adapter: str) -> dict[str, str]:
    """Name in the model -> key of the checkpoint, if its keys are those of PEFT's files; else empty."""
    if not _named_by_file(shapes, adapter):
        return {}
    recording = Recording()
    state = recording.declare(shapes_of(model.state_dict()))
    with recording:
        picked = compat.adapter_state(model, state, adapter, "auto")
    return {leaf: name for name, value in picked.items() for leaf in recording.names(value)}
