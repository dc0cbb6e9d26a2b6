"""The registry of strategies: who is found for which model, and that prepare, Trainer and launcher go through it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.meshes import MESHES
from harness.models import build_model, lora
from harness.oracle import loss_and_grads
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_automodel_parallel import (
    AutoParallelismConfig,
    ConfigError,
    DefaultParallelizationStrategy,
    ParallelizationStrategy,
    PrepareError,
    RegistrationError,
    UnsupportedError,
    get_parallelization_strategy,
    register_parallel_strategy,
)
from hf_automodel_parallel.strategies.registry import (
    DEFAULT_STRATEGY,
    ENTRY_POINTS,
    PARALLELIZATION_STRATEGIES,
    StrategyRegistry,
    _targets,
)

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "tests" / "packages" / "other_strategies"


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
    with pytest.raises(AssertionError, match="no subclass of ParallelizationStrategy"):
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


def test_families_of_this_package_are_loaded_when_they_are_needed():
    code = (
        "import sys; from hf_automodel_parallel.strategies.registry import PARALLELIZATION_STRATEGIES as r, BUILT_IN;"
        "early = [m for m in sys.modules if any(m == t.partition(':')[0] for t in BUILT_IN.values())];"
        "print(early, sorted(type(r[name]).__name__ for name in BUILT_IN) and 'loaded')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("[] "), result.stdout + result.stderr


# ---- prepare goes through it ---------------------------------------------------------------------------------------


def one_step(sizes: dict[str, int], dp_size: int, strategy: type, adapter: Any = None, **fields: Any) -> Any:
    register_parallel_strategy(name="LlamaForCausalLM")(strategy)
    try:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **fields))
        model = build("llama", adapter)
        batch = batches_for(model, dp_size)[data_rank(accelerator)]
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        gradients = full_grads(model)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        return total.item() / dist.get_world_size(), gradients, units, list(Bare.calls)
    finally:
        Bare.calls.clear()
        forget()


def test_a_strategy_with_a_flow_of_its_own():
    loss, gradients, units, calls = run_distributed(2, one_step, {"dp_shard_size": 2}, 2, Bare)[0]
    want_loss, want = loss_and_grads(build("llama"), batches_for(build("llama"), 2))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    assert units == ["", "model.layers.0", "model.layers.1"]  # by default the ends are units, too
    (call,) = calls
    assert call["sequence_parallel"] is False and call["tp_mesh_name"] == "tp" and call["offload_policy"] is None


class Composed(ParallelizationStrategy):
    """Calls the default flow from its own, as code written for the reference API does."""

    def parallelize(self, model: nn.Module, device_mesh: Any, **kwargs: Any) -> nn.Module:
        return DefaultParallelizationStrategy().parallelize(model, device_mesh, **kwargs)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_strategy_composed_of_the_default(adapter):
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    fields = {"activation_checkpointing": "submodule"}
    loss, gradients, *_ = run_distributed(world, one_step, sizes, dp_size, Composed, adapter, **fields)[0]
    reference = build("llama", adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


class Forgetful(ParallelizationStrategy):
    """Does nothing."""

    def parallelize(self, model: nn.Module, device_mesh: Any, mp_policy: Any = None) -> nn.Module:
        return model


def test_a_strategy_that_shards_nothing_is_refused():
    expect_error(
        2,
        one_step,
        {"dp_shard_size": 2},
        2,
        Forgetful,
        match="Forgetful.parallelize returned a LlamaForCausalLM that FSDP2",
    )


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
    from hf_automodel_parallel.strategies.context import ParallelizeContext

    values = {("checkpointing" if key == "activation_checkpointing" else key): v for key, v in fields.items()}
    context = ParallelizeContext(build_model("llama"), mesh=None, device=torch.device("cpu"), **values)
    with pytest.raises(UnsupportedError, match=match):
        strategy().plan(context)


# ---- packages ------------------------------------------------------------------------------------------------------


class EntryPointForCausalLM(LlamaForCausalLM):
    """The strategy of an installed package is registered for this name."""


class BrokenForCausalLM(LlamaForCausalLM):
    """The strategy of an installed package for this name cannot be imported."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """A directory with the other package installed as pip does it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["cp", "-r", f"{PACKAGE}/.", str(source)], check=True)
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return str(target)


def with_package(site: str, class_name: str, register: bool = False) -> Any:
    """Two Trainer steps of a model whose strategy lies in the installed package."""
    from transformers import Trainer, TrainingArguments

    sys.path.insert(0, site)
    _targets.cache_clear()
    try:
        if register:
            from other_strategies.found import EntryPointStrategy

            register_parallel_strategy(name=class_name)(EntryPointStrategy)
        config = LlamaConfig(**build_model("llama").config.to_diff_dict())
        cls = {c.__name__: c for c in (EntryPointForCausalLM, BrokenForCausalLM, LlamaForCausalLM)}[class_name]
        model = cls(config)
        rows = [{k: v[0] for k, v in batches_for(model, 4)[0].items()} for _ in range(4)]
        arguments = TrainingArguments(
            output_dir=os.devnull + "-unused",
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            parallelism_config=AutoParallelismConfig(tp_size=2),
        )
        Trainer(model, arguments, train_dataset=rows).train()
        import other_strategies.found

        return other_strategies.found.used
    finally:
        sys.path.remove(site)
        for name in [name for name in sys.modules if name.startswith("other_strategies")]:
            del sys.modules[name]
        _targets.cache_clear()
        PARALLELIZATION_STRATEGIES._loaded.clear()
        forget()


def test_an_installed_package_is_found_by_entry_point_and_used_by_the_trainer(installed):
    assert run_distributed(2, with_package, installed, "EntryPointForCausalLM") == [["EntryPointForCausalLM"]] * 2


def test_a_package_registers_by_class_name_and_is_used_by_the_trainer(installed):
    assert run_distributed(2, with_package, installed, "LlamaForCausalLM", True) == [["LlamaForCausalLM"]] * 2


def test_an_entry_point_that_cannot_be_imported_is_named(installed):
    expect_error(
        2,
        with_package,
        installed,
        "BrokenForCausalLM",
        match="'other_strategies.broken:Strategy'.*no such accelerator",
    )


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


def test_the_example_behind_the_launcher():
    """The third door: the script registers, the launcher brings the config; four layers are gathered in pairs."""
    script = str(ROOT / "examples" / "custom_strategy.py")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher = ["--rdzv_endpoint", "127.0.0.1:0", "-m", "hf_automodel_parallel.launch", "--auto_parallel", "dp_shard=2"]
    result = subprocess.run(
        [sys.executable, *torchrun, *launcher, script, "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    # two pairs, the embedding, norm and head, and nothing for the root
    assert "collectives of one forward: {'c10d._allgather_base_': 4}" in output, output


def test_unused_errors_stay_apart():
    assert issubclass(RegistrationError, AssertionError) and not issubclass(PrepareError, AssertionError)


def test_strategy_of_what_is_no_model():
    with pytest.raises(PrepareError, match="model=None.*Give the model itself"):
        get_parallelization_strategy(None)
