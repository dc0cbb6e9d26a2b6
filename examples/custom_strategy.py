"""A strategy of your own for a model family: two decoder layers share one FSDP2 unit.

Small layers are gathered faster in pairs: half as many collectives, each twice as large. The default strategy makes one
unit per layer; this one overrides that single step and inherits the rest (plan, tensor parallelism, checkpointing,
compile, checks). Registering it is all: `Accelerator.prepare`, the Trainer and the launcher ask the registry for the
model's class.

  # two CPU processes, FSDP2 over both
  OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/custom_strategy.py --tp 1

  # four: tensor parallel 2 x FSDP2 2, by the launcher
  OMP_NUM_THREADS=1 torchrun --nproc_per_node 4 -m hf_automodel_parallel.launch --auto_parallel tp=2 \\
      examples/custom_strategy.py

A package can register its strategies without being imported, by an entry point in its pyproject.toml:

  [project.entry-points."hf_automodel_parallel.strategies"]
  LlamaForCausalLM = "my_package.strategies:PairsOfLayers"
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import warnings

import torch
from accelerate import Accelerator
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_automodel_parallel import (
    AutoParallelismConfig,
    DefaultParallelizationStrategy,
    register_parallel_strategy,
)
from hf_automodel_parallel.fsdp.shard import unit_options

logger = logging.getLogger("custom_strategy")


@register_parallel_strategy(name="LlamaForCausalLM")
class PairsOfLayers(DefaultParallelizationStrategy):
    """One FSDP2 unit for two neighbouring layers; an odd last layer is a unit of its own."""

    def apply_data_parallel(self, context):
        structure = context.structure
        options = unit_options(context.dp_mesh, context.fsdp)
        fully_shard_fn = options.pop("fully_shard_fn")
        for first in range(0, len(structure.layers), 2):
            pair = structure.layers[first : first + 2]
            fully_shard_fn(pair, **options, reshard_after_forward=context.fsdp.reshard_after_forward)
        # What is left (embedding, final norm and head, root) is the default's business.
        context.structure = dataclasses.replace(structure, layers=[])
        super().apply_data_parallel(context)
        context.structure = structure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, help="ranks on the tp axis; without it the launcher's config counts")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    config = None if args.tp is None else AutoParallelismConfig(tp_size=args.tp)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with warnings.catch_warnings(), CommDebugMode() as collectives, torch.no_grad():
        warnings.simplefilter("ignore")  # CommDebugMode's hooks and transformers' output classes
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    logger.info("collectives of one forward: %s", {str(k): n for k, n in collectives.get_comm_counts().items() if n})

    data = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(1))
    for step in range(args.steps):
        loss = model(input_ids=data, labels=data).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logger.info("step %d: loss %.4f", step, loss.item())
    accelerator.end_training()


if __name__ == "__main__":
    main()
