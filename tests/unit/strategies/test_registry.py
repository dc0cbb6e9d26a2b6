"""The registry of strategies: who is found for which model, and that prepare, Trainer and launcher go through it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.models import build_model, lora
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_automodel_parallel import (
    ConfigError,
    DefaultParallelizationStrategy,
    ParallelizationStrategy,
    PrepareError,
    RegistrationError,
    UnsupportedError,
    get_parallelization_strategy,
    register_parallel_strategy,
)
from hf_automodel_parallel.strategies import registry as registry_module
from hf_automodel_parallel.strategies.registry import (
    DEFAULT_STRATEGY,
    ENTRY_POINTS,
    PARALLELIZATION_STRATEGIES,
    StrategyRegistry,
    _targets,
)


class Base(nn.Linear):
    """Stands for a model class."""

    def __init__(self) -> None:
        super().__init__(4, 4)


class Derived(Base):
    pass


class Wrapper(nn.Module):
    """What data parallelism and torch.compile put around a model, by the name of their only child."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


class Bare(ParallelizationStrategy):
    """A flow of its own: every layer and the root under FSDP2, nothing else."""

    calls: list[dict[str, Any]] = []

    def parallelize(self, model: nn.Module, device_mesh: Any, mp_policy: Any = None, **kwargs: Any) -> nn.Module:
        self.calls.append(kwargs)
        for layer in model.get_submodule("model.layers"):
            fully_shard(layer, mesh=device_mesh["dp_shard"], mp_policy=mp_policy)
        return fully_shard(model, mesh=device_mesh["dp_shard"], mp_policy=mp_policy)


@pytest.fixture
def clean():
    """Forget what a test registers."""
    yield
    forget()


def forget() -> None:
    for name in list(PARALLELIZATION_STRATEGIES._registered):
        del PARALLELIZATION_STRATEGIES[name]
    PARALLELIZATION_STRATEGIES._removed.clear()


# ---- who is found --------------------------------------------------------------------------------------------------


def test_exact_class_then_bases_then_default(clean):
    assert get_parallelization_strategy(Derived()) is DEFAULT_STRATEGY
    register_parallel_strategy(name="Base")(Bare)
    assert get_parallelization_strategy(Derived()) is PARALLELIZATION_STRATEGIES["Base"]

    @register_parallel_strategy(name="Derived")
    class Closer(DefaultParallelizationStrategy):
        pass

    assert type(get_parallelization_strategy(Derived())) is Closer
    assert type(get_parallelization_strategy(Base())) is Bare
    assert get_parallelization_strategy(nn.Linear(2, 2)) is DEFAULT_STRATEGY


def test_a_name_with_its_module_tells_two_classes_apart(clean):
    """The reference gives two unrelated classes of one name the same strategy."""

    class Other(DefaultParallelizationStrategy):
        pass

    namesake = type("Base", (nn.Linear,), {"__module__": "elsewhere"})(2, 2)
    register_parallel_strategy(name="Base")(Bare)
    register_parallel_strategy(name="elsewhere.Base")(Other)
    assert type(get_parallelization_strategy(namesake)) is Other
    assert type(get_parallelization_strategy(Base())) is Bare


@pytest.mark.parametrize("wrap", ["_orig_mod", "module"])
def test_wrappers_are_looked_through(wrap, clean):
    register_parallel_strategy(name="LlamaForCausalLM")(Bare)
    model = build_model("llama")
    assert type(get_parallelization_strategy(Wrapper(wrap, lora(model)))) is Bare
    other = Wrapper(wrap, model)
    other.add_module("head", nn.Linear(2, 2))  # a model that has a part of this name
    assert get_parallelization_strategy(other) is DEFAULT_STRATEGY


# ---- registering ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "register",
    [
        lambda: register_parallel_strategy(Bare),
        lambda: register_parallel_strategy(),
        lambda: register_parallel_strategy(name=""),
    ],
    ids=["bare", "empty", "empty name"],
)
def test_a_name_is_required(register):
    with pytest.raises(ValueError, match="name is required"):
        register()


@pytest.mark.parametrize("thing", [nn.Linear, Bare(), "Bare"], ids=["other class", "instance", "text"])
def test_only_strategy_classes_are_registered(thing, clean):
    with pytest.raises(AssertionError, match="not a subclass of ParallelizationStrategy"):
        register_parallel_strategy(name="Base")(thing)
    assert "Base" not in PARALLELIZATION_STRATEGIES


def test_a_name_is_registered_once(clean):
    assert register_parallel_strategy(name="Base")(Bare) is Bare
    with pytest.raises(RegistrationError, match=r"registered already.*del PARALLELIZATION_STRATEGIES\['Base'\]"):
        register_parallel_strategy(name="Base")(Bare)
    del PARALLELIZATION_STRATEGIES["Base"]
    register_parallel_strategy(name="Base")(Bare)


def test_the_registry_behaves_like_a_dict(monkeypatch):
    registry = StrategyRegistry()
    strategy = Bare()
    monkeypatch.setitem(registry, "Base", strategy)
    assert registry["Base"] is strategy and "Base" in registry and registry.get("nothing") is None
    assert "Base" in list(registry) and len(registry) == len(list(registry))
    monkeypatch.undo()
    assert "Base" not in registry
    with pytest.raises(KeyError):
        registry["Base"]
    with pytest.raises(RegistrationError, match="'Base'.*instance of a subclass"):
        registry["Base"] = Bare


def test_copies_and_unions_are_registries_of_their_own(monkeypatch):
    """As those of a dict, and without an import of a strategy."""
    monkeypatch.setattr(registry_module, "_load", lambda name, target: pytest.fail(f"{target} was imported"))
    first, second = Bare(), Bare()
    registry = StrategyRegistry()
    names = list(registry)
    registry["Base"] = first
    copied = registry.copy()
    copied["Base"] = second
    del copied[names[0]]
    assert registry["Base"] is first and names[0] in registry and names[0] not in copied
    assert (registry | {"Base": second})["Base"] is second and ({"Base": second} | registry)["Base"] is first
    assert ({"Other": second} | registry)["Other"] is second and registry["Base"] is first
    copied.update(registry, Other=second)
    assert copied["Base"] is first and copied["Other"] is second and set(copied) == {*registry, "Other"}
    copied |= {"Base": second}
    assert copied["Base"] is second
    copied[names[0]] = first
    copied.update(StrategyRegistry())
    assert names[0] not in copied._registered, "the value of the other registry counts"
    copied.clear()
    assert not copied and len(copied) == 0
    assert list(reversed(registry)) == list(registry)[::-1]
    for wrong in (lambda: registry | 3, lambda: 3 | registry):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(RegistrationError):
        registry.update({"Base": Bare})


# ---- prepare goes through it ---------------------------------------------------------------------------------------


class Forgetful(ParallelizationStrategy):
    """Does nothing."""

    def parallelize(self, model: nn.Module, device_mesh: Any, mp_policy: Any = None) -> nn.Module:
        return model


@pytest.mark.parametrize(
    "strategy, fields, match",
    [
        (Forgetful, {"sequence_parallel": True}, "sequence_parallel=True cannot be honoured: Forgetful.parallelize"),
        (Forgetful, {"tp_plan": {"a": "colwise"}}, "tp_shard_plan=.* cannot be honoured: Forgetful.parallelize"),
        (Forgetful, {"activation_checkpointing": "full"}, "activation_checkpointing=True cannot be honoured"),
        (Bare, {"loss_parallel": True}, "loss_parallel cannot be honoured for LlamaForCausalLM.*Bare"),
    ],
)
def test_what_a_strategy_does_not_take_is_refused(strategy, fields, match):
    from hf_automodel_parallel.core.options import ParallelOptions
    from hf_automodel_parallel.strategies.context import ParallelizeContext

    options = ParallelOptions(**fields)
    context = ParallelizeContext(
        build_model("llama"),
        None,
        torch.device("cpu"),
        options,
        checkpointing=options.activation_checkpointing or "none",
    )
    with pytest.raises(UnsupportedError, match=match):
        strategy().plan(context)


# ---- packages ------------------------------------------------------------------------------------------------------


def test_two_packages_for_one_class(monkeypatch):
    from importlib.metadata import EntryPoint

    points = [EntryPoint("Base", f"{name}:S", ENTRY_POINTS) for name in ("one", "two")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    _targets.cache_clear()
    try:
        with pytest.raises(ConfigError, match="'Base': one:S and two:S.*Uninstall one"):
            get_parallelization_strategy(Base())
    finally:
        monkeypatch.undo()
        _targets.cache_clear()


def test_unused_errors_stay_apart():
    assert issubclass(RegistrationError, AssertionError) and not issubclass(PrepareError, AssertionError)


def test_strategy_of_what_is_no_model():
    with pytest.raises(PrepareError, match="model=None.*Give the model itself"):
        get_parallelization_strategy(None)


# ---- mistakes in a strategy ---------------------------------------------------------------------------------------


def test_misspelt_step_is_refused():
    """Nobody would call it, and the model would be parallelised by the default steps."""

    class Misspelt(DefaultParallelizationStrategy):
        def apply_data_paralel(self, context: Any) -> None: ...

    class Helped(DefaultParallelizationStrategy):
        def units_of(self, context: Any) -> None: ...

        def _apply_data_paralel(self, context: Any) -> None: ...

    with pytest.raises(
        RegistrationError, match=r"Misspelt\.apply_data_paralel is not a step.*mean 'apply_data_parallel'"
    ):
        register_parallel_strategy(name="NeverUsed")(Misspelt)
    assert "NeverUsed" not in PARALLELIZATION_STRATEGIES
    register_parallel_strategy(name="NeverUsed")(Helped)
    del PARALLELIZATION_STRATEGIES["NeverUsed"]


def test_misspelt_class_is_reported(caplog):
    class ModelWithALongName(Base):
        pass

    @register_parallel_strategy(name="ModelWithAlongName")
    class Strategy(DefaultParallelizationStrategy): ...

    try:
        assert get_parallelization_strategy(ModelWithALongName()) is DEFAULT_STRATEGY
        assert "no strategy is registered for ModelWithALongName" in caplog.text
        assert "registered for 'ModelWithAlongName'" in caplog.text
        caplog.clear()
        get_parallelization_strategy(Base())
        assert not caplog.text
    finally:
        del PARALLELIZATION_STRATEGIES["ModelWithAlongName"]


class WithoutSuper(DefaultParallelizationStrategy):
    """Overrides a step without super()."""

    def plan(self, context: Any) -> None: ...

    def apply_data_parallel(self, context: Any) -> None: ...


def test_forgotten_super_is_named():
    """One sentence of ours instead of an AttributeError in a later step."""
    context = SimpleNamespace(structure=None, spec=None, tp_mesh=object(), tensor_parallel=None, model=nn.Linear(2, 2))
    strategy = WithoutSuper()
    with pytest.raises(
        PrepareError, match=r"WithoutSuper\.plan has not set context\.structure.*super\(\)\.plan\(context\)"
    ):
        strategy.check_planned(context)
    context.structure = object()
    with pytest.raises(PrepareError, match=r"context\.spec.*super\(\)\.select_tensor_parallel\(context\)"):
        strategy.check_planned(context)
    with pytest.raises(
        PrepareError, match="WithoutSuper has not sharded the model: apply_tensor_parallel had no effect"
    ):
        strategy.check_carried_out(context)
    context.tp_mesh = None
    strategy.check_planned(context)
    with pytest.raises(PrepareError, match="apply_data_parallel had no effect"):
        strategy.check_carried_out(context)
