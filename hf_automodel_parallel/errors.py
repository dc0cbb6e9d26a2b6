"""The error classes of this package. A message names the field, its value and the remedy."""

from __future__ import annotations


class AutoParallelError(ValueError):
    """Base class of all errors that this package raises for user mistakes and unsupported requests."""


class ConfigError(AutoParallelError):
    """A field of :class:`AutoParallelismConfig`, or another argument of Accelerate, is invalid, or two conflict."""


class PlanError(AutoParallelError):
    """A tensor-parallel plan cannot be found, read, matched or applied."""


class PlanAssertionError(PlanError, AssertionError):
    """A :class:`PlanError` that is also an ``AssertionError``, as NeMo AutoModel's functions of the same name raise."""


class UnsupportedError(AutoParallelError):
    """The request is valid, but this version does not support it; the message names an alternative."""


class PrepareError(AutoParallelError):
    """The objects in one ``Accelerator.prepare`` call do not fit together, or differ across ranks."""


class ExportError(AutoParallelError):
    """The files of a model cannot be written, or their source cannot be read."""


class NotAvailableYetError(UnsupportedError, NotImplementedError):
    """The option is planned, but not implemented yet. It raises instead of being ignored."""


class CheckpointError(AutoParallelError):
    """A checkpoint cannot be written or read; the message names the file, or the key, and what to do."""


class RegistrationError(ConfigError, AssertionError):
    """The registered object is not a strategy, or its name is taken. The reference API documents AssertionError."""


def not_available_yet(field: str, value: object, remedy: str) -> NotAvailableYetError:
    """Return the error for an option that this version does not implement.

    Args:
        field: name of the option as the user writes it.
        value: the given value.
        remedy: an alternative, as an imperative sentence.
    """
    return NotAvailableYetError(f"{field}={value!r} is not available yet in this version. {remedy}")


def without_stop(text: object) -> str:
    """``str(text)`` without its full stop, to quote it inside of a sentence."""
    return str(text).strip().rstrip(".")


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error`` without its full stop, to quote it; the class name if empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
