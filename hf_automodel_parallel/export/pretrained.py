"""Model files of ``save_pretrained`` and ``Accelerator.save_model``, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import compat
from ..core.lazy_graph import Recording, StreamingEvaluator
from .adapters import keep_model_card, write_adapters, write_own_adapter
from .files import completed_at_end
from .gathering import Fetch, Progress, Shapes, ShardedState, cast, file_dtypes, shapes_of
from .safetensors_writer import SafetensorsWriter


def write_model(
    model: nn.Module,
    directory: Path,
    options: Mapping[str, Any],
    shards: ShardedState,
    fetch: Fetch,
    weights: bool = True,
) -> list[Path]:
    """Write the files that ``model.save_pretrained`` writes in one process; called on the writing rank only.

    Args:
        model: a sharded ``PeftModel``, or a sharded transformers model with or without adapters of its own.
        directory: the files appear in it when all are complete.
        options: of ``save_pretrained``.
        shards: the sharded state dict.
        fetch: returns its full tensors on the CPU.
        weights: False to write only configs.

    Returns:
        The written files, relative to ``directory``.
    """
    dtypes = file_dtypes(model)
    shapes = shapes_of(shards.tensors, dtypes)
    fetch = cast(fetch, shapes)
    with completed_at_end(directory) as incomplete:
        if not weights:
            _write_configs_only(model, incomplete, next(iter(dtypes.values()), None))
        elif compat.is_peft_model(model):
            keep_model_card(directory, incomplete)
            write_adapters(model, shapes, fetch, incomplete, options)
        elif compat.carries_adapters(model):
            write_own_adapter(model, shapes, fetch, incomplete, options)
        else:
            options = {name: value for name, value in options.items() if name != "save_peft_format"}
            write_pretrained(model, shapes, fetch, incomplete, **options)
        return [path.relative_to(incomplete) for path in incomplete.rglob("*") if path.is_file()]


def _write_configs_only(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> None:
    if not compat.is_peft_model(model):
        write_configs(model, directory, dtype)
        return
    for name, config in model.peft_config.items():  # type: ignore[operator,union-attr]
        config.save_pretrained(directory if name == "default" else directory / name)


def write_pretrained(
    model: nn.Module,
    shapes: Shapes,
    fetch: Fetch,
    directory: Path,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write config, generation config, weights and index of a transformers model into ``directory``.

    Args:
        model: for its configs, tied weights and weight conversions; its values are not read.
        shapes: of the state dict, in its order, with the dtypes in files.
        fetch: returns full tensors on the CPU, in these dtypes.
        directory: an existing directory.
        max_shard_size: largest size of a file, in bytes or as text such as ``"5GB"``.
        variant: file names become ``model.<variant>.safetensors``.
        save_original_format: convert to the names and shapes of this architecture's published files.
        progress: called with name and bytes of each tensor.
    """
    write_configs(model, directory, next((d for _, d in shapes.values() if d.is_floating_point), None))
    recording = Recording()
    state = as_saved(model, shapes, recording, save_original_format)
    name = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
    index = write_weights(recording, state, fetch, directory, name, max_shard_size, progress)
    if index is not None:
        index["metadata"] = {"total_parameters": model.num_parameters(), **index["metadata"]}  # type: ignore[operator]
        file = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
        _write_json(directory / file, index)


def as_saved(
    model: nn.Module, shapes: Shapes, recording: Recording, save_original_format: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors that ``save_pretrained`` writes, by their names in files, on the meta device.

    Args:
        model: see :func:`write_pretrained`.
        shapes: of the state dict.
        recording: records how they are computed from the entries of the state dict.
        save_original_format: see :func:`write_pretrained`.
    """
    state = recording.declare(shapes)
    with recording:
        for name in compat.names_not_saved(model):
            state.pop(name, None)
        state = compat.without_tied_duplicates(model, state)
        return compat.as_in_files(model, state) if save_original_format else state


def write_state(
    shapes: Shapes, fetch: Fetch, directory: Path, max_shard_size: int | str, safe_serialization: bool = True
) -> None:
    """Write weights and index as ``Accelerator.save_model`` does: under the names of the state dict, not converted.

    Args:
        shapes: of the state dict, without the further names of tied tensors, with the dtypes in files.
        fetch: returns full tensors on the CPU, in these dtypes.
        directory: an existing directory.
        max_shard_size: largest size of a file, in bytes or as text such as ``"5GB"``.
        safe_serialization: False for ``torch.save``, which needs all tensors of a file in memory.
    """
    recording = Recording()
    state = recording.declare(shapes)
    if safe_serialization:
        index = write_weights(recording, state, fetch, directory, "model.safetensors", max_shard_size)
        if index is not None:
            _write_json(directory / "model.safetensors.index.json", index)
        return
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="pytorch_model{suffix}.bin",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        torch.save({name: fetch(name) for name in names}, directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(directory / "pytorch_model.bin.index.json", index)


def write_weights(
    recording: Recording,
    state: Mapping[str, torch.Tensor],
    fetch: Fetch,
    directory: Path,
    name: str,
    max_shard_size: int | str,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Write safetensors files, one tensor at a time.

    Args:
        recording: the lazy graph of the code that computed ``state``.
        state: name in the files -> tensor on the meta device.
        fetch: returns the full tensors that ``recording`` declares, on the CPU.
        directory: an existing directory.
        name: file name; several files get a suffix before the extension.
        max_shard_size: largest size of a file, in bytes or as text such as ``"5GB"``.
        progress: called with name and bytes of each tensor.

    Returns:
        The content of the index; None if there is one file.
    """
    split = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=_storage_id,
        filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    order = [(file, tensor) for file, tensors in split.filename_to_tensors.items() for tensor in tensors]
    evaluator = StreamingEvaluator((recording.node(state[tensor]) for _, tensor in order), fetch)
    with _writers(directory, split.filename_to_tensors, state) as writer:
        for file, tensor in order:
            value = evaluator.compute(recording.node(state[tensor]))
            writer(file).write(tensor, value)
            if progress is not None:
                progress(tensor, value.nbytes)
            del value  # before the next one is computed
    if not split.is_sharded:
        return None
    return {"metadata": dict(split.metadata), "weight_map": split.tensor_to_filename}


def _storage_id(tensor: torch.Tensor) -> int:
    """Equal for meta tensors that are views of one storage; the split puts these into one file, as in one process."""
    return StorageWeakRef(tensor.untyped_storage()).cdata


@contextmanager
def _writers(
    directory: Path, files: Mapping[str, list[str]], state: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[str], SafetensorsWriter]]:
    """Yields a function from a file name to its writer. A file is open from its first tensor to its last."""
    opened: dict[str, SafetensorsWriter] = {}

    def writer(file: str) -> SafetensorsWriter:
        for name in [name for name, other in opened.items() if name != file and not other.missing]:
            opened.pop(name).close()
        if file not in opened:
            tensors = {name: (state[name].shape, state[name].dtype) for name in files[file]}
            opened[file] = SafetensorsWriter(directory / file, tensors, {"format": "pt"})
        return opened[file]

    try:
        yield writer
        for other in opened.values():
            other.close()
    except BaseException:
        # The caller deletes the incomplete directory; close() would raise about missing tensors.
        for other in opened.values():
            other.abandon()
        raise


def write_configs(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> None:
    """Write the files of ``save_pretrained`` other than weights: configs, and the code of a custom model.

    Args:
        model: the model.
        directory: an existing directory.
        dtype: of the weights in the files, for ``config.json``.
    """
    cls: Any = type(model)  # the instance's save_pretrained is our own
    with _quiet():
        # With an empty state dict transformers writes everything but weights.
        cls.save_pretrained(model, directory, state_dict={})
    path = directory / "config.json"
    if dtype is not None and path.exists():
        # transformers writes the dtype of the parameters. These may be float32 master weights, while the files have the
        # dtype that the model was loaded in.
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("dtype") not in (None, str(dtype).removeprefix("torch.")):
            config["dtype"] = str(dtype).removeprefix("torch.")
            _write_json(path, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bar, which would count zero weights."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _write_json(path: Path, content: Any) -> None:
    """Write JSON in transformers' format (indent 2, sorted keys)."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
