"""Synchronous stand-ins for what megatron-fsdp asks of CUDA and NCCL, so that its real code runs on gloo.

Streams and events only order work that overlaps; where every call is finished when it returns, they have nothing to do.
Used by tests alone: the package itself has no such thing.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


class Event:
    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Event:
        return Event()

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def cuda_standins() -> Iterator[None]:
    """Install the stand-ins for the duration of a job."""
    import megatron_fsdp.param_and_grad_buffer as buffers

    preprocessing = buffers.gradient_reduce_preprocessing

    def without_premultiplied_sum(gradient: torch.Tensor, factor: float | None, config: Any) -> Any:
        """Scaling inside of the reduction is NCCL's alone; elsewhere megatron-fsdp scales before it, as for
        bfloat16.
        """
        return preprocessing(gradient, factor, dataclasses.replace(config, gradient_reduce_div_fusion=False))

    with contextlib.ExitStack() as stack:
        for name, standin in {
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda *args: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "synchronize": lambda *args: None,
            "empty_cache": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, standin))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self))
        stack.enter_context(mock.patch.object(buffers, "gradient_reduce_preprocessing", without_premultiplied_sum))
        yield
