"""TRL's rollouts with vLLM on tp2 x fsdp2: stand-ins for server and colocated engine get the weights of one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.compare import assert_same_tensors
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import build
from peft import LoraConfig

from end_to_end.test_trl import ADAPTER, arguments, texts, tokenizer
from end_to_end.test_trl_groups import GROUP, rewards_by_position
from hf_automodel_parallel import AutoParallelismConfig

LENGTH = 4


class Engine:
    """What TRL needs of a vLLM server's client, and of a colocated ``LLM``.

    Attributes:
        received: for each synchronisation the weights by name.
        fails: the server is gone after this number of synchronisations.
    """

    def __init__(self, fails: int | None = None) -> None:
        self.received: list[dict[str, torch.Tensor]] = []
        self.fails = fails
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    # ---- the client of a server

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        """Announced in the first pass, then sent in the same order."""
        weights = {}
        for (name, dtype, shape), (sent, tensor) in zip(metadata, named_params, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            assert tensor.is_contiguous()
            weights[name] = tensor.clone()
            if self.fails == len(self.received):
                raise ConnectionError("the server is gone")
        self.received.append(weights)

    def generate(self, prompts: list[Any], sampling_params: Any = None, n: int = 1, **_: Any) -> Any:
        if sampling_params is not None:
            return self.outputs([prompt["prompt_token_ids"] for prompt in prompts])
        completions = [draw(len(prompts) * n, place) for place in range(len(prompts) * n)]
        return {
            "prompt_ids": prompts,
            "completion_ids": completions,
            "logprobs": [[[-1.0]] * LENGTH for _ in completions],
        }

    # ---- a colocated engine

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        if not self.received:
            self.received.append({})
        (name, tensor) = weights[0]
        if name in self.received[-1]:
            self.received.append({})
        self.received[-1][name] = tensor.clone()

    def outputs(self, prompts: list[list[int]]) -> list[Any]:
        """Each engine draws by its own rank."""
        drawn = [[(dist.get_rank() * 31 + row * 7 + i) % 100 + 4 for i in range(LENGTH)] for row in range(len(prompts))]
        probabilities = [{token: SimpleNamespace(rank=1, logprob=-1.0)} for token in range(LENGTH)]
        return [
            SimpleNamespace(
                prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=probabilities[:LENGTH])]
            )
            for prompt, ids in zip(prompts, drawn, strict=True)
        ]

    def reset_prefix_cache(self) -> None: ...


def draw(rows: int, place: int) -> list[int]:
    """A completion by its place in the batch over all ranks."""
    return [(place * 13 + i * 5) % 100 + 4 for i in range(LENGTH)]


def train(sizes: dict[str, int] | None, rows: int, folder: str, mode: str, lora: bool, fails: int | None = None) -> Any:
    """Log, and per synchronisation the weights of this rank's engine; of a rank without one None."""
    import trl.generation.vllm_generation as rollouts
    from trl import GRPOConfig, GRPOTrainer

    def connect(self: Any) -> None:
        if mode == "colocate":
            self.llm = engine
        elif self.accelerator.is_main_process:
            self.vllm_client = engine

    engine = Engine(fails)
    config = AutoParallelismConfig(**sizes) if sizes else None
    options = {"use_vllm": True, "vllm_mode": mode, "vllm_importance_sampling_correction": False}
    args = arguments(
        GRPOConfig,
        folder,
        config,
        per_device_train_batch_size=rows,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        steps_per_generation=1,
        model_init_kwargs={"dtype": "float32"},
        optim="sgd",
        shuffle_dataset=False,
        **options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts.VLLMGeneration, "_init_vllm", connect)
        patch.setattr(rollouts, "SamplingParams", dict, raising=False)
        trainer = GRPOTrainer(
            folder,
            args=args,
            reward_funcs=rewards_by_position((sizes or {}).get("tp_size", 1)),
            train_dataset=texts(("prompt",), 24),
            processing_class=tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER) if lora else None,
        )
        try:
            trainer.train()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e], engine.received


def alone(*args: Any) -> Any:
    assert dist.get_world_size() == 1
    return train(None, *args)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_server_gets_the_weights_of_one_process(lora, tmp_path):
    world, sizes, ranks = MESHES["tp2_fsdp2"]
    build("llama").save_pretrained(tmp_path)
    [(want, received)] = run_distributed(1, alone, 4, str(tmp_path), "server", lora, timeout=240)
    results = run_distributed(world, train, sizes, 4 // ranks, str(tmp_path), "server", lora, timeout=240)
    for log, _ in results:
        assert log == [pytest.approx(entry, rel=1e-4, abs=1e-6) for entry in want]
    sent = results[0][1]
    assert len(sent) == len(received) == 3
    for got, expected in zip(sent, received, strict=True):
        assert_same_tensors(got, expected)
    assert not torch.equal(sent[0]["model.layers.0.mlp.up_proj.weight"], sent[2]["model.layers.0.mlp.up_proj.weight"])


def test_colocated_engines_of_a_tp_group_train_on_one_completion_for_each_row(tmp_path):
    """Each engine samples on its own; ranks of a tp group with other completions would train on a mixture."""
    world, sizes, ranks = MESHES["tp2_fsdp2"]
    build("llama").save_pretrained(tmp_path)
    results = run_distributed(world, train, sizes, 4 // ranks, str(tmp_path), "colocate", True, timeout=240)
    logs = [log for log, _ in results]
    assert all(log == logs[0] for log in logs) and len(logs[0]) == 3
    for _, sent in results:
        assert len(sent) == 3
        assert_same_tensors(sent[-1], results[0][1][-1])


def test_a_server_that_fails_on_one_rank_ends_training_on_all(tmp_path):
    build("llama").save_pretrained(tmp_path)
    first, second = run_distributed(2, train, {"tp_size": 2}, 4, str(tmp_path), "server", False, 1, timeout=120)
    assert first == "ConnectionError: the server is gone"
    assert second.startswith("ExportError: stream_weights() stopped on rank 0: its loop ended at ")
