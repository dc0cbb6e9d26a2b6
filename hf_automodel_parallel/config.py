"""``AutoParallelismConfig``: the user's config, its fields, its text forms and its validation.

It is a subclass of :class:`accelerate.ParallelismConfig` and replaces it everywhere. ``Accelerator.__init__`` calls two
of its methods, after the process group is initialised and in this order: :meth:`AutoParallelismConfig.get_device_mesh`
infers and checks the sizes of the mesh axes, :meth:`AutoParallelismConfig._validate_accelerator` extends this one
``Accelerator`` instance.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import difflib
import functools
import inspect
import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import ParallelismConfig

from . import compat
from .accelerate_plugin.config_text import is_file, load_yaml, parallelism_section, parse_pairs, read_file, restore
from .accelerate_plugin.distributed_config import fields_of_distributed_config
from .core.mesh import AXES
from .core.option_fields import argument_docs, check_tp_axis, check_values, compared_values, plain
from .core.options import OptionFields
from .core.output import verbosity
from .errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from typing import Literal

    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

    from .core.modality_encoders import EncoderPlacement
    from .core.option_fields import Backend
    from .core.options import AdapterPlacement, AuditMode, CheckpointingMode, GivenPlan
    from .core.sharding_spec import PLAN_SOURCES

logger = logging.getLogger(__name__)

#: Environment variable with the text form of a config. The launcher sets it and reads it in the workers.
CONFIG_VARIABLE = "HF_AUTO_PARALLEL"

#: Environment variable by which Accelerate's launcher asks for a config.
_USES_CONFIG = "ACCELERATE_USE_PARALLELISM_CONFIG"

# The first of these axes without a given size takes the remaining ranks. tp is last, because it changes the kernels.
_INFERENCE_ORDER = ("dp_shard", "dp_replicate", "tp")


@dataclass(repr=False)
class AutoParallelismConfig(OptionFields, ParallelismConfig):
    """How to parallelise a model: sizes of the mesh axes, tensor-parallel plan and FSDP2 options.

    The size fields are those of Accelerate (``dp_replicate_size``, ``dp_shard_size``, ``tp_size``, ``cp_size``,
    ``sp_size``) with the same meaning. One rule is added: a size that is given neither here nor in the environment is
    inferred from the world size instead of being 1. ``dp_shard`` takes the remaining ranks; if its size is given,
    ``dp_replicate`` takes them; if that is given too, ``tp``.

    The other fields are the options of :class:`~.core.options.OptionFields`; ``docs/options.md`` has a table of them.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or two values contradict each other.
        UnsupportedError: a ``cp_handler`` requests ring attention.

    Examples:
        >>> config = AutoParallelismConfig(tp_size=2)                  # dp_shard = world size / 2
        >>> config = AutoParallelismConfig.parse("tp=2,dp_shard=4")    # the command-line form
    """

    # ---- construction ------------------------------------------------------------------------------------------

    if TYPE_CHECKING:
        # dataclass makes it at run time. Written out because mypy takes the base class, of a package without types, for
        # Any, and so every argument for a valid one. A test compares it with the fields.
        def __init__(
            self,
            dp_replicate_size: int | None = None,
            dp_shard_size: int | None = None,
            tp_size: int | None = None,
            cp_size: int | None = None,
            cp_backend: Literal["torch"] | None = None,
            sp_size: int | None = None,
            sp_backend: Literal["deepspeed"] | None = None,
            tp_handler: Any = None,
            cp_handler: Any = None,
            sp_handler: Any = None,
            tp_plan: GivenPlan = None,
            plan_order: tuple[str, ...] = PLAN_SOURCES,
            reshard_after_forward: bool | None = None,
            forward_prefetch: int = 1,
            backward_prefetch: int = 2,
            sequence_parallel: bool = False,
            sequence_parallel_regather: bool = False,
            async_tensor_parallel: bool = False,
            loss_parallel: bool | None = None,
            loss_chunk_size: int | None = None,
            activation_checkpointing: CheckpointingMode | bool | None = None,
            compile: bool | str = False,
            check_optimizer: bool = True,
            async_save: bool = False,
            audit: AuditMode | bool | None = None,
            audit_steps: int = 100,
            backend: Backend = "fsdp2",
            megatron_fsdp: Mapping[str, Any] | None = None,
            towers: EncoderPlacement | None = None,
            adapters_over_dp: AdapterPlacement | None = None,
            verbose: Literal[0, 1, 2] | None = None,
        ) -> None: ...

    def __new__(cls, *args: Any, **kwargs: Any) -> AutoParallelismConfig:
        # Before the generated __init__, whose TypeError names no field that exists.
        known = inspect.signature(cls.__init__).parameters if kwargs else {}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            for name in kwargs:
                if name not in known:
                    fields = sorted(list(known)[1:])
                    near = _nearest_field(name, fields)
                    hint = f"did you mean {near!r}?" if near else f"known fields: {', '.join(fields)}."
                    raise ConfigError(f"{cls.__name__} has no field {name!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._read_sizes_from_environment()
        self._check_fields()
        # Before super().__post_init__(), which sets missing sizes to 1.
        self._open_axes = tuple(axis for axis in AXES if getattr(self, f"{axis}_size") is None)
        # The parent class rejects dp_replicate with tp if dp_shard=1, because Accelerate would use DDP. Here FSDP2 runs
        # on a dp_shard axis of one rank. So the parent checks with 2, and the real size is set afterwards.
        dp_shard_size: int | None = self.dp_shard_size  # type: ignore[has-type]
        self.dp_shard_size = 2
        super().__post_init__()
        self._set_size("dp_shard", 1 if dp_shard_size is None else dp_shard_size)
        self._check_context_parallel()
        self._check_no_other_accelerator()
        _note_made(self)

    def _check_context_parallel(self) -> None:
        strategy = getattr(self.cp_handler, "cp_comm_strategy", "allgather")
        if self.cp_size > 1 and strategy != "allgather":  # type: ignore[operator]
            raise UnsupportedError(
                f"cp_handler has cp_comm_strategy={strategy!r}: keys and values are gathered over the cp axis, once "
                f"per layer. Use cp_comm_strategy='allgather' (the default), or cp_size=1."
            )

    def _read_sizes_from_environment(self) -> None:
        """Read sizes that are not given from the environment of ``accelerate launch``, before they are checked."""
        for axis in AXES:
            variable = f"PARALLELISM_CONFIG_{axis.upper()}_SIZE"
            if getattr(self, f"{axis}_size") is not None or variable not in os.environ:
                continue
            try:
                setattr(self, f"{axis}_size", int(os.environ[variable]))
            except ValueError as error:
                raise ConfigError(
                    f"the environment variable {variable}={os.environ[variable]!r} is not an integer."
                ) from error

    def _check_fields(self) -> None:
        for axis in AXES:
            size = getattr(self, f"{axis}_size")
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(
                    f"{axis}_size={size!r}: a mesh axis has a whole number of ranks, at least 1. "
                    f"Leave it out to have it inferred from the world size."
                )
        check_values(self)
        verbosity(self.verbose)  # raises for a wrong value of the environment
        if self.backend == "megatron_fsdp":
            from .backends.megatron_fsdp.options import MegatronOptions

            MegatronOptions.from_mapping(self.megatron_fsdp)
        if self.sp_size is not None and self.sp_size > 1:
            raise ConfigError(
                f"sp_size={self.sp_size}: Accelerate's sp axis is DeepSpeed's Ulysses, which does not go with FSDP2. "
                f"Use sp_size=1."
            )

    def _check_no_other_accelerator(self) -> None:
        """Raise if an ``Accelerator`` with another config exists: Accelerate would silently ignore this config."""
        state = compat.accelerator_already_exists()
        if state is None or isinstance(state.parallelism_config, AutoParallelismConfig):
            return
        raise ConfigError(
            "AutoParallelismConfig was created after an Accelerator already exists in this process; Accelerate shares "
            "one state between all Accelerators and would ignore this config without a word. Create the config before, "
            "and pass it to, the first Accelerator (or TrainingArguments) of the process."
        )

    # ---- sizes -------------------------------------------------------------------------------------------------

    def resolve_sizes(self, world_size: int) -> None:
        """Set the sizes that were not given, so that the product of all axes is ``world_size``.

        Raises:
            ConfigError: the product of the given sizes does not divide the world size, or is not equal to it if all
                sizes are given; or an option needs ``tp_size`` of 2 or more.
        """
        known = 1
        for axis in AXES:
            if axis not in self._open_axes:
                known *= self._sizes[axis]
        given = ", ".join(f"{axis}_size={self._sizes[axis]}" for axis in AXES if axis not in self._open_axes) or "none"
        absorber = next((axis for axis in _INFERENCE_ORDER if axis in self._open_axes), None)
        rest, remainder = divmod(world_size, known)
        if remainder or (absorber is None and rest != 1):
            needed = known if absorber is None or known > world_size else f"a multiple of {known}"
            there = "is 1 process" if world_size == 1 else f"are {world_size} processes"
            hint = (
                " (On CPU start them with torchrun and Accelerator(cpu=True): accelerate launch --cpu starts one "
                "process, whatever --num_processes says.)"
            )
            raise ConfigError(
                f"the sizes of the mesh axes ({given}) multiply to {known}, but there {there}. "
                f"Start {needed} {'process' if needed == 1 else 'processes'}, or change a size so that the product is "
                f"{world_size}." + (hint if world_size == 1 else "")
            )
        if absorber is not None:
            self._set_size(absorber, rest)
        check_tp_axis(self, self.tp_size)  # type: ignore[has-type]
        if getattr(self.tp_handler, "enable_async_tp", False):  # type: ignore[has-type]
            raise ConfigError(
                "tp_handler=TorchTensorParallelConfig(enable_async_tp=True): Accelerate ignores it, and so would we. "
                "Use AutoParallelismConfig(async_tensor_parallel=True)."
            )
        # Accelerate makes the handler in its __post_init__, which does not see a tp_size that is inferred later.
        if self.tp_size > 1 and self.tp_handler is None:  # type: ignore[has-type]
            from accelerate.utils import TorchTensorParallelConfig

            self.tp_handler = TorchTensorParallelConfig()

    @property
    def dp_shard_enabled(self) -> bool:
        """True if there is a process group: FSDP2 also runs on a ``dp_shard`` axis of size 1 (tensor parallelism only).

        Accelerate leaves disabled axes out of the mesh.
        """
        return self.dp_shard_size > 1 or self.device_mesh is not None or _world_size() is not None

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """Infer missing sizes and build the mesh. Accelerate calls this before any other method. Collective.

        Returns:
            The mesh with axes (dp_replicate,) dp_shard (, cp) (, tp); None without a process group.

        Raises:
            ConfigError: on all ranks, if the sizes do not fit the world size, or the ranks have different configs.
        """
        if self.device_mesh is None:
            world = _world_size()
            if world is None:
                _check_alone()
                self.resolve_sizes(1)
                return None
            from .core.consistency import check_same_configs
            from .core.ranks import raise_on_all_ranks

            # A rank whose sizes do not fit must not leave the others waiting in the comparison.
            with raise_on_all_ranks("AutoParallelismConfig"):
                self.resolve_sizes(world)
            check_same_configs(self._sizes, compared_values(self))
        mesh = super().get_device_mesh(device_type)
        if mesh is not None:
            from .core.mesh import inherit_timeouts

            inherit_timeouts(mesh)
        return mesh

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        # Accelerate calls this at the end of Accelerator.__init__. It is the only call that gets the instance.
        from .trainer_plugin.extend import install

        _note_used()
        self._check_is_the_one_given(accelerator)
        install(accelerator, self)

    def _check_is_the_one_given(self, accelerator: Accelerator) -> None:
        """Raise if this ``Accelerator``, not the first one, was given another config, which Accelerate would drop."""
        given = compat.arguments_of_running_accelerator_init(accelerator).get("parallelism_config")
        # Accelerate itself makes one of its own class where this variable says so.
        by_user = isinstance(given, AutoParallelismConfig) or os.environ.get(_USES_CONFIG, "false").lower() != "true"
        if given is not None and by_user and given is not self and not self.agrees_with(given):
            raise ConfigError(
                f"another Accelerator was given parallelism_config={given!r}, but all Accelerators of a process share "
                f"the config of the first, {self!r}: Accelerate would drop the new one. Give all of them the same "
                f"config, or give it to the first alone."
            )
        text = os.environ.get(CONFIG_VARIABLE)
        if text and not self.agrees_with(launched := AutoParallelismConfig.parse(text)) and _is_first_process():
            logger.warning(
                "the script's own parallelism config, %r, is used. The launcher's, %r, is for scripts without one.",
                self,
                launched,
            )

    def agrees_with(self, other: Any) -> bool:
        """True if this config (its sizes may be inferred already) has the values of all fields that ``other`` sets."""
        if not isinstance(other, AutoParallelismConfig):
            return False
        known = self.to_dict()
        return all(known.get(name, getattr(self, name)) == value for name, value in other.to_dict().items())

    # ---- text and dict forms -----------------------------------------------------------------------------------

    @classmethod
    def parse(cls, value: str | os.PathLike[str] | Mapping[str, Any] | AutoParallelismConfig) -> AutoParallelismConfig:
        """Make a config from any of its forms.

        Args:
            value: a config (returned unchanged), a dict, the path of a YAML or JSON file, a JSON object as text, or a
                comma-separated list such as ``"tp=2,dp_shard=4,plan_order=registry+hf"``, where a name without a value
                means true.

        Raises:
            ConfigError: the file cannot be read, the text is malformed, or a field is unknown (the message suggests the
                nearest known one).
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, (str, os.PathLike)):
            raise ConfigError(f"cannot read a parallelism config from {type(value).__name__}: {value!r}")
        text = os.fspath(value).strip()
        if text.startswith("{"):
            return cls.from_dict(load_yaml(text, "the given text"))
        if text.lower().endswith((".yaml", ".yml", ".json")) or is_file(text):
            return cls.from_dict(read_file(Path(text)))
        return cls.from_dict(parse_pairs(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoParallelismConfig:
        """Make a config from field name -> value; the names of axes may omit their suffix ``_size``.

        Raises:
            ConfigError: a field is unknown, given twice, or has an invalid value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        arguments: dict[str, Any] = {}
        for key, value in parallelism_section(values).items():
            name = f"{key}_size" if key in AXES else key
            if name not in known:
                near = _nearest_field(str(key), [*AXES, *sorted(known)])
                raise ConfigError(
                    f"unknown field {key!r} in the parallelism config"
                    + (f"; did you mean {near!r}?" if near else ".")
                    + f" Known fields: {', '.join(sorted(known))}."
                )
            if name in arguments:
                raise ConfigError(f"the field {name!r} is given twice in the parallelism config.")
            arguments[name] = restore(name, value)
        return cls(**arguments)

    @classmethod
    def from_distributed_config(cls, given: Any, **fields: Any) -> AutoParallelismConfig:
        """Make a config that means what transformers' ``DistributedConfig`` means.

        The model itself is to be loaded without it: ``prepare`` shards what is whole.

        Args:
            given: the ``DistributedConfig``, or a dict of its fields.
            fields: further fields of the new config, which have precedence.

        Raises:
            ConfigError: it sets something that has no equal here; the message says what to do instead.

        Example:
            >>> AutoParallelismConfig.from_distributed_config(DistributedConfig(tp_size=2, fsdp_size=4))
        """
        return cls(**{**fields_of_distributed_config(given), **fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON types; ``from_dict`` restores an equal config."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            axis = field.name.removesuffix("_size")
            if axis in AXES:
                if not (axis in self._open_axes and self.device_mesh is None):
                    result[field.name] = value
                continue
            if field.name.endswith(("_backend", "_handler")):
                if value is not None and self._sizes[field.name.rsplit("_", 1)[0]] > 1:
                    result[field.name] = plain(value)
                continue
            default = field.default
            if value != default:
                result[field.name] = plain(value)
        return result

    def to_json(self) -> dict[str, Any]:
        """Return :meth:`to_dict`; ``TrainingArguments.to_dict`` stores it (Accelerate's own version returns None)."""
        return self.to_dict()

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({inner})"

    # A mesh has process groups, which cannot be pickled or copied; each process builds its own mesh again.
    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "device_mesh"}
        try:
            pickle.dumps(self.tp_plan)
        except Exception:  # e.g. a lambda. The Trainer pickles its arguments in each checkpoint, which must not fail.
            state["tp_plan"] = plain(self.tp_plan)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoParallelismConfig:
        result = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            if name != "device_mesh":
                result.__dict__[name] = copy.deepcopy(value, memo)
        return result


# The options document themselves where they are declared (core/options.py), so that the docstring cannot differ.
AutoParallelismConfig.__doc__ = f"{AutoParallelismConfig.__doc__}\n    Args:\n{argument_docs(OptionFields)}\n"


def _nearest_field(written: str, known: Iterable[str]) -> str:
    """The field of ``known`` that was probably meant by ``written``; empty without a near one."""
    known = list(known)
    # "dp" and "dp_size" mean an axis that has a longer name; the nearest word would be "tp".
    start = written.removesuffix("_size")
    longer = [name for axis in _INFERENCE_ORDER for name in known if name in (axis, f"{axis}_size")]
    prefixed = [name for name in longer if name.startswith(f"{start}_")]
    near = prefixed or difflib.get_close_matches(written, known, n=1, cutoff=0.5)
    return near[0] if near else ""


# ---- a config that nobody used -------------------------------------------------------------------------------------

# A config that was made, while no Accelerator of this process has used one; and whether one was used.
_unused: AutoParallelismConfig | None = None
_used = False


def _note_made(config: AutoParallelismConfig) -> None:
    global _unused
    _unused = config
    _report_at_exit()


def _note_used() -> None:
    global _unused, _used
    _unused, _used = None, True


@functools.cache
def _report_at_exit() -> None:
    atexit.register(_report_unused)


def _report_unused() -> None:
    """At exit: say that a config was made, and no Accelerator got it, so that nothing was parallel.

    Accelerate drops a config that is passed after a first, plain ``Accelerator()`` without calling anything of it.
    """
    if _used or _unused is None or getattr(sys, "last_value", None) is not None:  # an error has been printed
        return
    started = os.environ.get("WORLD_SIZE", "1") != "1" and multiprocessing.parent_process() is None
    if (started or compat.accelerator_already_exists() is not None) and _is_first_process():
        logger.warning(
            "%r was never used: no model was parallelised by it. Pass it to the first Accelerator of the process, as "
            "Accelerator(parallelism_config=...), or to the arguments of a Trainer, before any other Accelerator is "
            "created.",
            _unused,
        )


def _is_first_process() -> bool:
    """True on rank 0 of what the launcher started, also without a process group."""
    return os.environ.get("RANK", "0") == "0"


def _world_size() -> int | None:
    """Return the world size; None without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else None


def _check_alone() -> None:
    """Raise if the launcher started several processes and Accelerate made no process group for them.

    On a machine without an accelerator device, Accelerate makes one only if the user requests the CPU. Otherwise each
    process would train on its own.

    Raises:
        ConfigError: ``WORLD_SIZE`` is greater than 1.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdecimal() and int(started) > 1:
        raise ConfigError(
            f"{started} processes were started (WORLD_SIZE), but Accelerate found no accelerator device and was not "
            f"asked for the CPU, so that each of them is alone. On CPU pass Accelerator(cpu=True) or "
            f"TrainingArguments(use_cpu=True), or set ACCELERATE_USE_CPU=true."
        )
