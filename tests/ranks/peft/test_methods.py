"""Every tuner that PEFT has: at parity with one process, or refused by name. None is trained wrong in silence."""

from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.models import build_model
from harness.pool import expect_error, run_distributed
from harness.training import batches_for, build, data_rank, trainable
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError
from ranks.accelerate.jobs import adapt, batch, call_prepare, prepare

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}

#: PEFT type -> (config class, options)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA": ("LoraConfig", {**TARGETS, "r": 4}),
    "ADALORA": ("AdaLoraConfig", {**TARGETS, "init_r": 4, "target_r": 2, "total_step": 10}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
    "BEFT": ("BeftConfig", {"target_modules": ["v_proj"]}),
    "BOFT": ("BOFTConfig", {**TARGETS, "boft_block_size": 4}),
    "C3A": ("C3AConfig", {**TARGETS, "block_size": 16}),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 4}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2]}),
    "DEFT": ("DeftConfig", {**TARGETS, "r": 4}),
    "DELORA": ("DeloraConfig", {**TARGETS, "r": 4}),
    "FOURIERFT": ("FourierFTConfig", {**TARGETS, "n_frequency": 20}),
    "FROD": ("FrodConfig", {**TARGETS, "progressbar": False}),
    "GLORA": ("GloraConfig", {**TARGETS, "r": 4}),
    "GRALORA": ("GraloraConfig", {**TARGETS, "r": 4}),
    "HIRA": ("HiraConfig", {**TARGETS, "r": 4}),
    "HRA": ("HRAConfig", {**TARGETS, "r": 4}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LILY": ("LilyConfig", {**TARGETS, "r": 4}),
    "LN_TUNING": ("LNTuningConfig", {}),
    "LOHA": ("LoHaConfig", {**TARGETS, "r": 4}),
    "LOKR": ("LoKrConfig", {**TARGETS, "r": 4}),
    "MISS": ("MissConfig", {**TARGETS, "r": 4}),
    "OFT": ("OFTConfig", {**TARGETS, "oft_block_size": 4}),
    "SHIRA": ("ShiraConfig", {**TARGETS, "r": 4}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 2}),
    "OSF": ("OSFConfig", TARGETS),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "PEANUT": ("PeanutConfig", {**TARGETS, "r": 4}),
    "POLY": ("PolyConfig", {**TARGETS, "r": 4, "n_tasks": 2, "n_skills": 2}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "PSOFT": ("PsoftConfig", {**TARGETS, "r": 4}),
    "PVERA": ("PveraConfig", {**TARGETS, "r": 4}),
    "RANDLORA": ("RandLoraConfig", {**TARGETS, "r": 4}),
    "ROAD": ("RoadConfig", {**TARGETS, "group_size": 16}),
    "SHADOW": ("ShadowConfig", {"target_modules": r".*\.layers\.\d+$", "shadow_dropout": 0.0}),
    "SUPERTUNING": ("SupertuningConfig", TARGETS),
    "TINYLORA": ("TinyLoraConfig", {**TARGETS, "u": 8}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": [1, 5, 7]}),
    "UNILORA": ("UniLoraConfig", {**TARGETS, "theta_d_length": 32}),
    "VBLORA": ("VBLoRAConfig", {**TARGETS, "num_vectors": 8, "vector_length": 16}),
    "VERA": ("VeraConfig", {**TARGETS, "r": 4}),
    "WAVEFT": ("WaveFTConfig", {**TARGETS, "n_frequency": 32}),
}


def adapted(method: str) -> torch.nn.Module:
    """A Llama with the method on it, its trainable parameters off their (often zero) initial values."""
    name, options = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = getattr(peft, name)(task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(build("llama"), config)
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def extra_inputs(method: str, rows: int) -> dict[str, torch.Tensor]:
    """Which task each row belongs to, for the methods that ask for it."""
    asks = method in ("POLY", "MULTITASK_PROMPT_TUNING")
    return {"task_ids": torch.arange(rows) % 2} if asks else {}


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], method: str) -> torch.Tensor:
    """The loss; methods that draw random numbers draw the same in every forward of this size."""
    torch.manual_seed(7)
    return model(**batch, **extra_inputs(method, len(batch["input_ids"]))).loss


def sweep(sizes: dict[str, int], dp_size: int, methods: list[str]) -> dict[str, Any]:
    """Method -> (loss, gradients), or the message with which it is refused."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    results: dict[str, Any] = {}
    for method in methods:
        model = adapted(method)
        batches = batches_for(model, dp_size)
        try:
            model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model)))
        except UnsupportedError as error:
            results[method] = str(error)
            continue
        loss = loss_of(model, batches[data_rank(accelerator)], method)
        accelerator.backward(loss)
        results[method] = (mean_over_ranks(loss), full_grads(model))
        accelerator.free_memory()
    return results


#: What each mesh refuses, besides what tensor parallelism does not know: word of the message.
REFUSED_EVERYWHERE = {
    "ADALORA": "penalty on the weights",
    "OSF": "have gradient hooks",
    "CPT": "have gradient hooks",
}
WITH_TENSOR_PARALLELISM = (
    "LORA",
    "IA3",
    "LN_TUNING",
    "TRAINABLE_TOKENS",
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
)


@pytest.mark.core_cases("tp2_fsdp2-0")
@pytest.mark.parametrize("mesh, part", [("fsdp2", 0), ("fsdp2", 1), ("fsdp2", 2), ("tp2", 0), ("tp2_fsdp2", 0)])
def test_parity_or_refusal_by_name(mesh, part):
    world, sizes, dp_size = MESHES[mesh]
    methods = list(METHODS)[part::3] if mesh == "fsdp2" else list(METHODS)
    if mesh == "tp2_fsdp2":
        methods = list(WITH_TENSOR_PARALLELISM)
    results = run_distributed(world, sweep, sizes, dp_size, methods)[0]
    problems = []
    for method, result in results.items():
        if method in REFUSED_EVERYWHERE or (mesh != "fsdp2" and method not in WITH_TENSOR_PARALLELISM):
            word = REFUSED_EVERYWHERE.get(
                method, f"is PEFT's {method}, which is not available under tensor parallelism"
            )
            if not isinstance(result, str) or word not in result:
                problems.append(f"{method} is not refused by name: {result}")
            continue
        if isinstance(result, str):
            problems.append(f"{method}: {result}")
            continue
        reference = adapted(method)
        losses = [loss_of(reference, batch, method) for batch in batches_for(reference, dp_size)]
        loss = torch.stack(losses).mean()
        loss.backward()
        try:
            assert_losses_equal(result[0], loss.item())
            assert_gradients_equal(result[1], {n: p.grad for n, p in reference.named_parameters()})
        except AssertionError as error:
            problems.append(f"{method}: {error}")
    assert not problems, "\n".join(problems)


PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")


def step_and_save(sizes: dict[str, int], dp_size: int, directory: str, classify: bool) -> dict[str, Any]:
    """One step with each prompt, and its files, saved with and without a gathered state dict. Method -> gradients."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    results: dict[str, Any] = {}
    for method in PROMPTS:
        if method == "PREFIX_TUNING" and sizes.get("tp_size"):
            continue
        model = prompted(method, classify)
        rows = prompted_batches(model, dp_size, classify)[data_rank(accelerator)]
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
        loss = loss_of(model, rows, method)
        accelerator.backward(loss)
        results[method] = full_grads(model)
        optimizer.step()
        model.save_pretrained(f"{directory}/{method}", max_shard_size="1GB")
        state = accelerator.get_state_dict(model)
        main = accelerator.is_main_process
        model.save_pretrained(f"{directory}/{method}-gathered", state_dict=state, is_main_process=main)
        accelerator.free_memory()
    dist.barrier()
    return results


def prompted(method: str, classify: bool) -> torch.nn.Module:
    name, options = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if not classify:
            return peft.get_peft_model(build("llama"), getattr(peft, name)(task_type="CAUSAL_LM", **options))
        model = LlamaForSequenceClassification(build("llama").config)
        model.config.pad_token_id = 0
        return peft.get_peft_model(model, getattr(peft, name)(task_type="SEQ_CLS", **options))


def prompted_batches(model: torch.nn.Module, parts: int, classify: bool) -> list[dict[str, torch.Tensor]]:
    batches = batches_for(model, parts)
    if classify:
        for batch in batches:
            batch["labels"] = batch["input_ids"][:, 0] % 2
    return batches


@pytest.mark.parametrize("mesh, classify", [("fsdp2", False), ("tp2", False), ("tp2_fsdp2", True)])
def test_prompts_train_and_are_saved_as_in_one_process(mesh, classify, tmp_path):
    """PEFT runs the prompt's encoder to save it, on one rank. A classifier has its head in ``modules_to_save``."""
    world, sizes, dp_size = MESHES[mesh]
    found = run_distributed(world, step_and_save, sizes, dp_size, str(tmp_path), classify)[0]
    assert len(found) >= 3
    for method, gradients in found.items():
        model = prompted(method, classify)
        for rows in prompted_batches(model, dp_size, classify):
            (loss_of(model, rows, method) / dp_size).backward()
        assert_gradients_equal(gradients, {name: p.grad for name, p in model.named_parameters()})
        torch.optim.SGD(trainable(model), lr=0.1).step()
        model.save_pretrained(tmp_path / "expected")
        want = load_file(tmp_path / "expected" / "adapter_model.safetensors")
        for folder in (method, f"{method}-gathered"):
            got = load_file(tmp_path / folder / "adapter_model.safetensors")
            assert got.keys() == want.keys(), (method, got.keys(), want.keys())
            for name in want:
                torch.testing.assert_close(got[name], want[name], msg=lambda text, key=(folder, name): f"{key}: {text}")


UNSUPPORTED = {
    "dora_embedding": (
        {"use_dora": True, "target_modules": ["embed_tokens"]},
        r"embed_tokens uses the LoRA variant DoraEmbedding.*tp_size=1",
    ),
    "oft": ("oft", r"is PEFT's OFT, which is not available under tensor parallelism.*tp_size=1"),
}


@pytest.mark.core_cases("tp2-oft")
@pytest.mark.parametrize("adapter", UNSUPPORTED)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_adapter_that_tensor_parallelism_does_not_know(mesh, adapter):
    """By name and with the way out; sharded as if it were LoRA it would be wrong in silence."""
    world, sizes, _ = MESHES[mesh]
    values, message = UNSUPPORTED[adapter]
    expect_error(world, call_prepare, sizes, adapter=values, match=message)


def one_step(sizes: dict, adapter: Any, dp_size: int) -> dict[str, Any]:
    """Gradients of a first step, and whether every trainable parameter changed in it."""
    accelerator, model, optimizer = prepare(sizes, adapter=adapter)
    rows = batch(rows=2 * dp_size)
    mine = dist.get_rank() % dp_size
    loss = model(**{key: value[2 * mine : 2 * mine + 2] for key, value in rows.items()}).loss
    accelerator.backward(loss)
    gradients = full_grads(model)
    before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    changed = {
        name: not torch.equal(before[name], p.full_tensor()) for name, p in model.named_parameters() if name in before
    }
    return {"gradients": gradients, "changed": changed}


@pytest.mark.core_cases("fsdp2-prompt", "tp2-dora")
@pytest.mark.parametrize(
    "mesh, adapter",
    [*(("fsdp2", name) for name in (*UNSUPPORTED, "dora", "prompt")), ("tp2", "dora"), ("tp2", "prompt")],
)
def test_adapter_that_works(mesh, adapter):
    """The message sends people to FSDP2 alone; there the same adapters have to be right."""
    world, sizes, _ = MESHES[mesh]
    values = UNSUPPORTED[adapter][0] if adapter in UNSUPPORTED else adapter
    dp_size = 2 if mesh == "fsdp2" else 1
    result = run_distributed(world, one_step, sizes, values, dp_size)[0]
    reference = adapt(build_model("llama"), values)
    rows = batch(rows=2 * dp_size)
    for part in range(dp_size):
        (reference(**{k: v[2 * part : 2 * part + 2] for k, v in rows.items()}).loss / dp_size).backward()
    assert_gradients_equal(result["gradients"], {name: p.grad for name, p in reference.named_parameters()})
    assert result["changed"] and all(result["changed"].values()), result["changed"]
