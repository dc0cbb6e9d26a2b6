"""``hf-automodel-parallel plan``: the tensor-parallel plan of a model as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import AutoParallelError, ConfigError

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel plan path/to/model --tp 2\n\n"
    "  hf-automodel-parallel plan config.json --tp 4 --lora all-linear --tp-plan my_package.plans:mine"
)


def plan(
    model: Annotated[Path, typer.Argument(help="A model directory or its config.json (weights are not read).")],
    tp: Annotated[int, typer.Option(help="Number of ranks on the tp axis.", min=1)] = 2,
    tp_plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A named plan or the import path of a plan, instead of the model's own."),
    ] = None,
    plan_order: Annotated[str, typer.Option(help="Sources to try, in order.")] = "hf+registry+default+derived",
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Derive where sequences are split, gathered and scattered.")
    ] = False,
    lora: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Wrap with LoRA first: 'all-linear' or comma-separated modules."),
    ] = None,
) -> None:
    """Show the tensor-parallel plan of a model as a table: which module, which style, which shard, from which
    source.
    """
    from rich.console import Console

    from ..config import AutoParallelismConfig
    from ..core.model_structure import find_layers
    from ..core.model_view import ModelView
    from ..plan.analysis.sequence_parallel import derive
    from ..plan.describe import plan_table
    from ..plan.loss_parallel import keep_logits_sharded
    from ..plan.resolve import resolve
    from ..plan.select import select_plan
    from ..plan.validate import validate
    from ..plan_search.proof import proven_plan
    from ..plan_search.search import derived_plan
    from ..strategies.default import DefaultParallelizationStrategy
    from ..strategies.registry import get_parallelization_strategy

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or pipe has no width; rich would assume 80 columns
    try:
        if sequence_parallel and tp == 1:
            raise ConfigError(
                "--sequence-parallel with --tp 1: sequences are split over the tp ranks; give --tp 2 or more."
            )
        config = AutoParallelismConfig(tp_plan=tp_plan, plan_order=plan_order)  # type: ignore[arg-type]
        network = _empty_model(model, lora)
        strategy = get_parallelization_strategy(network)
        order = config.plan_order
        if isinstance(strategy, DefaultParallelizationStrategy):
            order = strategy.sources(order)
        chosen = select_plan(network, config.tp_plan, order, tp, derived_plan, proven_plan)
        spec = resolve(network, chosen, tp)
        validate(network, spec, tp)
        keep_logits_sharded(network, spec)
        if sequence_parallel:
            derive(network, spec, find_layers(ModelView.of(network).inner))
    except (AutoParallelError, OSError, ValueError) as error:
        typer.secho(f"hf-automodel-parallel: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    total = sum(p.numel() for p in network.parameters())
    name = type(network.get_base_model() if hasattr(network, "get_base_model") else network).__name__
    shards = sum(
        p.numel() // tp
        for n, p in network.named_parameters()
        if n in spec.parameters and spec.parameters[n].dim is not None
    )
    replicated = sum(
        p.numel() for n, p in network.named_parameters() if n not in spec.parameters or spec.parameters[n].dim is None
    )
    console.print(plan_table(chosen, spec, f"{name} at tp={tp}: plan from {chosen.origin}"))
    console.print(
        f"{total:,} parameters; per tp rank {shards + replicated:,}: {shards:,} sharded, {replicated:,} replicated."
    )
    for note in spec.notes:
        console.print(f"note: {note}", highlight=False)
    for entry in spec.unmatched:
        console.print(f"not used by this config: {entry.pattern} ({entry.style_name})", highlight=False)


def _empty_model(path: Path, lora: str | None):  # type: ignore[no-untyped-def]
    """Build the model of a config on the meta device, optionally with LoRA.

    Raises:
        FileNotFoundError: ``path`` does not exist.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a model directory or a config.json.")
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if lora is None:
            return model
        from peft import LoraConfig, get_peft_model

        targets = lora if lora == "all-linear" else [part.strip() for part in lora.split(",")]
        return get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
