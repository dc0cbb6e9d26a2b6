"""The kinds of layer that a style can be applied to, and PEFT's wrappers around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .. import compat
from ..core.model_view import class_of
from ..core.packed_weights import packed_matrix
from ..errors import UnsupportedError


@dataclass(frozen=True)
class Matrix:
    """A layer that multiplies its input by a matrix.

    Attributes:
        module: the layer itself.
        out_dim: dimension of ``weight`` that runs over output features.
        in_dim: dimension of ``weight`` that runs over input features.
    """

    module: nn.Module
    out_dim: int
    in_dim: int

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, which a packed weight does not have itself."""
        packed = packed_matrix(self.module)
        return tuple(self.weight.shape) if packed is None else packed.shape

    @property
    def out_features(self) -> int:
        return self.shape[self.out_dim]

    @property
    def in_features(self) -> int:
        return self.shape[self.in_dim]

    def size(self, side: str) -> int:
        """Features on the "out" or "in" side."""
        return self.out_features if side == "out" else self.in_features

    def dim(self, side: str) -> int:
        """Weight dimension of the "out" or "in" side."""
        return self.out_dim if side == "out" else self.in_dim


def as_matrix(module: nn.Module, name: str) -> Matrix | None:
    """``module`` as a matrix layer (``nn.Linear`` or transformers' ``Conv1D``), None for any other module.

    Raises:
        UnsupportedError: a linear layer with quantised weights, whose storage cannot be sliced.
    """
    if packed_matrix(module) is not None:
        return Matrix(module, out_dim=0, in_dim=1)
    if isinstance(module, nn.Linear):
        weight = module.weight
        # Sorted, because a layer that was made around a tied table may have in_features and out_features exchanged.
        if not weight.is_floating_point() or sorted(weight.shape) != sorted((module.out_features, module.in_features)):
            raise UnsupportedError(
                f"{name} is a quantised {type(module).__name__} (weight {tuple(weight.shape)}, {weight.dtype}); tensor "
                f"parallelism of quantised weights is not available. Use tp_size=1, or load the model unquantised."
            )
        return Matrix(module, out_dim=0, in_dim=1)
    conv1d = compat.transformers_conv1d_type()
    if conv1d is not None and isinstance(module, conv1d):
        return Matrix(module, out_dim=1, in_dim=0)
    return None


def expand_wrappers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute in place of ``module``: itself, or those inside of PEFT's auxiliary wrapper around it.

    For ``modules_to_save`` these are the original and the copy of each adapter; for ``trainable_token_indices`` it is
    the token adapter.

    Yields:
        (name, module).

    Raises:
        UnsupportedError: another auxiliary wrapper of PEFT.
    """
    auxiliary = compat.peft_auxiliary_wrapper_type()
    if auxiliary is None or not isinstance(module, auxiliary):
        yield name, module
        return
    if isinstance(getattr(module, "token_adapter", None), nn.Module):
        yield f"{name}.token_adapter", module.token_adapter  # type: ignore[misc]
        return
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        raise UnsupportedError(
            f"{name} is wrapped in PEFT's {type(module).__name__}, which is not available under tensor parallelism. "
            f"Use tp_size=1 (FSDP2 works), or drop the option from the PEFT config."
        )
    yield f"{name}.original_module", module.original_module  # type: ignore[misc]
    for adapter, copy in copies.items():
        yield f"{name}.modules_to_save.{adapter}", copy


#: PEFT's methods that tensor parallelism supports. The others would get a shard where they expect the full layer or
#: all heads.
_METHODS = ("LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING")


def check_peft_method(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if ``model`` uses a PEFT method that is wrong on sharded layers."""
    if not compat.is_peft_model(model):
        return
    for adapter, config in model.peft_config.items():  # type: ignore[union-attr,operator]
        method = str(getattr(config.peft_type, "value", config.peft_type))
        if method not in _METHODS:
            raise UnsupportedError(
                f"the adapter {adapter!r} is PEFT's {method}, which is not available under tensor parallelism "
                f"(available: {', '.join(_METHODS)}). Use one of these, or tp_size=1 (FSDP2 works)."
            )


def check_adapter(name: str, module: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if tensor parallelism cannot shard the PEFT layer ``module`` or its variant."""
    kind = class_of(module)
    method = f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}"
    remedy = "Use plain LoRA or rsLoRA on it, exclude it from target_modules, or use tp_size=1 (FSDP2 works)."
    if kind not in compat.peft_layer_types() and not is_parameter_adapter(module):
        raise UnsupportedError(f"{name} is the PEFT layer {method}, not available under tensor parallelism. {remedy}")
    known = compat.peft_lora_variant_types()
    others = {type(v).__name__ for v in getattr(module, "lora_variant", {}).values() if type(v) not in known}
    if others:
        raise UnsupportedError(
            f"{name} uses the LoRA variant {', '.join(sorted(others))}, not available yet under tensor parallelism. "
            f"{remedy}"
        )


def is_parameter_adapter(module: nn.Module) -> bool:
    """True for PEFT's LoRA on a bare parameter (``target_parameters``; "all-linear" uses it for expert weights)."""
    wrapper = compat.peft_parameter_wrapper_type()
    return wrapper is not None and class_of(module) is wrapper


def trains_rows(adapter: nn.Module | None) -> bool:
    """True for PEFT's layer that trains some rows of a table; it reads the table past the forward of the base layer."""
    return hasattr(adapter, "trainable_tokens_delta")


def parameter_adapter_out_dim(adapter: nn.Module) -> int:
    """Dimension of the adapted parameter over which ``lora_B`` runs; ``lora_A`` runs over the other matrix dimension.

    The parameter is ``(out, in)``, ``(experts, out, in)``, or ``(experts, in, out)`` in modules that store it
    transposed. PEFT itself decides which of the last two it is, and its feature counts follow from that decision; so
    the decision is asked for, not the counts.
    """
    if adapter.num_experts == 1:  # type: ignore[union-attr]
        return 0
    return 1 if compat.parameter_adapter_stores_out_first(adapter) else 2


def only_looks_up(embedding: nn.Embedding) -> bool:
    """True if the table is the only parameter of an embedding.

    Another one (a norm, for example) would be applied to this rank's rows alone, before the all-reduce over tp.
    """
    return [name for name, _ in embedding.named_parameters()] == ["weight"]
