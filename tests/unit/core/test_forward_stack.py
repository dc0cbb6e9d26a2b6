"""The stack that owns a module's forward: nesting by slot and not by time, and nothing that callers see is lost."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
from typing import Any

import torch
from torch import nn

from hf_automodel_parallel.core.forward_stack import ForwardSlot, ForwardStack, ForwardWrapper, Replacement


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Scale."""
        self.log.append("own")
        return x * scale


class Named(ForwardWrapper):
    """Writes its name into the module's log."""

    def __init__(self, module: nn.Module, name: str, as_method: bool = True) -> None:
        self.module, self.name, self.as_method = module, name, as_method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.module.log.append(self.name)
        return self.inner(*args, **kwargs)


def called(layer: nn.Module) -> list[str]:
    layer.log.clear()
    assert layer(torch.ones(1), scale=3.0).item() == 3.0
    return list(layer.log)


def test_nesting_follows_the_slots_whatever_the_order_of_the_pushes():
    slots = [ForwardSlot.SEQUENCE, ForwardSlot.LOCAL_PARAMETERS, ForwardSlot.CHECKPOINT, ForwardSlot.PARAM_GROUPS]
    for order in itertools.permutations(slots):
        layer = Layer()
        for slot in order:
            ForwardStack.of(layer).push(slot, Named(layer, slot.name))
        assert called(layer) == ["PARAM_GROUPS", "CHECKPOINT", "LOCAL_PARAMETERS", "SEQUENCE", "own"], order


def test_the_written_order():
    """What has to lie inside of what; each has its reason at the slot."""
    s = ForwardSlot
    assert s.COMPUTATION == min(ForwardSlot) and s.PARAM_GROUPS == max(ForwardSlot)
    assert s.SEQUENCE < s.GRAPH_CHECKPOINT < s.COMPILE < s.LOCAL_PARAMETERS < s.CROSS_MODULE_READS
    assert s.SHARED_INPUTS < s.GRAPH_CHECKPOINT and s.DTYPE < s.LOCAL_PARAMETERS
    assert s.LOCAL_PARAMETERS < s.GRAPH_FALLBACK < s.CHECKPOINT < s.PARAM_GROUPS


def test_two_of_one_slot_stand_in_the_order_of_their_pushes():
    layer = Layer()
    for name in ("first", "second", "third"):
        ForwardStack.of(layer).push(ForwardSlot.PARAM_GROUPS, Named(layer, name))
    ForwardStack.of(layer).push(ForwardSlot.CHECKPOINT, Named(layer, "checkpoint"))
    assert called(layer) == ["third", "second", "first", "checkpoint", "own"]
    assert ForwardStack.of(layer).get(ForwardSlot.PARAM_GROUPS).name == "third"


def test_what_lies_further_inside_is_not_linked_again():
    """It may be compiled, and would be compiled once more."""
    linked: list[str] = []

    class Linked(Named):
        def wrap(self, inner: Any) -> Any:
            linked.append(self.name)
            return super().wrap(inner)

    layer = Layer()
    for slot in (ForwardSlot.COMPILE, ForwardSlot.LOCAL_PARAMETERS, ForwardSlot.PARAM_GROUPS, ForwardSlot.CHECKPOINT):
        ForwardStack.of(layer).push(slot, Linked(layer, slot.name))
    assert linked == ["COMPILE", "LOCAL_PARAMETERS", "PARAM_GROUPS", "CHECKPOINT", "PARAM_GROUPS"]


def test_slots_are_emptied_during_a_call():
    layer = Layer()
    stack = ForwardStack.of(layer)

    class Falls(Named):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            stack.remove(ForwardSlot.GRAPH_CHECKPOINT, ForwardSlot.COMPILE)
            return super().__call__(*args, **kwargs)

    for slot in (
        ForwardSlot.SEQUENCE,
        ForwardSlot.GRAPH_CHECKPOINT,
        ForwardSlot.COMPILE,
        ForwardSlot.LOCAL_PARAMETERS,
        ForwardSlot.CHECKPOINT,
    ):
        stack.push(slot, Named(layer, slot.name))
    stack.push(ForwardSlot.GRAPH_FALLBACK, Falls(layer, "fallback"))
    left = ["CHECKPOINT", "fallback", "LOCAL_PARAMETERS", "SEQUENCE", "own"]
    assert called(layer) == left == called(layer)
    assert ForwardSlot.COMPILE not in stack and ForwardSlot.SEQUENCE in stack and stack.get(ForwardSlot.COMPILE) is None


def test_a_replacement_is_the_innermost():
    layer = Layer()
    ForwardStack.of(layer).push(ForwardSlot.SEQUENCE, Named(layer, "sequence"))
    ForwardStack.of(layer).push(ForwardSlot.COMPUTATION, Replacement(lambda x, scale: x + 2))
    assert called(layer) == ["sequence"]


def test_what_other_code_has_put_around_stays_there():
    """Before the first push it is inside of everything; after it, around what is there and inside of what comes."""
    layer = Layer()

    def around(name: str) -> None:
        forward = layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            layer.log.append(name)
            return forward(*args, **kwargs)

        layer.forward = call

    around("users")
    ForwardStack.of(layer).push(ForwardSlot.CHECKPOINT, Named(layer, "checkpoint"))
    first = ForwardStack.of(layer)
    around("later")
    assert ForwardStack.of(layer) is not first
    assert ForwardSlot.CHECKPOINT in ForwardStack.of(layer) and ForwardSlot.COMPILE not in ForwardStack.of(layer)
    ForwardStack.of(layer).push(ForwardSlot.SEQUENCE, Named(layer, "sequence"))
    assert called(layer) == ["sequence", "later", "checkpoint", "users", "own"]
    first.push(
        ForwardSlot.LOCAL_PARAMETERS, Named(layer, "local")
    )  # the stack that is inside keeps its wrappers linked
    assert called(layer) == ["sequence", "later", "checkpoint", "local", "users", "own"]


def test_looking_changes_nothing():
    layer = Layer()
    assert ForwardSlot.CHECKPOINT not in ForwardStack.of(layer)
    assert set(vars(layer)) == set(vars(Layer()))


def test_callers_see_the_signature_and_the_name_of_the_own_forward():
    layer = Layer()
    own = inspect.signature(layer.forward)
    layer.forward = functools.wraps(layer.forward)(functools.partial(layer.forward))
    layer.forward.name = "an attribute of the own forward"
    ForwardStack.of(layer).push(ForwardSlot.CHECKPOINT, Named(layer, "method"))
    ForwardStack.of(layer).push(ForwardSlot.PARAM_GROUPS, Named(layer, "object", as_method=False))
    assert inspect.signature(layer.forward) == own
    assert (layer.forward.__name__, layer.forward.__doc__) == ("forward", "Scale.")
    assert inspect.unwrap(layer.forward).__func__ is Layer.forward
    assert layer.forward.name == "object"


def test_copies_have_stacks_of_their_own():
    layer = Layer()
    ForwardStack.of(layer).push(ForwardSlot.CHECKPOINT, Named(layer, "checkpoint"))
    ForwardStack.of(layer).push(ForwardSlot.PARAM_GROUPS, Named(layer, "group", as_method=False))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert ForwardStack.of(copied).module is copied and ForwardSlot.CHECKPOINT in ForwardStack.of(copied)
        ForwardStack.of(copied).push(ForwardSlot.SEQUENCE, Named(copied, "sequence"))
        assert called(copied) == ["group", "checkpoint", "sequence", "own"]
    assert called(layer) == ["group", "checkpoint", "own"] and layer.log is not copied.log
    shallow = copy.copy(layer)
    ForwardStack.of(shallow).push(ForwardSlot.SEQUENCE, Named(shallow, "sequence"))
    assert called(shallow) == ["sequence", "group", "checkpoint", "own"]
    assert called(layer) == ["group", "checkpoint", "own"]


def test_layers_of_one_class_share_a_graph():
    """Dynamo guards methods by their code; an object inside of the graph would be guarded by its identity."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    class Calls(ForwardWrapper):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    class Compiled(ForwardWrapper):
        def wrap(self, inner: Any) -> Any:
            return torch.compile(inner, backend=backend, fullgraph=True)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    torch._dynamo.reset()
    for _ in range(3):
        block = Block()
        ForwardStack.of(block).push(ForwardSlot.COMPILE, Compiled())
        ForwardStack.of(block).push(ForwardSlot.SEQUENCE, Calls())
        ForwardStack.of(block.inner).push(ForwardSlot.CHECKPOINT, Calls())
        block(torch.ones(1, 2))
    torch._dynamo.reset()
    assert len(graphs) == 1
