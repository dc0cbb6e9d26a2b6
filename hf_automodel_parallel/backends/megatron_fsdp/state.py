"""State dicts of a model and its optimizers under megatron-fsdp, with full tensors.

For a checkpoint, Accelerate and the Trainer call ``state_dict()`` on all ranks and gather DTensors with
``full_tensor()``, which is wrong for megatron-fsdp's uneven shards. So hooks put full tensors into the state dicts, and
shard full tensors when a state dict is loaded. The files are the same as with every other backend and mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...core.ranks import gather_objects
from ...errors import UnsupportedError
from . import engine
from .sharding import MegatronModel
from .shards import local_part


class FullStates:
    """Puts full tensors into the state dicts of one model and its optimizers; ``state_dict()`` is collective."""

    def __init__(self, managed: MegatronModel) -> None:
        self.managed = managed
        self.full: dict[str, nn.Parameter] | None = None
        self.names = self._names()
        managed.model.register_state_dict_post_hook(lambda *args: self._model_saved(*args))
        managed.model.register_load_state_dict_pre_hook(self._model_loaded)
        managed.model.register_load_state_dict_post_hook(self._keep)

    def of_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Put full tensors into the state dict of ``optimizer``, too."""
        optimizer.register_state_dict_post_hook(self._optimizer_saved)
        optimizer.register_load_state_dict_pre_hook(self._optimizer_loaded)

    # ---- the model -------------------------------------------------------------------------------------------------

    def _names(self) -> dict[str, str]:
        """Every name of a parameter, including each name of a tied one -> its first name, under which it is sharded."""
        by_id = {id(parameter): name for name, parameter in self.managed.parameters.items()}
        shown = self.managed.model.named_parameters(remove_duplicate=False)
        return {name: by_id[id(parameter)] for name, parameter in shown if id(parameter) in by_id}

    def _model_saved(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self.full is not None:
            return
        engine.show_sharded(self.managed.wrapper)
        tied: dict[str, torch.Tensor] = {}
        for name, first in self.names.items():
            if f"{prefix}{name}" not in state:
                continue
            # Gathered once, so that tied names have one tensor in the state dict, too.
            if first not in tied:
                tied[first] = self._home(self.managed.row_shards.full_tensor(first, self.managed.parameters[first]))
            state[f"{prefix}{name}"] = tied[first]

    def _model_loaded(self, model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if self.full is not None:
            return
        engine.show_sharded(self.managed.wrapper)
        for name, first in self.names.items():
            value = state.get(f"{prefix}{name}")
            if isinstance(value, DTensor):
                raise UnsupportedError(
                    "loading DTensors into a model that megatron-fsdp manages: its shards are uneven, theirs are not. "
                    "Load full tensors with model.load_state_dict(), or a checkpoint with accelerator.load_state() or "
                    "Trainer.train(resume_from_checkpoint=...)."
                )
            if isinstance(value, torch.Tensor):
                state[f"{prefix}{name}"] = self.managed.sharded(first, value)

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        """Show full plain parameters until ``model.load_state_dict()`` has run; then each rank keeps its rows of them.

        For code that shards what it loads like the parameters of the model: it would cut DTensors evenly. Collective.
        """
        engine.show_sharded(self.managed.wrapper)
        self.full = {
            name: nn.Parameter(
                self._home(self.managed.row_shards.full_tensor(name, parameter)), parameter.requires_grad
            )
            for name, parameter in self.managed.parameters.items()
        }
        self._show(self.names, self.full)
        try:
            yield
        finally:
            self._keep()

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        """Show the sharded parameters again, with this rank's rows of the current values of the full ones."""
        if self.full is None:
            return
        full, self.full = self.full, None
        sharded = self.managed.parameters
        self._show(self.names, sharded)
        for name, parameter in sharded.items():
            part = local_part(parameter)
            part.copy_(self.managed.row_shards.local(name, full[name].detach()).reshape(part.shape))
        engine.install_values(self.managed.wrapper)

    def _show(self, names: dict[str, str], parameters: dict[str, nn.Parameter]) -> None:
        for name, first in names.items():
            path, _, key = name.rpartition(".")
            self.managed.model.get_submodule(path)._parameters[key] = parameters[first]

    def _home(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the CPU, where the entire model fits; unchanged if the process group has no CPU backend, which
        loading needs to broadcast it.
        """
        return tensor.cpu() if "gloo" in dist.get_backend_config() else tensor

    # ---- optimizers ------------------------------------------------------------------------------------------------

    def _names_in(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[Any, str]:
        """Key of each parameter in ``state["state"]`` -> its name."""
        by_id = {id(parameter): name for name, parameter in self.managed.parameters.items()}
        pairs = zip(optimizer.param_groups, state["param_groups"], strict=True)
        return {
            key: by_id[id(parameter)]
            for group, saved in pairs
            for parameter, key in zip(group["params"], saved["params"], strict=True)
        }

    def _optimizer_saved(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # A rank without rows of a parameter has no state of it, so the ranks exchange which states there are.
        mine = {}
        for key, name in self._names_in(optimizer, state).items():
            values = state["state"].get(key, {})
            mine[key] = {entry: self._described(name, value) for entry, value in values.items()}
        gathered = gather_objects(mine)
        result: dict[Any, dict[str, Any]] = {}
        for key, name in self._names_in(optimizer, state).items():
            known = {entry: described for rank in reversed(gathered) for entry, described in rank.get(key, {}).items()}
            for entry, (dtype, value) in sorted(known.items()):
                if dtype is not None:
                    part = state["state"].get(key, {}).get(entry)
                    value = self._home(self.managed.row_shards.full_tensor(name, part, dtype))
                result.setdefault(key, {})[entry] = value
        return {**state, "state": result}

    def _described(self, name: str, value: Any) -> tuple[torch.dtype | None, Any]:
        """(dtype, None) for a state with the shape of its parameter, (None, value) for any other."""
        if (
            isinstance(value, torch.Tensor)
            and value.ndim
            and value.shape == self.managed.row_shards.by_name[name].shape
        ):
            return value.dtype, None
        return None, value.cpu() if isinstance(value, torch.Tensor) else value

    def _optimizer_loaded(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        names = self._names_in(optimizer, state)
        values = {
            key: {entry: self.managed.sharded(names[key], value) for entry, value in entries.items()}
            if key in names
            else entries
            for key, entries in state["state"].items()
        }
        return {**state, "state": values}
