"""PEFT's operations on the prepared model do what they do in one process: the same story is told to both and
compared.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, full_parameters
from harness.meshes import MESHES
from harness.models import build_model
from harness.pool import run_distributed
from harness.training import batches_for, data_rank
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_automodel_parallel import AutoParallelismConfig, PrepareError, UnsupportedError

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "ends": {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    "saved_head": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 7, 100]},
    "rows_packed": {"target_modules": ["c_attn"], "trainable_token_indices": [1, 7, 100], "fan_in_fan_out": True},
}


#: Parts of the names of what is trained.
ADAPTED = ("lora_", "modules_to_save", "trainable_tokens")


def two_adapters(model: str, adapter: str, **overrides: Any) -> nn.Module:
    """A model with the adapters "first" and "second", both random."""
    values = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **ADAPTERS[adapter]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = get_peft_model(build_model(model, **overrides), LoraConfig(**values), adapter_name="first")
        network.add_adapter("second", LoraConfig(**{**values, "r": 2}))
    return network


class Teller:
    """Trains and looks at a model, in one process or prepared; keeps what was seen."""

    def __init__(self, model: nn.Module, parts: int, accelerator: Accelerator | None) -> None:
        everything = [p for n, p in model.named_parameters() if any(part in n for part in ADAPTED)]
        optimizer: Any = torch.optim.SGD(everything, lr=1e-4)
        self.batches = batches_for(model, parts)
        if accelerator is not None:
            self.batches = [self.batches[data_rank(accelerator)]]
            model, optimizer = accelerator.prepare(model, optimizer)
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.seen: list[Any] = []

    def use_optimizer(self, parameters: list[nn.Parameter]) -> None:
        """Train these from here on."""
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4)
        if self.accelerator is not None:
            self.optimizer = self.accelerator.prepare(self.optimizer)

    def _mean(self, losses: list[torch.Tensor]) -> float:
        total = torch.stack([loss.detach() for loss in losses]).mean()
        if self.accelerator is not None:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total.item()

    def train(self) -> None:
        """One step of SGD; keeps loss, gradients and which parameters are trainable."""
        self.model.train()
        losses = [self.model(**batch, use_cache=False).loss for batch in self.batches]
        for loss in losses:
            backward = loss.backward if self.accelerator is None else lambda x=loss: self.accelerator.backward(x)
            if self.accelerator is None:
                (loss / len(losses)).backward()
            else:
                backward()
        flags = {n: torch.tensor(p.requires_grad) for n, p in self.model.named_parameters()}
        self.seen.append(("train", self._mean(losses), full_grads(self.model), flags))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def look(self, model: nn.Module | None = None) -> None:
        """Keeps the loss without training, and all parameters."""
        model = (model or self.model).eval()
        with torch.no_grad():
            losses = [model(**batch, use_cache=False).loss for batch in self.batches]
        self.seen.append(("look", self._mean(losses), full_parameters(model), {}))


def switching(teller: Teller) -> None:
    """Both adapters trained in turn, then together, with evaluations (which gather) before the switches."""
    model = teller.model
    teller.train()
    teller.look()
    model.set_adapter("second")
    teller.train()
    teller.train()
    model.set_adapter("first")
    teller.train()
    model.base_model.set_adapter(["first", "second"])
    teller.train()
    with model.disable_adapter():
        teller.look()
    teller.train()
    model.delete_adapter("first")
    model.set_adapter("second")
    teller.train()


def merging(teller: Teller) -> None:
    """Merge, unmerge (also through disable_adapter), train on, unload."""
    model = teller.model
    model.merge_adapter()
    teller.look()
    model.unmerge_adapter()
    teller.train()
    teller.look()
    model.merge_adapter(["second"], safe_merge=True)
    teller.look()
    with model.disable_adapter():
        teller.look()
    teller.train()
    teller.look(model.merge_and_unload())


def unloading(teller: Teller) -> None:
    """The base model comes back, also when nothing has run before."""
    teller.look(teller.model.unload())


def growing(teller: Teller) -> None:
    """An adapter added after training has begun, also to layers without one; trained alone, beside another, and
    merged.
    """
    model = teller.model
    teller.train()
    torch.manual_seed(5)
    targets = ["k_proj", "o_proj", "down_proj", "lm_head"]
    model.add_adapter("third", LoraConfig(r=3, init_lora_weights=False, target_modules=targets))
    teller.train()
    model.set_adapter("third")
    teller.use_optimizer([p for n, p in model.named_parameters() if "third" in n])
    teller.train()
    teller.look()
    teller.train()
    model.base_model.set_adapter(["first", "third"])
    teller.train()
    with model.disable_adapter():
        teller.look()
    model.merge_adapter()
    teller.look()
    model.unmerge_adapter()
    teller.train()
    teller.look(model.merge_and_unload())


def tell(story: Callable, model: str, adapter: str, sizes: dict[str, int], overrides: dict[str, Any]) -> list[Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    network = two_adapters(model, adapter, **overrides)
    dp_size = accelerator.parallelism_config.data_parallel_size
    teller = Teller(network, dp_size, accelerator)
    story(teller)
    return teller.seen


def compare(story: Callable, model: str, mesh: str, adapter: str, **overrides: Any) -> None:
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(world, tell, story, model, adapter, sizes, overrides)[0]
    teller = Teller(two_adapters(model, adapter, **overrides), dp_size, None)
    story(teller)
    assert_same_story(got, teller.seen)


def assert_same_story(got, want) -> None:
    assert [entry[0] for entry in got] == [entry[0] for entry in want]
    for step, (g, w) in enumerate(zip(got, want, strict=True)):
        try:
            assert_losses_equal(g[1], w[1], rtol=1e-6)
            assert_gradients_equal(g[2], w[2])
            assert g[3] == w[3]
        except AssertionError as error:
            raise AssertionError(f"at step {step} ({g[0]}): {error}") from None


STORIES = [switching, merging, unloading, growing]


@pytest.mark.core_cases("switching-tp2", "merging-fsdp2", "growing-tp2_fsdp2")
@pytest.mark.parametrize("mesh", ["tp2", "fsdp2", "tp2_fsdp2"])
@pytest.mark.parametrize("story", STORIES, ids=lambda s: s.__name__)
def test_llama(story, mesh):
    compare(story, "llama", mesh, "lora", mlp_bias=True)


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
@pytest.mark.parametrize("story", [switching, merging, growing], ids=lambda s: s.__name__)
def test_adapters_replicated_over_data_parallel_ranks(story, mesh):
    """Whose frozen second adapter, and one that is added later, are replicated as well."""
    world, sizes, dp_size = MESHES[mesh]
    got = run_distributed(world, tell, story, "llama", "lora", {**sizes, "adapters_over_dp": "replicated"}, {})[0]
    teller = Teller(two_adapters("llama", "lora"), dp_size, None)
    story(teller)
    assert_same_story(got, teller.seen)


@pytest.mark.core_cases("merging-mixtral-lora")
@pytest.mark.parametrize(
    "model, adapter",
    [("phi3", "dora"), ("mixtral", "lora"), ("llama", "ends"), ("llama_odd_vocab", "ends"), ("llama", "saved_head")],
)
@pytest.mark.parametrize("story", [merging, unloading], ids=lambda s: s.__name__)
def test_other_layers(story, model, adapter):
    compare(story, model, "tp2_fsdp2", adapter)


@pytest.mark.parametrize("model, adapter", [("llama_tied", "rows"), ("gpt2", "rows_packed")])
@pytest.mark.parametrize("story", [merging, unloading], ids=lambda s: s.__name__)
def test_trained_rows(story, model, adapter):
    """The layer that reads the table lies within a wrapper, and both go."""
    compare(story, model, "tp2", adapter)


@pytest.mark.core_cases("{}")
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "submodule"}, {"compile": "aot_eager"}], ids=str)
def test_new_adapter_on_layers_without_one(options):
    """Boundaries, random numbers and regions move to PEFT's new layers."""
    world, sizes, dp_size = MESHES["tp2" if "compile" in options else "tp2_fsdp2"]
    got = run_distributed(world, tell, growing, "llama", "ends", {**sizes, **options}, {}, timeout=200)[0]
    teller = Teller(two_adapters("llama", "ends"), dp_size, None)
    growing(teller)
    assert_same_story(got, teller.seen)


# ---- what is refused, on every mesh ----------------------------------------------------------------------------------


def structural_errors(sizes: dict[str, int]) -> dict[str, str]:
    """Operation -> message, and whether the model still trains afterwards."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    teller = Teller(two_adapters("llama", "lora"), accelerator.parallelism_config.data_parallel_size, accelerator)
    model, new = teller.model, LoraConfig(target_modules=["q_proj"])
    calls = {
        "add_adapter": lambda: model.add_adapter("third", LoraConfig(target_modules=["q_proj"], use_dora=True)),
        "add_adapter to the model inside": lambda: model.get_base_model().add_adapter(new),
        "add_weighted_adapter": lambda: model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "third"),
        "inject_adapter": lambda: model.base_model.inject_adapter(model.base_model.model, "third"),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except UnsupportedError as error:
            messages[name] = str(error)
    teller.train()
    plain = model.merge_and_unload().train()
    try:
        plain(**teller.batches[0])
    except PrepareError as error:
        messages["train unloaded"] = str(error)
    return messages


def views() -> dict[str, nn.Module]:
    """Models in which two trainable parameters are views of one memory, and one in which they lie side by side."""
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    plain, apart = build_model("llama"), build_model("llama")
    first, second = (layer.mlp.up_proj for layer in plain.model.layers)
    second.weight = nn.Parameter(first.weight.detach())
    for layer, half in zip(apart.model.layers, torch.randn(128, 128).chunk(2), strict=True):
        layer.mlp.down_proj.weight = nn.Parameter(half)
    return {"adapters": get_peft_model(build_model("llama_tied"), config), "weights": plain, "slices": apart}


def prepare_views(sizes: dict[str, int]) -> dict[str, str]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    messages = {}
    for name, model in views().items():
        try:
            accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
            messages[name] = "prepared"
        except UnsupportedError as error:
            messages[name] = str(error)
    model = get_peft_model(build_model("llama_tied"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model, _ = accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    try:
        model.add_adapter(
            "new", LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")
        )
        messages["added"] = "added"
    except UnsupportedError as error:
        messages["added"] = str(error)
    return messages


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_views_of_the_same_memory_are_refused(mesh):
    """Their shards would come apart at the first step; slices of one buffer do not touch each other."""
    world, sizes, _ = MESHES[mesh]
    for messages in run_distributed(world, prepare_views, sizes):
        assert messages.pop("slices") == "prepared"
        assert messages["adapters"].startswith("ensure_weight_tying=True of the adapter 'default': "), messages
        assert messages["added"].startswith("ensure_weight_tying=True of the adapter 'new': "), messages
        assert "Use ensure_weight_tying=False" in messages["adapters"]
        assert (
            "layers.0.mlp.up_proj.weight" in messages["weights"]
            and "layers.1.mlp.up_proj.weight" in messages["weights"]
        )
        assert all("views of the same memory" in message for message in messages.values())


def wrap_after_prepare(sizes: dict[str, int]) -> str:
    """Wrapping a prepared model works in PEFT; then nobody would sum the gradients of the new parameters."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build_model("llama")
    batch = batches_for(model, 1)[0]
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        model.load_adapter("somewhere")
    except UnsupportedError as error:
        message = str(error)
    try:
        inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), model)
        model.train()(**batch)
    except PrepareError as error:
        return message + str(error)
    return "trained"


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_wrapping_after_prepare_is_refused(mesh):
    world, sizes, _ = MESHES[mesh]
    for message in run_distributed(world, wrap_after_prepare, sizes):
        assert message.startswith("load_adapter() on a model that is sharded already"), message
        assert "trainable parameters have been added since accelerator.prepare" in message, message


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_new_parameters_after_prepare_are_refused(mesh):
    world, sizes, _ = MESHES[mesh]
    for messages in run_distributed(world, structural_errors, sizes):
        assert messages.pop("train unloaded").startswith("this model has been unloaded from its adapters")
        assert "use_dora=True is not possible" in messages.pop("add_adapter")
        assert len(messages) == 3
        for name, message in messages.items():
            assert message.startswith(f"{name.split()[0]}() on a model that is sharded already") and "before" in message


def one_sided_additions(directory: str) -> dict[str, str]:
    """Adapters that cannot be added alike on all ranks; each attempt leaves the model as it was."""
    from peft import TaskType
    from transformers import AutoModelForSequenceClassification

    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(dp_shard_size=2))
    teller = Teller(two_adapters("llama", "lora"), 2, accelerator)
    model, rank = teller.model, dist.get_rank()
    head = get_peft_model(
        AutoModelForSequenceClassification.from_config(build_model("llama").config),
        LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"]),
    )
    head, _ = accelerator.prepare(head, torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.1))

    def plain(**values: Any) -> LoraConfig:
        return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **values})

    calls = {
        "other rank": lambda: model.add_adapter("third", plain(r=2 + rank)),
        "one fails": lambda: model.add_adapter("third", plain(target_modules=["q_proj" if rank else "nothing"])),
        "no files": lambda: model.load_adapter(f"{directory}/{'second' if rank else 'nowhere'}", "third"),
        "no values": lambda: model.add_adapter("third", plain(), low_cpu_mem_usage=True),
        "head": lambda: head.add_adapter("third", plain(task_type=TaskType.SEQ_CLS)),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
        for owner in (model, head):
            assert "third" not in owner.peft_config and not any("third" in n for n, _ in owner.named_parameters()), name
    teller.train()
    return messages


def test_additions_that_fail_on_one_rank_fail_on_all(tmp_path):
    two_adapters("llama", "lora").save_pretrained(tmp_path, selected_adapters=["second"])
    for messages in run_distributed(2, one_sided_additions, str(tmp_path), timeout=60):
        assert "not the same on all ranks" in messages["other rank"]
        assert "nothing" in messages["one fails"] and "nowhere" in messages["no files"]
        assert "low_cpu_mem_usage=True is not possible" in messages["no values"]
        assert "copy of a layer of the model" in messages["head"]


def save_and_reload(sizes: dict[str, int], directory: str, name: str) -> list[Any]:
    """An adapter read from a file into an existing or a new one, then the merged model saved."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    teller = Teller(two_adapters("llama", "lora"), accelerator.parallelism_config.data_parallel_size, accelerator)
    teller.look()
    result = teller.model.load_adapter(f"{directory}/second", name, is_trainable=True)
    assert not result.unexpected_keys, result
    teller.model.set_adapter(name)
    teller.use_optimizer([p for n, p in teller.model.named_parameters() if name in n])
    teller.train()
    plain = teller.model.merge_and_unload()
    state = accelerator.get_state_dict(plain)
    plain.save_pretrained(f"{directory}/merged", state_dict=state, is_main_process=accelerator.is_main_process)
    return teller.seen


@pytest.mark.parametrize("name", ["second", "third"])
@pytest.mark.parametrize("mesh", ["tp2_fsdp2", "fsdp2"])
def test_load_adapter_and_save_merged(mesh, name, tmp_path):
    world, sizes, dp_size = MESHES[mesh]
    other = two_adapters("llama", "lora")
    with torch.no_grad():
        for path, parameter in other.named_parameters():
            if "second" in path:
                parameter.mul_(0.5)
    other.save_pretrained(tmp_path, selected_adapters=["second"])
    got = run_distributed(world, save_and_reload, sizes, str(tmp_path), name)[0]

    teller = Teller(two_adapters("llama", "lora"), dp_size, None)
    teller.look()
    teller.model.load_adapter(tmp_path / "second", name, is_trainable=True)
    teller.model.set_adapter(name)
    teller.use_optimizer([p for n, p in teller.model.named_parameters() if name in n])
    teller.train()
    for g, w in zip(got, teller.seen, strict=True):
        assert_losses_equal(g[1], w[1])
        assert_gradients_equal(g[2], w[2])
    want = teller.model.merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_gradients_equal(dict(merged.named_parameters()), dict(want.named_parameters()))
