"""``AutoParallelismConfig``: the one object a user passes, its fields, its text forms and its validation.

It subclasses :class:`accelerate.ParallelismConfig`, so it goes wherever that class goes. ``Accelerator.__init__`` calls
two of its methods, in this order, with the process group ready: :meth:`AutoParallelismConfig.get_device_mesh`, where
open sizes are inferred and wrong ones refused, and :meth:`AutoParallelismConfig._validate_accelerator`, where the
package binds itself to that one ``Accelerator`` instance.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import ParallelismConfig

from .. import compat
from ..activation_checkpointing import CHECKPOINTING_MODES
from ..core.mesh import AXES
from ..core.modality_encoders import PLACEMENTS
from ..core.sharding_spec import PLAN_SOURCES
from ..errors import ConfigError, UnsupportedError
from .config_text import collective_choices, is_file, load_yaml, parse_pairs, plain, read_file, restore

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

#: Values of ``backend``.
BACKENDS = ("fsdp2", "megatron_fsdp")

#: Values of ``audit``.
AUDIT_MODES = ("first_step", "every_n_steps", "off")
DEFAULT_AUDIT_STEPS = 100

#: Environment variable that holds the text form of a config (set by the launcher, read by it in the workers).
CONFIG_VARIABLE = "HF_AUTO_PARALLEL"

# Who fills up an unexplained rest of the world, first open axis first. tp changes which kernels run, so it comes last.
_INFERENCE_ORDER = ("dp_shard", "dp_replicate", "tp")


@dataclass(repr=False)
class AutoParallelismConfig(ParallelismConfig):
    """How to spread a model over the processes: sizes of the mesh axes, plan, and how FSDP2 behaves.

    The size fields are Accelerate's (``dp_replicate_size``, ``dp_shard_size``, ``tp_size``, ``cp_size``, ``sp_size``)
    and mean the same, with one addition: a size that nobody gave (None here and not in the environment) is inferred
    from the world size instead of being 1. ``dp_shard`` takes the rest; if it was given, ``dp_replicate`` does; then
    ``tp``.

    Args:
        tp_plan: explicit tensor-parallel plan, preferred to every other source: a dict (module or parameter pattern ->
            style name or ``torch.distributed.tensor.parallel.ParallelStyle``), a callable returning one (with or
            without the model as argument), the import path of either (``"my_package.plans:llama"``), or the name of a
            named plan.
        plan_order: sources to try, in order, when ``tp_plan`` is None: some of :data:`PLAN_SOURCES`, each once.
        reshard_after_forward: free a layer's gathered parameters after its forward. None: what the ``fsdp_plugin``
            says, else True; the last layer is never resharded, its backward comes next.
        forward_prefetch: how many layers ahead FSDP2 gathers in forward. 0 leaves it to FSDP2.
        backward_prefetch: how many layers ahead FSDP2 gathers in backward. 0 leaves it to FSDP2.
        sequence_parallel: split the activations between attention and MLP blocks along the sequence, over the tp ranks:
            norms, dropout and residuals take 1 / tp_size of the memory, at the same communication. Derived from the
            plan.
        sequence_parallel_regather: keep only this rank's share of the inputs of attention and MLP, and gather them
            again in backward: less memory, for two more all-gathers per dense layer in backward. Goes with
            ``activation_checkpointing="selective"``; the other checkpoints do the same anyway, and it is refused beside
            them.
        loss_parallel: keep the logits sharded over the vocabulary and compute cross entropy on the shards. None: under
            tensor parallelism wherever the output projection is sharded that way. True requires it, False gathers
            logits as whole tensors.
        loss_chunk_size: rows (tokens) whose logits that loss has in float32 at a time. None: as many as fit in 64 MiB.
        async_tensor_parallel: overlap the collectives of sequence parallelism with matrix products; needs
            ``sequence_parallel``, ``compile=True`` and CUDA with symmetric memory, and is refused elsewhere.
        activation_checkpointing: "none", "full" (whole layers), "submodule" (attention and MLP of each layer) or
            "selective" (keep attention, collectives and half of the matrix products); True means "full". None: what the
            ``fsdp_plugin`` says. The model's own ``gradient_checkpointing_enable`` is the alternative, never both.
        compile: compile each layer: True, or the name of a ``torch.compile`` backend. False: what Accelerate's dynamo
            settings (``torch_compile=True`` in ``TrainingArguments``) say.
        audit: when to check that no trainable parameter lost its gradient, none was frozen or unfrozen unasked, and
            copies of parameters are equal on all ranks: "first_step" (the first optimizer step; also None and True),
            "every_n_steps" (again every ``audit_steps`` optimizer steps), "off" (also False).
        backend: what shards parameters over the data-parallel ranks: "fsdp2", or "megatron_fsdp", NVIDIA's package of
            that name (extra ``megatron``).
        megatron_fsdp: options of that backend by name, such as ``{"zero_dp_strategy": 2}``: the arguments of
            ``megatron_fsdp_strategy_parallelize``; see :class:`.megatron.options.MegatronOptions`.
        audit_steps: the n of "every_n_steps".
        towers: where FSDP2 keeps the parameters of towers (vision, audio), which only some forwards run. "root" (also
            None): with the root, gathered in every forward, so that ranks with and without images may meet; "layers":
            each of their layers a unit, which takes less memory and needs images on all data-parallel ranks or none;
            "replicated": frozen parameters whole on each rank, trained ones with the root. Naming their classes in
            ``transformer_cls_names_to_wrap`` means "layers".
        async_save: write checkpoints of training in the background: weights and optimizer state are copied to the CPU,
            and training goes on while they are written. The checkpoint is complete, and counts, when its manifest is
            there.
        check_optimizer: at ``prepare``, try on small tensors that the optimizer computes on shards what it computes on
            whole parameters, and refuse it if not. False trusts it.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
        UnsupportedError: a ``cp_handler`` asks for ring attention.

    Example:
        >>> config = AutoParallelismConfig(tp_size=2)                  # dp_shard = world size / 2
        >>> config = AutoParallelismConfig.parse("tp=2,dp_shard=4")    # the command-line form
    """

    tp_plan: str | Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None
    plan_order: tuple[str, ...] = PLAN_SOURCES
    reshard_after_forward: bool | None = None
    forward_prefetch: int = 1
    backward_prefetch: int = 2
    sequence_parallel: bool = False
    sequence_parallel_regather: bool = False
    async_tensor_parallel: bool = False
    loss_parallel: bool | None = None
    loss_chunk_size: int | None = None
    activation_checkpointing: str | bool | None = None
    compile: bool | str = False
    check_optimizer: bool = True
    async_save: bool = False
    audit: str | bool | None = None
    audit_steps: int = DEFAULT_AUDIT_STEPS
    backend: str = "fsdp2"
    megatron_fsdp: Mapping[str, Any] | None = None
    towers: str | None = None

    # ---- construction ------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        self._read_sizes_from_environment()
        self._check_fields()
        self._open_axes = tuple(axis for axis in AXES if getattr(self, f"{axis}_size") is None)
        # The parent refuses tp with replicas and dp_shard=1, because it would use DDP; FSDP2 runs on an axis of one
        # rank.
        dp_shard_size: int | None = self.dp_shard_size  # type: ignore[has-type]
        self.dp_shard_size = 2
        super().__post_init__()
        self._set_size("dp_shard", 1 if dp_shard_size is None else dp_shard_size)
        self._check_context_parallel()
        self._check_no_other_accelerator()

    def _check_context_parallel(self) -> None:
        strategy = getattr(self.cp_handler, "cp_comm_strategy", "allgather")
        if self.cp_size > 1 and strategy != "allgather":  # type: ignore[operator]
            raise UnsupportedError(
                f"cp_handler has cp_comm_strategy={strategy!r}: keys and values are gathered over the cp axis, once "
                f"per layer. Use cp_comm_strategy='allgather' (the default), or cp_size=1."
            )

    def _read_sizes_from_environment(self) -> None:
        """Take sizes that nobody gave from ``accelerate launch``, before the checks, which they have to pass too."""
        for axis in AXES:
            variable = f"PARALLELISM_CONFIG_{axis.upper()}_SIZE"
            if getattr(self, f"{axis}_size") is not None or variable not in os.environ:
                continue
            try:
                setattr(self, f"{axis}_size", int(os.environ[variable]))
            except ValueError as error:
                raise ConfigError(
                    f"the environment variable {variable}={os.environ[variable]!r} is no whole number."
                ) from error

    def _check_fields(self) -> None:
        for axis in AXES:
            size = getattr(self, f"{axis}_size")
            if size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(
                    f"{axis}_size={size!r}: a mesh axis has a whole number of ranks, at least 1. "
                    f"Leave it out to have it inferred from the world size."
                )
        for name in ("forward_prefetch", "backward_prefetch"):
            depth = getattr(self, name)
            if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
                raise ConfigError(f"{name}={depth!r}: give the number of layers to gather ahead, 0 or more.")
        if self.reshard_after_forward not in (None, True, False):
            raise ConfigError(
                f"reshard_after_forward={self.reshard_after_forward!r}: give true, false or leave it out."
            )
        if self.loss_parallel not in (None, True, False):
            raise ConfigError(f"loss_parallel={self.loss_parallel!r}: give true, false or leave it out.")
        rows = self.loss_chunk_size
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ConfigError(f"loss_chunk_size={rows!r}: give a number of rows (tokens), at least 1, or leave it out.")
        if rows is not None and self.loss_parallel is False:
            raise ConfigError(
                f"loss_chunk_size={rows} has a meaning with loss parallelism alone, which loss_parallel=False switches "
                f"off. Leave out one of the two."
            )
        if isinstance(self.plan_order, str):
            self.plan_order = tuple(part for part in self.plan_order.replace("+", " ").split() if part)
        if not isinstance(self.plan_order, Iterable):
            raise ConfigError(f"plan_order={self.plan_order!r}: give an order of {', '.join(PLAN_SOURCES)}.")
        self.plan_order = tuple(self.plan_order)
        unknown = [source for source in self.plan_order if source not in PLAN_SOURCES]
        if unknown or len(set(self.plan_order)) != len(self.plan_order) or not self.plan_order:
            raise ConfigError(
                f"plan_order={self.plan_order!r}: give an order of {', '.join(PLAN_SOURCES)} (a subset, each once)."
            )
        if not (self.tp_plan is None or isinstance(self.tp_plan, (str, Mapping)) or callable(self.tp_plan)):
            raise ConfigError(
                f"tp_plan={self.tp_plan!r}: give a dict, a callable that returns one, an import path or a plan name."
            )
        if self.activation_checkpointing is not None:
            mode = self.activation_checkpointing
            if not isinstance(mode, bool) and mode not in CHECKPOINTING_MODES:
                raise ConfigError(f"activation_checkpointing={mode!r}: give one of {', '.join(CHECKPOINTING_MODES)}.")
        if self.compile is None:
            self.compile = False
        if not isinstance(self.compile, (bool, str)) or self.compile == "":
            raise ConfigError(f"compile={self.compile!r}: give true, false or the name of a torch.compile backend.")
        if not (self.audit is None or isinstance(self.audit, bool)) and self.audit not in AUDIT_MODES:
            raise ConfigError(f"audit={self.audit!r}: give one of {', '.join(AUDIT_MODES)}.")
        steps = self.audit_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(
                f"audit_steps={steps!r}: give the number of optimizer steps between two audits, at least 1."
            )
        if steps != DEFAULT_AUDIT_STEPS and self.audit != "every_n_steps":
            raise ConfigError(
                f"audit_steps={steps} has a meaning with audit='every_n_steps' alone, not {self.audit!r}."
            )
        if self.towers not in (None, *PLACEMENTS):
            raise ConfigError(f"towers={self.towers!r}: give one of {', '.join(PLACEMENTS)}.")
        if self.backend is None:  # an empty line in a YAML file
            self.backend = "fsdp2"
        self._check_backend()
        if not isinstance(self.check_optimizer, bool):
            raise ConfigError(f"check_optimizer={self.check_optimizer!r}: give true or false.")
        for name in ("sequence_parallel", "sequence_parallel_regather", "async_tensor_parallel", "async_save"):
            if getattr(self, name) is None:
                setattr(self, name, False)
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give true or false.")
        if self.sequence_parallel_regather and not self.sequence_parallel:
            raise ConfigError(
                "sequence_parallel_regather=True has a meaning with sequence_parallel=True alone: without it nothing "
                "is gathered along the sequence. Set sequence_parallel=True, or leave it out."
            )
        if self.sp_size is not None and self.sp_size > 1:
            raise ConfigError(
                f"sp_size={self.sp_size}: Accelerate's sp axis is DeepSpeed's Ulysses, which does not go with FSDP2. "
                f"Use sp_size=1."
            )

    def _check_backend(self) -> None:
        if self.backend not in BACKENDS:
            hint = difflib.get_close_matches(str(self.backend), BACKENDS, n=1, cutoff=0.5)
            raise ConfigError(
                f"backend={self.backend!r}: give one of {', '.join(BACKENDS)}"
                + (f"; did you mean {hint[0]!r}?" if hint else ".")
            )
        if self.megatron_fsdp is not None and not isinstance(self.megatron_fsdp, Mapping):
            raise ConfigError(f"megatron_fsdp={self.megatron_fsdp!r}: give a mapping of option names to values.")
        if self.backend != "megatron_fsdp":
            if self.megatron_fsdp is not None:
                raise ConfigError(
                    f"megatron_fsdp={dict(self.megatron_fsdp)!r} has a meaning with backend='megatron_fsdp' alone, not "
                    f"{self.backend!r}."
                )
            return
        from ..backends.megatron_fsdp.options import MegatronOptions

        MegatronOptions.from_mapping(self.megatron_fsdp)
        options = ("reshard_after_forward", "forward_prefetch", "backward_prefetch", "compile", "async_save", "towers")
        for name in options:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is an option of FSDP2, which backend='megatron_fsdp' does not "
                    f"take. Leave it out; its own options stand in megatron_fsdp={{...}}."
                )

    def _check_no_other_accelerator(self) -> None:
        """Accelerate silently drops a config given to a second ``Accelerator``; say so while there is somebody to
        tell.
        """
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
        """Fill in the sizes that nobody gave, so that the product of all axes is ``world_size``.

        Raises:
            ConfigError: the given sizes do not divide, or do not multiply to, the world size.
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
            hint = (
                " (On CPU start them with torchrun and Accelerator(cpu=True): accelerate launch --cpu starts one "
                "process, whatever --num_processes says.)"
            )
            raise ConfigError(
                f"the sizes of the mesh axes ({given}) multiply to {known}, but there are {world_size} processes. "
                f"Start {needed} processes, or change a size so that the product is {world_size}."
                + (hint if world_size == 1 else "")
            )
        if absorber is not None:
            self._set_size(absorber, rest)
        self._check_loss_has_ranks()
        if self.tp_plan is not None and self.tp_size == 1:
            raise ConfigError(
                "tp_plan with tp_size=1: there is nothing that it could shard. Use tp_size=2 or more, or leave tp_plan "
                "out."
            )
        if self.plan_order != PLAN_SOURCES and self.tp_size == 1:
            raise ConfigError(
                f"plan_order={self.plan_order!r} with tp_size=1: without tensor parallelism no plan is looked for. Use "
                f"tp_size=2 or more, or leave plan_order out."
            )
        if getattr(self.tp_handler, "enable_async_tp", False):  # type: ignore[has-type]
            raise ConfigError(
                "tp_handler=TorchTensorParallelConfig(enable_async_tp=True): Accelerate ignores it, and so would we. "
                "Use AutoParallelismConfig(async_tensor_parallel=True)."
            )
        if self.sequence_parallel and self.tp_size == 1:
            raise ConfigError(
                "sequence_parallel=True with tp_size=1: sequences are split over the ranks of the tp axis. Use "
                "tp_size=2 or more, or sequence_parallel=False."
            )
        if self.tp_size > 1 and self.tp_handler is None:  # type: ignore[has-type]
            from accelerate.utils import TorchTensorParallelConfig

            self.tp_handler = TorchTensorParallelConfig()

    def _check_loss_has_ranks(self) -> None:
        for name, value in (("loss_parallel", self.loss_parallel or None), ("loss_chunk_size", self.loss_chunk_size)):
            if value is not None and self.tp_size == 1:  # type: ignore[has-type]
                raise ConfigError(
                    f"{name}={value!r} needs a tp axis, over which the vocabulary is spread, but tp_size is 1. Use "
                    f"tp_size=2 or more, or leave it out."
                )

    @property
    def dp_shard_enabled(self) -> bool:
        """True whenever there is a process group: FSDP2 also runs on a ``dp_shard`` axis of size 1 ("TP only")."""
        return self.dp_shard_size > 1 or self.device_mesh is not None or _world_size() is not None

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """Infer open sizes, then build the mesh (Accelerate calls this first, before any other method).

        Returns:
            The mesh with axes (dp_replicate,) dp_shard (, cp) (, tp), or None in a process without a process group.

        Raises:
            ConfigError: the sizes do not fit the world size, or the ranks have different configs.
        """
        if self.device_mesh is None:
            world = _world_size()
            if world is None:
                _check_alone()
                self.resolve_sizes(1)
                return None
            from ..core.consistency import check_same_configs
            from ..core.ranks import raise_on_all_ranks

            with raise_on_all_ranks("AutoParallelismConfig"):
                self.resolve_sizes(world)
            check_same_configs(self._sizes, collective_choices(self))
        mesh = super().get_device_mesh(device_type)
        if mesh is not None:
            from ..core.mesh import inherit_timeouts

            inherit_timeouts(mesh)
        return mesh

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        # The seam: the only moment at which Accelerate hands us the instance. Imported late, the import arrow points
        # back.
        from .methods import install

        install(self, accelerator)

    def check_accelerator(self, accelerator: Accelerator) -> None:
        """Run Accelerate's own checks of sizes and distributed type."""
        super()._validate_accelerator(accelerator)

    # ---- text and dict forms -----------------------------------------------------------------------------------

    @classmethod
    def parse(cls, value: str | os.PathLike[str] | Mapping[str, Any] | AutoParallelismConfig) -> AutoParallelismConfig:
        """Read a config from any of its forms.

        Args:
            value: a config (returned as it is), a dict, the path of a YAML or JSON file, a JSON object as text, or a
                comma-separated list such as ``"tp=2,dp_shard=4,plan_order=registry+hf"`` (a bare name means true).

        Raises:
            ConfigError: unreadable file, malformed text, unknown field (with the nearest known one).
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
        """Build a config from a mapping of field names, with or without the ``_size`` suffix of the axes."""
        known = {field.name for field in dataclasses.fields(cls)}
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            name = f"{key}_size" if key in AXES else key
            if name not in known:
                hint = difflib.get_close_matches(str(key), sorted(known) + list(AXES), n=1, cutoff=0.5)
                raise ConfigError(
                    f"unknown field {key!r} in the parallelism config"
                    + (f"; did you mean {hint[0]!r}?" if hint else ".")
                    + f" Known fields: {', '.join(sorted(known))}."
                )
            if name in arguments:
                raise ConfigError(f"the field {name!r} is given twice in the parallelism config.")
            arguments[name] = restore(name, value)
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of every field that differs from its default; ``from_dict`` restores an equal config."""
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
        """What ``TrainingArguments.to_dict`` stores (Accelerate's own version returns None)."""
        return self.to_dict()

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({inner})"

    # A mesh holds process groups: it belongs to one process and is rebuilt, never copied or written to disk.
    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "device_mesh"}
        try:
            pickle.dumps(self.tp_plan)
        except Exception:  # a lambda; the Trainer pickles its arguments with each checkpoint, which must not fail there
            state["tp_plan"] = plain(self.tp_plan)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoParallelismConfig:
        result = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            if name != "device_mesh":
                result.__dict__[name] = copy.deepcopy(value, memo)
        return result


def _world_size() -> int | None:
    """Size of the process group, None without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else None


def _check_alone() -> None:
    """Raise if this process was launched as one of several that Accelerate has not connected.

    Without a GPU Accelerate forms a process group only for those who ask for the CPU; else each process trains on its
    own.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdecimal() and int(started) > 1:
        raise ConfigError(
            f"{started} processes were started (WORLD_SIZE), but Accelerate found no accelerator device and was not "
            f"asked for the CPU, so that each of them is alone. On CPU pass Accelerator(cpu=True) or "
            f"TrainingArguments(use_cpu=True), or set ACCELERATE_USE_CPU=true."
        )


def normalized_audit(value: str | bool | None) -> str:
    """The mode that a checked ``audit`` asks for: None and True mean "first_step", False means "off"."""
    return "off" if value is False else value if isinstance(value, str) else "first_step"
