"""``from_pretrained`` on deferred tensors: transformers' own loading code runs, while values stay in their files."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..core.ranks import raise_on_all_ranks
from ..errors import CheckpointError, ConfigError, UnsupportedError
from .deferred import DEFER_ALL, DeferredTensor, materialize
from .files import TensorFile, file_tensors, resolve_files

#: Arguments that say where the files are.
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")

#: Arguments for the loading itself, which no config must see.
_LOADER = (
    "dtype",
    "torch_dtype",
    "key_mapping",
    "ignore_mismatched_sizes",
    "output_loading_info",
    "generation_config",
    "use_kernels",
    "kernel_config",
    "allow_all_kernels",
    "experts_implementation",
    "fusion_config",
)

#: Arguments that cannot be honoured: name -> (values that ask for nothing, what to do instead).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "device_map": ((None,), "Accelerator.prepare places the shards; leave it out."),
    "max_memory": ((None,), "Accelerator.prepare places the shards; leave it out."),
    "quantization_config": (
        (None,),
        "Quantised weights cannot be cut from files; load them with the class's own from_pretrained.",
    ),
    "gguf_file": ((None,), "Convert it to safetensors, or load it with the class's own from_pretrained."),
    "state_dict": ((None,), "With the weights in memory use the class's own from_pretrained."),
    "distributed_config": ((None,), "AutoParallelismConfig shards the model; leave it out."),
    "tp_plan": ((None,), "Give it to AutoParallelismConfig(tp_plan=...)."),
    "tp_size": ((None,), "Give it to AutoParallelismConfig(tp_size=...)."),
    "device_mesh": ((None,), "AutoParallelismConfig makes the mesh; leave it out."),
    "use_safetensors": ((None, True), "Only safetensors files are read; convert others with save_pretrained."),
    "weights_only": ((None, True), "No pickle is opened; leave it out."),
    "disable_mmap": ((None, False), "Slices are read from mapped files; leave it out."),
    "trust_remote_code": ((None, False), "Import the model's class yourself and pass it instead of an Auto class."),
    "from_tf": ((None, False), "Convert the checkpoint to safetensors."),
    "from_flax": ((None, False), "Convert the checkpoint to safetensors."),
    "offload_folder": ((None,), "Use an fsdp_plugin with cpu_offload."),
    "offload_buffers": ((None, False), "Use an fsdp_plugin with cpu_offload."),
    "adapter_kwargs": ((None,), "Load the base model, then PeftModel.from_pretrained(model, adapter)."),
}


def from_pretrained(model_class: Any, path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Like ``model_class.from_pretrained(path, **kwargs)``, but weights stay in their files until the model is sharded.

    In place of::

        model = AutoModelForCausalLM.from_pretrained("path/to/llama-70b", dtype=torch.bfloat16)

    write::

        model = hf_automodel_parallel.from_pretrained(AutoModelForCausalLM, "path/to/llama-70b", dtype=torch.bfloat16)

    and go on as usual: wrap it with ``get_peft_model`` or ``PeftModel.from_pretrained``, pass it to a ``Trainer``, to
    TRL's ``SFTTrainer(model, peft_config=...)`` or to ``accelerator.prepare``. ``prepare`` shards the model, and then
    each rank reads its slices. No rank ever holds more than its shards and the one tensor that it is reading. The
    result is bitwise equal to loading first and sharding afterwards. Fresh adapters and heads are initialised as in one
    process.

    Everything that transformers does to a checkpoint happens here too, by its own code: key renames, fused experts,
    ties, dtype casts, modules kept in float32, and its report of missing and unexpected keys. Parameters that the files
    do not have (a new classification head) are initialised by the model's ``_init_weights``, with its warning; buffers
    are computed.

    Until ``prepare``, parameters are :class:`~hf_automodel_parallel.loading.DeferredTensor` objects: shapes, dtypes,
    casts, moves, freezing and copies of modules cost nothing. Operations that need values read them anew each time: a
    forward, DoRA's norms, ``resize_token_embeddings`` (then the new table is in memory on every rank until it is
    sharded). Writing into a slice of such a parameter raises.

    With a process group this is collective: an error on one rank is raised on all.

    Args:
        model_class: an Auto class or a transformers model class.
        path: local directory, or a repository's name.
        kwargs: those of ``model_class.from_pretrained``, among them ``config``, ``dtype``, ``attn_implementation``,
            ``subfolder``, ``revision``, ``variant``, ``num_labels``, ``ignore_mismatched_sizes``, ``key_mapping``,
            ``output_loading_info``, ``generation_config``. If ``dtype`` differs from the file's, slices are cast when
            they are read.

    Returns:
        The model in eval mode, or ``(model, info)`` with ``output_loading_info=True``.

    Raises:
        CheckpointError: a file is missing or damaged, has another shape or integers where the model has floats, or is a
            pickle, which is never opened. Names file, tensor and shapes.
        ConfigError: ``path`` is an adapter, or its config names a quantisation method.
        UnsupportedError: an argument that cannot be honoured; names it.
    """
    with _on_all_ranks():
        return _load(model_class, os.fspath(path), kwargs)


def _on_all_ranks() -> contextlib.AbstractContextManager[None]:
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return raise_on_all_ranks("from_pretrained") if distributed else contextlib.nullcontext()


def _load(model_class: Any, path: str, kwargs: dict[str, Any]) -> Any:
    for name, (nothing, remedy) in _REFUSED.items():
        value = kwargs.pop(name, None)
        if not any(value is other or value == other for other in nothing):
            shown = repr(value) if len(repr(value)) < 80 else f"{type(value).__name__}(...)"
            raise UnsupportedError(
                f"from_pretrained({name}={shown}) cannot be honoured while weights stay in files. {remedy}"
            )
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    variant = kwargs.pop("variant", None)
    loader = {name: kwargs.pop(name) for name in _LOADER if name in kwargs}
    # It asks for what happens here anyway.
    kwargs.pop("low_cpu_mem_usage", None)
    _refuse_adapter(path, hub)
    config, rest = _config(model_class, path, hub, kwargs)
    concrete, config = _concrete(model_class, config)
    files = resolve_files(path, variant, getattr(config, "transformers_weights", None), hub)
    tensors = {key: DeferredTensor(file.tensor(key)) for file in files for key in file.keys}
    wants_info = loader.pop("output_loading_info", False)
    tolerant = loader.pop("ignore_mismatched_sizes", False)
    loader.setdefault("generation_config", _generation_config(path, hub))
    with DEFER_ALL, _no_progress_bar():
        # With mismatches allowed transformers reports all of them, so that the error below can name their files.
        # With state_dict and no path, transformers opens no file but runs all of its conversions.
        model, info = concrete.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **loader,
            **rest,
        )
    if info["mismatched_keys"] and not tolerant:
        raise CheckpointError(_mismatch(info["mismatched_keys"], files))
    # transformers had no path; PEFT writes this one as base_model_name_or_path.
    model.config.name_or_path = model.name_or_path = path
    _check_kinds(model)
    _read_buffers(model)
    # Mapped again when the ranks read, in prepare.
    for file in files:
        file.close()
    return (model, info) if wants_info else model


def _refuse_adapter(path: str, hub: dict[str, Any]) -> None:
    folder = os.path.join(path, hub.get("subfolder") or "")
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json). Load the base model with from_pretrained, then "
            f"PeftModel.from_pretrained(model, {path!r}, is_trainable=True)."
        )


def _config(model_class: Any, path: str, hub: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model's config, and the remaining keyword arguments, which go to its constructor."""
    from transformers import AutoConfig, PreTrainedConfig

    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config_class = getattr(model_class, "config_class", None) or AutoConfig
        config, kwargs = config_class.from_pretrained(
            path if config is None else config, return_unused_kwargs=True, **hub, **kwargs
        )
    method = getattr(config, "quantization_config", None)
    if method is not None:
        kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise ConfigError(
            f"{path}: the checkpoint is quantised ({kind}); its weights cannot be cut from files. Load it with the "
            f"class's own from_pretrained, or load an unquantised checkpoint."
        )
    return config, kwargs


def _concrete(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The class that an Auto class chooses for ``config``, and the config of that class.

    For a multimodal model the class may be its text model; then the config is the text sub-config.
    """
    from transformers import PreTrainedModel

    if issubclass(model_class, PreTrainedModel):
        return model_class, config
    # fork_rng: building a model to learn its class must not consume the random numbers of its initialisation.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        concrete = type(model_class.from_config(copy.deepcopy(config)))
    text_config = config.sub_configs.get("text_config")
    if text_config is not None and concrete.config_class is text_config:
        config = config.get_text_config()
    return concrete, config


def _generation_config(path: str, hub: dict[str, Any]) -> Any:
    """The checkpoint's generation config; None if it has none and transformers derives one from the model's config."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path, **hub)
    except OSError:
        return None


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar: nothing is read here. ``PendingValues.fill`` shows one when the ranks read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _mismatch(mismatched: Any, files: list[TensorFile]) -> str:
    lines = []
    for key, found, expected in sorted(mismatched, key=lambda entry: entry[0]):
        sources = [file.path for file in files if any(name == key or key.endswith(f".{name}") for name in file.keys)]
        place = sources[0] if sources else f"{files[0].path} and {len(files) - 1} others"
        lines.append(f"{place}: tensor {key} has shape {tuple(found)}, the model expects {tuple(expected)}")
    shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
    return (
        f"{shown}. Load it with the config that it was saved with, or pass ignore_mismatched_sizes=True to draw these "
        f"parameters anew."
    )


def _check_kinds(model: nn.Module) -> None:
    """Refuse integer tensors where the model has floating-point ones: transformers would cast them silently."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not isinstance(tensor, DeferredTensor) or not tensor.is_floating_point():
            continue
        wrong = next((leaf for leaf in file_tensors(tensor.node) if not leaf.dtype.is_floating_point), None)
        if wrong is not None:
            raise CheckpointError(
                f"{wrong.file.path}: tensor {wrong.key} holds {wrong.dtype}, the model expects {tensor.dtype} for "
                f"{name}. Is it a quantised checkpoint without its config? Save the model unquantised."
            )


def _read_buffers(model: nn.Module) -> None:
    """Buffers are small and not sharded: every rank reads them at once."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, DeferredTensor):
                module._buffers[name] = materialize(buffer)
