"""Errors a user can meet, each naming the field, its value and the remedy."""

from __future__ import annotations


class AutoParallelError(ValueError):
    """Base of every error that this package raises for a user's mistake or an unsupported request."""


class ConfigError(AutoParallelError):
    """A field of :class:`AutoParallelismConfig` (or of what Accelerate was given beside it) cannot be honoured."""


class PlanError(AutoParallelError):
    """A tensor-parallel plan cannot be found, read, matched or applied."""


class PlanAssertionError(PlanError, AssertionError):
    """A :class:`PlanError` that code written for NeMo AutoModel's functions of the same names catches as
    ``AssertionError``.
    """


class UnsupportedError(AutoParallelError):
    """The request is understood but this version does not support it; the message says what to use instead."""


class PrepareError(AutoParallelError):
    """The objects given to ``Accelerator.prepare`` do not belong together."""


class ExportError(AutoParallelError):
    """Files of a model cannot be written, or what they should be made of cannot be read."""


class NotAvailableYetError(UnsupportedError, NotImplementedError):
    """The option is part of the design and refused until it is implemented, never ignored."""


class CheckpointError(AutoParallelError):
    """A checkpoint cannot be written or read; the message names the file, or the key, and what to do."""


class RegistrationError(ConfigError, AssertionError):
    """Something that is no strategy, or whose name is taken, was registered (the reference API promises
    AssertionError).
    """


def not_available_yet(field: str, value: object, remedy: str) -> NotAvailableYetError:
    """Build the uniform refusal of an option that this version does not implement.

    Args:
        field: name of the option as the user writes it.
        value: the value given.
        remedy: what to do instead, as an imperative sentence.
    """
    return NotAvailableYetError(f"{field}={value!r} is not available yet in this version. {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of the message of ``error`` without its full stop, or its class if it has none: for a message of
    ours.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
