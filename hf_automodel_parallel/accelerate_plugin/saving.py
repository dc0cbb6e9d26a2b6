"""``save_pretrained``, ``push_to_hub``, ``Accelerator.save_model`` and ``Trainer.save_model`` on a sharded model.

Each call is collective: all ranks call it. One rank writes, tensor by tensor, and the others take part in the gathers.
The libraries interpret the arguments. Arguments that cannot be honoured on shards are left out, with a warning.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from .. import compat
from ..core.ranks import gather_objects, raise_on_all_ranks
from ..core.rendezvous import rendezvous
from ..errors import ConfigError, ExportError, UnsupportedError
from ..export.adapters import check_adapter_options, full_prompts
from ..export.files import completed_at_end
from ..export.gathering import Fetch, ShardedState, cast, file_dtypes, shapes_of
from ..export.pretrained import write_model, write_state
from ..fsdp.shard import fsdp_units
from ..peft.operations import full_parameters
from .prepared import prepared

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Streamed(dict):  # type: ignore[type-arg]
    """A placeholder for the full state dict that a library passes on; tensors are gathered when they are written.

    A ``dict`` subclass, because the libraries pass on a ``state_dict``; it stays empty.

    Attributes:
        state: the sharded state dict.
        fetch: gathers one full tensor; set on the rank that writes, while it writes.
        weights: False to write only configs.
        used: this rank has taken part in the save.
    """

    def __init__(self, state: ShardedState, weights: bool = True) -> None:
        super().__init__()
        self.state = state
        self.fetch: Fetch | None = None
        self.weights = weights
        self.used = False


# ---- save_pretrained -------------------------------------------------------------------------------------------------


def bind_saving(model: nn.Module) -> None:
    """Bind ``save_pretrained`` and ``push_to_hub`` of ``model``, so that they gather tensor by tensor."""
    if getattr(type(model), "save_pretrained", None) is None:
        return
    original: Any = model.save_pretrained
    save = _save_pretrained if _is_streamed(model) else _save_by_its_class
    model.save_pretrained = functools.wraps(original)(  # type: ignore[assignment]
        lambda *args, **kwargs: save(model, original, args, kwargs)
    )
    if _is_streamed(model) and hasattr(type(model), "push_to_hub"):
        push: Any = model.push_to_hub
        model.push_to_hub = functools.wraps(push)(  # type: ignore[assignment]
            lambda *args, **kwargs: _push_to_hub(model, push, args, kwargs)
        )


def _is_streamed(model: nn.Module) -> bool:
    """True if the layout of the files of ``model`` is known here, so that they are written tensor by tensor."""
    return isinstance(model, PreTrainedModel) or compat.is_peft_model(model)


#: Attribute of a model while its parameters are shown as full plain tensors.
_FULL = "_automodel_parallel_full"


@contextmanager
def _with_full_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block, the parameters of ``model`` are full plain tensors, on every rank. Collective."""
    if vars(model).get(_FULL):  # in a save inside of another one, as of Trainer.push_to_hub
        yield
        return
    for unit in fsdp_units(model):
        unit.reshard()
    vars(model)[_FULL] = True
    try:
        with full_parameters(model):
            yield
    finally:
        del vars(model)[_FULL]


def _save_by_its_class(
    model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``save_pretrained`` of a class that is neither of transformers nor of PEFT (a SentenceTransformer, a model of
    diffusers): rank 0 runs it on full weights.
    """
    if vars(model).get(_FULL):
        return original(*args, **kwargs)
    name = f"{type(model).__name__}.save_pretrained()"
    rendezvous(name, {})
    with _with_full_parameters(model), raise_on_all_ranks(name, raises=ExportError):
        return original(*args, **kwargs) if dist.get_rank() == 0 else None


def _save_pretrained(
    model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    save_directory, given = _arguments(type(model), original, args, kwargs)
    state = given.get("state_dict")
    main = bool(given.get("is_main_process", True))
    if state is not None and not isinstance(state, Streamed):
        if not state and not main:
            # Accelerate gathers to rank 0 only, and the other ranks pass an empty dict, in which PEFT
            # would look for `modules_to_save`.
            return None
        # On ranks that write nothing, too: PEFT runs the prompt encoder wherever it is called.
        full = compat.is_peft_model(model) and any("prompt_encoder." in name for name in state)
        with full_prompts(model, state.__getitem__) if full else nullcontext():
            return original(*args, **kwargs)
    directory = Path(save_directory)
    options = {k: v for k, v in given.items() if k not in ("state_dict", "is_main_process")}
    # Before the rendezvous: wrong arguments raise on all ranks without a wait.
    options = _usable(model, directory, options)
    push = options.pop("push_to_hub", False)
    hub = {k: options.pop(k) for k in _HUB_OPTIONS if k in options}
    if isinstance(state, Streamed):
        if state.fetch is not None:  # else another rank writes
            write_model(model, directory, options, state.state, state.fetch, state.weights)
        return None
    name = f"{type(model).__name__}.save_pretrained()"
    writers = rendezvous(name, {k: str(v) for k, v in options.items()}, main)
    shards = ShardedState(model, dist.get_rank() in writers)
    # One writer after the other (with is_main_process on one rank per node), since each gather needs all ranks.
    for writer in writers:
        written = shards.led_by(writer, lambda fetch: write_model(model, directory, options, shards, fetch))
        # Several writers write equal files; one upload is enough.
        if push and written is not None and writer == writers[0]:
            _upload(model, directory, written, hub)
    return None


#: Options of ``save_pretrained`` that only the upload needs.
_HUB_OPTIONS = ("token", "repo_id", "commit_message", "create_pr", "private", "revision", "commit_description")
#: Other arguments of PEFT's (True) and transformers' (False) ``save_pretrained``; anything else is left out.
_KNOWN = {
    True: ("safe_serialization", "selected_adapters", "save_embedding_layers"),
    False: ("max_shard_size", "variant", "save_peft_format", "save_original_format", "push_to_hub", *_HUB_OPTIONS),
}
#: What is left out without a warning: Accelerate's documented recipe passes the first, ``push_to_hub`` of transformers
#: the second; transformers 5 and PEFT use neither (PEFT writes one file).
_WITHOUT_EFFECT = {True: ("save_function", "max_shard_size"), False: ("save_function",)}


def _arguments(
    cls: type, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The directory of a call, and its other arguments by name.

    Args:
        cls: class of the model.
        original: its ``save_pretrained``; one that overrides it may name the directory otherwise, and may take
            ``*args``, which then have the names of the library's method.
    """
    inspect.signature(original).bind(*args, **kwargs)  # the usual TypeError
    # The lowest class that has the method, but for the mixin below it, is the library's.
    libraries = [kind for kind in cls.__mro__ if "save_pretrained" in vars(kind) and kind is not PushToHubMixin]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names, of_library = (
        [name for name, p in inspect.signature(function).parameters.items() if p.kind in positional and name != "self"]
        for function in (original, libraries[-1].save_pretrained)  # type: ignore[attr-defined]
    )
    # The directory comes first, whatever its name.
    names += [name for name in of_library[bool(names) :] if name not in names]
    given = dict(zip(names, args)) | kwargs
    directory = given.pop("save_directory" if "save_directory" in given else names[0])
    return directory, given


def _usable(model: nn.Module, directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The options that take effect. What does not is left out, with a warning: a training ends here, and its weights
    must not be lost by an argument.

    Raises:
        AutoParallelError: on all ranks, since their arguments are equal, for what one process refuses as well, and for
            weights that cannot be written.
    """
    adapters = compat.is_peft_model(model)
    usable = {name: value for name, value in options.items() if name in _KNOWN[adapters]}
    for name in options.keys() - usable.keys() - {*_WITHOUT_EFFECT[adapters]}:
        value, without = options[name], name == "safe_serialization"  # the value without effect
        if dist.get_rank() == 0 and value is not None and bool(value) != without:
            logger.warning(
                "save_pretrained(%s=%r) of a sharded %s is left out.%s",
                name,
                value,
                type(model).__name__,
                _INSTEAD[adapters].get(name, f" Known are {', '.join(_KNOWN[adapters])}."),
            )
    if directory.is_file():
        raise ConfigError(f"save_pretrained({str(directory)!r}): this is a file; give a directory.")
    if adapters:
        check_adapter_options(model, usable)
        return usable
    if compat.carries_adapters(model):
        active: Any = model.active_adapters()  # type: ignore[operator]
        if len(active) > 1:
            raise ConfigError(
                f"save_pretrained() of a {type(model).__name__} with several active adapters ({', '.join(active)}): "
                f"transformers saves one. Call model.set_adapter(name) and save_pretrained(directory) for each."
            )
    elif getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError(
            "save_pretrained() of a sharded model with quantised weights: its files need the scales of whole weights. "
            "Save the adapter (the PeftModel's save_pretrained); the quantised base is what it was loaded from."
        )
    return usable


#: What the warning about an argument that is left out says, by :data:`_KNOWN`'s key and name.
_INSTEAD = {
    True: {
        "push_to_hub": " Nothing was uploaded; call push_to_hub(repo_id) of the model.",
        "path_initial_model_for_weight_conversion": (
            " The adapter is written as it was trained: to subtract the initial one, PEFT has to load it into the "
            "model, which one rank cannot do on shards. Do it in one process: PeftModel.from_pretrained(base, "
            "directory).save_pretrained(other, path_initial_model_for_weight_conversion=...), with the base model that "
            "was trained."
        ),
    },
    False: {
        "safe_serialization": (
            " transformers 5 writes safetensors only; accelerator.save_model(model, directory, "
            "safe_serialization=False) writes pickles."
        ),
        "distributed_checkpoint": (
            " The usual files are written. accelerator.save_state(directory) with state_dict_type="
            "'SHARDED_STATE_DICT' writes shards, and `hf-automodel-parallel export` makes a model of them."
        ),
    },
}


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _upload(model: nn.Module, directory: Path, written: list[Path], hub: dict[str, Any]) -> None:
    """The upload of ``save_pretrained(push_to_hub=True)``, on the rank that wrote."""
    from huggingface_hub import create_repo, upload_folder

    repo = create_repo(
        hub.get("repo_id") or directory.name, token=hub.get("token"), private=hub.get("private"), exist_ok=True
    )
    upload_folder(
        repo_id=repo.repo_id,
        folder_path=directory,
        allow_patterns=[path.as_posix() for path in written],
        token=hub.get("token"),
        commit_message=hub.get("commit_message") or f"Upload {type(model).__name__}",
        create_pr=hub.get("create_pr"),
        revision=hub.get("revision"),
        commit_description=hub.get("commit_description"),
    )


def _push_to_hub(model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``model.push_to_hub``, collective: rank 0 runs it, and the other ranks serve the gathers of its save."""
    rendezvous(f"{type(model).__name__}.push_to_hub()", {})
    shards = ShardedState(model, dist.get_rank() == 0)

    def push(fetch: Fetch) -> Any:
        def save(directory: Any, *positional: Any, **options: Any) -> None:
            _save_pretrained(model, bound, (directory, *positional), {**options, "state_dict": streamed})

        # The mixin's push_to_hub calls model.save_pretrained on this rank alone, which must not wait in a rendezvous.
        bound = model.__dict__["save_pretrained"]
        streamed = Streamed(shards)
        streamed.fetch = fetch
        model.save_pretrained = save  # type: ignore[assignment]
        try:
            return original(*args, **kwargs)
        finally:
            model.save_pretrained = bound  # type: ignore[assignment]

    return shards.led_by(0, push)


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def bind_trainer(trainer: Any, accelerator: Accelerator) -> None:
    """Let ``trainer.save_model`` write tensor by tensor, with every ``state_dict_type``.

    The stock method gathers all weights on rank 0 or, with SHARDED_STATE_DICT, silently writes nothing.
    """

    def save_model(*args: Any, **kwargs: Any) -> Any:  # looked up at call time: the class may be extended after this
        return type(trainer).save_model(trainer, *args, **kwargs)

    def save(*args: Any, **kwargs: Any) -> Any:
        return compat.trainer_save(trainer, *args, **kwargs)

    @functools.wraps(type(trainer).save_model)
    def bound_save_model(output_dir: str | None = None, _internal_call: bool = False) -> Any:
        model = trainer.model
        if prepared(model) is None or not hasattr(type(model), "save_pretrained"):
            return save_model(output_dir, _internal_call=_internal_call)
        sharded = "FULL_STATE_DICT" not in str(accelerator.state.fsdp_plugin.state_dict_type)
        # A sharded checkpoint has its weights in DCP files; only the configs are added, for an export.
        in_checkpoint = _internal_call and output_dir is not None
        # If a rank never calls save_model, the wait ends in an error that names it.
        if not in_checkpoint:  # a checkpoint has synchronised the ranks already
            rendezvous(f"{type(trainer).__name__}.save_model()", {})
        if not _is_streamed(model):
            if in_checkpoint and sharded:
                return save_model(output_dir, _internal_call=_internal_call)
            with _with_full_parameters(model), _streaming(accelerator, lambda model, unwrap=True: model.state_dict()):
                return save_model(output_dir, _internal_call=_internal_call)
        shards = ShardedState(model, trainer.args.should_save)
        streamed = Streamed(shards, weights=not (in_checkpoint and sharded))

        def get_state_dict(model: nn.Module, unwrap: bool = True) -> Streamed:
            # Ranks that do not write serve the gathers at once: in transformers 5.17 they do not call _save.
            if not trainer.args.should_save:
                bound_save(None, streamed)
            return streamed

        with _streaming(accelerator, get_state_dict):
            return save_model(output_dir, _internal_call=_internal_call)

    def bound_save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> Any:
        if not isinstance(state_dict, Streamed):
            if vars(trainer.model).get(_FULL) and not trainer.args.should_save:
                return None  # transformers calls it on every rank, and not every override writes on one alone
            return save(output_dir, state_dict)
        # get_state_dict() above has served the gathers already on ranks that do not write.
        if state_dict.used:
            return None
        state_dict.used = True
        shards = state_dict.state
        asked = gather_objects(bool(trainer.args.should_save))  # with save_on_each_node, one rank per node writes
        for writer in [rank for rank, wants in enumerate(asked) if wants]:

            def work(fetch: Fetch) -> Any:
                state_dict.fetch = fetch
                return save(output_dir, state_dict)

            shards.led_by(writer, work)
        return None

    trainer.save_model = bound_save_model
    compat.bind_trainer_save(trainer, bound_save)


@contextmanager
def _streaming(accelerator: Accelerator, get_state_dict: Callable[..., dict[str, Any]]):  # type: ignore[no-untyped-def]
    """Let the Trainer take its FULL_STATE_DICT path, and give it a placeholder instead of gathered weights.

    Under FSDP, ``Trainer.save_model`` calls ``_save`` on that path only.
    """
    plugin = accelerator.state.fsdp_plugin
    kind, gather = plugin.state_dict_type, accelerator.__dict__["get_state_dict"]
    plugin.state_dict_type = "FULL_STATE_DICT"
    accelerator.get_state_dict = get_state_dict  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        plugin.state_dict_type = kind
        accelerator.get_state_dict = gather  # type: ignore[method-assign]


# ---- Accelerator -----------------------------------------------------------------------------------------------------


def save_model(
    self: Accelerator,
    model: nn.Module,
    save_directory: Any,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Like ``Accelerator.save_model``, but tensor by tensor: stock gathers all weights on rank 0."""
    if prepared(model) is None:
        return type(self).save_model(self, model, save_directory, max_shard_size, safe_serialization)
    directory = Path(save_directory)
    if directory.is_file():
        raise ConfigError(f"save_model({str(save_directory)!r}): this is a file; give a directory.")
    details = {"max_shard_size": max_shard_size, "safe_serialization": safe_serialization}
    (writer,) = rendezvous("Accelerator.save_model()", details)
    shards = ShardedState(model, dist.get_rank() == writer)

    def work(fetch: Fetch) -> None:
        shapes = shapes_of(shards.tensors, file_dtypes(model))
        tied = _first_names(model, shards.tensors)
        with completed_at_end(directory) as incomplete:
            write_state(
                {name: value for name, value in shapes.items() if name in tied},
                cast(fetch, shapes),
                incomplete,
                max_shard_size,
                safe_serialization,
            )

    shards.led_by(writer, work)
    return None


def _first_names(model: nn.Module, names: Mapping[str, Any]) -> set[str]:
    """``names`` without the further names of tied tensors."""
    objects = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    seen: set[int] = set()
    first = set()
    for name in names:
        key = id(objects.get(name, names[name]))
        if key not in seen:
            first.add(name)
        seen.add(key)
    return first
