"""The options of megatron-fsdp, checked before anything is sharded. Needs neither the package nor a process group."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ConfigError, UnsupportedError

#: megatron-fsdp's name of a ZeRO strategy -> ``zero_dp_strategy``.
STRATEGIES = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}

#: Strategies that shard gradients, and those that shard parameters.
SHARDS_GRADIENTS, SHARDS_PARAMETERS = (2, 3), (3,)


@dataclass(frozen=True)
class MegatronOptions:
    """Behaviour of megatron-fsdp; names and defaults are those of ``megatron_fsdp_strategy_parallelize``.

    Args:
        megatron_fsdp_unit_modules: classes whose instances are the units of all-gather and resharding: class objects,
            import paths or bare class names. None: the classes of the model's repeated layers (``_no_split_modules``),
            or the model as one unit if it has none.
        zero_dp_strategy: sharded over the data-parallel ranks are: 0 nothing, 1 the optimizer's state, 2 also
            gradients, 3 also parameters (or megatron-fsdp's names for them, "no_shard", "optim", "optim_grads",
            "optim_grads_params").
        init_fsdp_with_meta_device: the model is on the meta device; each module is initialised by its own
            ``reset_parameters`` when its shards are made.
        grad_reduce_in_fp32: reduce and keep gradients in float32 for parameters of any dtype.
        preserve_fp32_weights: let the optimizer update float32 copies of parameters in a lower precision.
        overlap_grad_reduce: reduce gradients while the backward computes. Strategies 2 and 3 always do.
        overlap_param_gather: gather parameters while the forward computes. Strategy 3 always does.
        check_for_nan_in_grad: before each optimizer step, raise on all ranks if a gradient is not finite.
        average_in_collective: average in the collective instead of scaling before it (NCCL only).
        disable_bucketing: one bucket for all parameters outside of the units.
        calculate_per_token_loss: sum gradients over the ranks instead of averaging them; the caller normalises the
            loss.
        keep_fp8_transpose_cache: keep the transposed copies of float8 weights between forward and backward.
        nccl_ub: communicate from registered user buffers (NCCL only).
        fsdp_double_buffer: gather into two fixed buffers instead of allocating.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
        UnsupportedError: two options contradict each other.
    """

    megatron_fsdp_unit_modules: tuple[str | type[nn.Module], ...] | None = None
    zero_dp_strategy: int = 3
    init_fsdp_with_meta_device: bool = False
    grad_reduce_in_fp32: bool = False
    preserve_fp32_weights: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    check_for_nan_in_grad: bool = True
    average_in_collective: bool = False
    disable_bucketing: bool = False
    calculate_per_token_loss: bool = False
    keep_fp8_transpose_cache: bool = False
    nccl_ub: bool = False
    fsdp_double_buffer: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r}: give true or false.")
        self._check_strategy()
        self._check_unit_modules()
        if self.init_fsdp_with_meta_device and self.zero_dp_strategy == 0:
            raise UnsupportedError(
                "init_fsdp_with_meta_device=True with zero_dp_strategy=0: nothing is sharded, so there is nothing to "
                "initialise in shards. Use zero_dp_strategy=1, 2 or 3, or build the model on its device."
            )
        for name, strategies, what in (
            ("overlap_grad_reduce", SHARDS_GRADIENTS, "gradients are sharded"),
            ("overlap_param_gather", SHARDS_PARAMETERS, "parameters are sharded"),
        ):
            if not getattr(self, name) and self.zero_dp_strategy in strategies:
                raise UnsupportedError(
                    f"{name}=False with zero_dp_strategy={self.zero_dp_strategy}: where {what}, megatron-fsdp always "
                    f"overlaps and would ignore it. Leave {name} out, or use zero_dp_strategy={min(strategies) - 1} or "
                    "less."
                )
        if self.calculate_per_token_loss and self.average_in_collective:
            raise UnsupportedError(
                "calculate_per_token_loss=True sums gradients and average_in_collective=True averages them. Use one of "
                "the two."
            )

    def _check_strategy(self) -> None:
        value = self.zero_dp_strategy
        number = STRATEGIES.get(value, value) if isinstance(value, str) else value
        if isinstance(number, bool) or number not in STRATEGIES.values():
            known = ", ".join(f"{number} ({name})" for name, number in STRATEGIES.items())
            raise ConfigError(f"zero_dp_strategy={value!r}: give one of {known}.")
        object.__setattr__(self, "zero_dp_strategy", int(number))

    def _check_unit_modules(self) -> None:
        given = self.megatron_fsdp_unit_modules
        if given is None:
            return
        items = (given,) if isinstance(given, (str, type)) else given
        if not isinstance(items, (list, tuple)) or not items or not all(map(_names_a_class, items)):
            raise ConfigError(
                f"megatron_fsdp_unit_modules={given!r}: give a list of classes, of their import paths or of their "
                f"names, or None for the repeated layers of the model."
            )
        object.__setattr__(self, "megatron_fsdp_unit_modules", tuple(items))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> MegatronOptions:
        """Build the options from a mapping of field names, such as the section of a config file.

        Raises:
            ConfigError: an unknown name; the message has the nearest known one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values or {}:
            if key not in known:
                hint = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                raise ConfigError(
                    f"unknown option {key!r} of megatron_fsdp"
                    + (f"; did you mean {hint[0]!r}?" if hint else ".")
                    + f" Known options: {', '.join(known)}."
                )
        return cls(**(values or {}))


def _names_a_class(item: Any) -> bool:
    return bool(item) and (isinstance(item, str) or (isinstance(item, type) and issubclass(item, nn.Module)))
