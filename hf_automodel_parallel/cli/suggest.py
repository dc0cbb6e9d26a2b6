"""``hf-automodel-parallel suggest``: which mesh, before there is a GPU, and the files that start it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import model_options as options
from .config import folder_of
from .model_options import Count, File
from .tables import eighty_columns, table_of

if TYPE_CHECKING:
    from ..planner.arithmetic import Candidate
    from ..planner.suggest import Suggestion

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel suggest llama-3.1-405b --gpus 256 --gpu-memory 80GiB\n\n"
    "  hf-automodel-parallel suggest path/to/model --gpus 8 --gpu-memory 80GiB --seq 8192 --write cfg.yaml\n\n"
    "  hf-automodel-parallel suggest config.json --gpus 16 --gpu-memory 40GiB --interconnect a100-infiniband "
    "--lora r=16,targets=all-linear --write cfg.yaml --slurm train.sbatch\n\n"
    "  hf-automodel-parallel suggest gemma3-27b --gpus 32 --gpu-memory 80GiB --rows 256 --json"
)

#: Rows of a table; the rest is in --json.
_SHOWN = 8


@options.quiet
def suggest(
    model: options.Model,
    gpus: Annotated[int, typer.Option(help="Number of GPUs, of all nodes together.", min=1)],
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU, such as 80GiB.")],
    per_node: options.PerNode = None,
    interconnect: Annotated[
        str, typer.Option(help="Nodes and bandwidths: a name of interconnects.yaml, or FILE.yaml:NAME.")
    ] = "h100-infiniband",
    rows: Annotated[
        Count,
        typer.Option(help="Rows of an optimizer step, of all ranks together; without it one for each GPU.", min=1),
    ] = None,
    batch: Annotated[
        Count, typer.Option(help="Rows of a data-parallel rank in a micro-batch; without it as suits a mesh.", min=1)
    ] = None,
    sequence: options.Sequence = 4096,
    lora: options.Lora = None,
    dtype: options.Dtype = "bf16",
    mixed_precision: options.Mixed = "bf16",
    optimizer: options.Optimizer = "adamw",
    measure: Annotated[int, typer.Option(help="How many of the best meshes to run on simulated ranks.", min=1)] = 2,
    write: Annotated[
        File, typer.Option(help="Write the config file for accelerate launch that starts the first choice.")
    ] = None,
    slurm: Annotated[File, typer.Option(help="Write an sbatch script that starts the first choice.")] = None,
    imports: options.Imports = None,
    as_json: options.AsJson = False,
) -> None:
    """Rank the meshes on which a model can be trained, and say why each loses.

    One run on simulated ranks gives the sizes from which arithmetic estimates every mesh; then the best ones are run.
    No GPU, no weights, no network. It takes some minutes.
    """
    from ..planner.models import lora_of
    from ..planner.sizes import bytes_of
    from ..planner.suggest import suggest as search

    with options.one_line_errors():
        found = search(
            model,
            gpus,
            bytes_of(gpu_memory),
            per_node=per_node,
            interconnect=interconnect,
            rows=rows,
            batch=batch,
            sequence=sequence,
            dtype=dtype,
            mixed_precision=mixed_precision or "no",
            optimizer=optimizer,
            lora=lora_of(lora) if lora else None,
            measured=measure,
            imports=imports or (),
            progress=lambda line: typer.secho(f"  {line}: done", dim=True, err=True),
        )
        best = found.ranked[0]
        for path, text in ((write, accelerate_file), (slurm, sbatch)):
            if path is not None:
                path.write_text(text(best, found.about, path), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "command": torchrun(best, found.about)}, indent=2))
        return
    show(found)
    if write is not None:
        typer.echo(f"\n{write}:\n  {_launch(best, found.about, write)}")
    if slurm is not None:
        typer.echo(f"\n{slurm}:\n  sbatch {slurm}")


def show(found: Suggestion) -> None:
    """Print a suggestion as tables of at most 80 columns (wider in a wider terminal)."""
    from ..planner.sizes import gib

    console, about, best = eighty_columns(), found.about, found.ranked[0]
    what = "full training" if about["trainable"] == about["parameters"] else f"{about['trainable']:,} trained"
    console.print(
        f"{about['model']} ({about['parameters']:,} parameters, {what}) on {about['gpus']} GPUs of "
        f"{gib(about['gpu_memory'])}, {about['gpus_per_node']} in a node",
        style="bold",
    )
    console.print(
        f"{about['dtype']}, {about['optimizer']}, steps of {about['rows']:,} x {about['sequence']:,} tokens; tensors "
        f"may take {gib(about['usable_memory'])} of a GPU."
    )
    table = table_of(
        f"Meshes that fit: {len(found.ranked)} ({about['considered']} combinations looked at); memory and bytes in GiB",
        "mesh",
        "recompute",
        right=("rows", "memory", "in node", "between", "step"),
    )
    for row in found.ranked[:_SHOWN]:
        each = f"{row.batch} x {row.accumulation}" if row.accumulation > 1 else str(row.batch)
        mark = "" if row.measured else "~"
        sizes = [
            mark + gib(size).removesuffix(" GiB") if size else "0"
            for size in (row.memory, row.within_node, row.between_nodes)
        ]
        cells = (_mesh(row), row.checkpointing, each, *sizes, f"~{row.seconds:.2g} s")
        table.add_row(*cells, style="bold" if row is best else None)
    console.print(table)
    console.print(
        "recompute: activation checkpointing. rows: of a data-parallel rank in a micro-batch (x micro-batches). in "
        "node, between: sent by a rank in a step, within and between nodes. ~: arithmetic; without it: counted on "
        f"simulated ranks. step: an estimate for the order only, {about['interconnect']}, with most of FSDP2's "
        "collectives behind the computation and those of tp not. Of meshes within a tenth of the quickest, the one "
        "with least tp is first."
    )
    table = table_of("Why the others lose", "mesh", "reason")
    for row in found.ranked[1:_SHOWN]:
        table.add_row(_mesh(row), row.reason)
    refused = list(found.refused.items())
    for name, why in refused[:_SHOWN]:
        table.add_row(name.replace(",", " x ").replace("=", " "), why)  # the mesh of a candidate, or a size of an axis
    if len(found.ranked) > 1 or refused:
        console.print(table)
    left = max(len(found.ranked) - _SHOWN, 0) + max(len(refused) - _SHOWN, 0)
    if left:
        console.print(f"{left} more in --json.")
    for note in notes(best, about):
        console.print(f"note: {note}")
    typer.echo(f"\nFirst choice: {best.flag}\n{torchrun(best, about)}")


def notes(best: Candidate, about: dict[str, Any]) -> list[str]:
    """What the first choice asks of the training script."""
    found = []
    if about["mixed_precision"] == "no" and about["dtype"] in ("bf16", "bfloat16"):
        found.append(
            "trained parameters, gradients and optimizer state are bf16, 8 bytes a parameter with AdamW; "
            "--mixed-precision bf16 keeps them in float32, 16 bytes."
        )
    if about["experts_used"]:
        found.append(
            f"a token uses {about['experts_used']:.1%} of the experts, and FSDP2 gathers all of a layer. tp shards "
            "each expert; there is no expert parallelism (all-to-all) here."
        )
    if about["even_shards"] < about["gpus"] / 1.5:
        found.append(
            f"FSDP2 shards most parameters over {about['even_shards']:.0f} ranks at most, by their first dimension "
            "(the number of experts): with a larger dp_shard the first ranks hold as much, and the others nothing."
        )
    if best.seconds > 2 * best.computing:
        found.append(
            f"by estimate the GPUs compute in {best.computing / best.seconds:.0%} of a step, and wait for the network "
            "in the rest. More rows a step (--rows) hide more of it, if the training allows a larger batch."
        )
    if best.accumulation > 1:
        found.append(
            f"{best.accumulation} micro-batches of a step: accumulate with sync_each_batch=True, as counted here. Else "
            "a rank keeps unsharded gradients between them."
        )
    if best.sizes["cp"] > 1:
        found.append("cp wants causal attention without packing, and lengths that are multiples of 2 x cp.")
    if best.checkpointing != "none":
        found.append("leave the model's own gradient_checkpointing off; activation_checkpointing does it.")
    if best.sizes["tp"] > 1 and not about["sequence_parallel"]:
        found.append("this model refuses sequence parallelism, so norms and residuals are whole on each tp rank.")
    return found


def _mesh(found: Candidate) -> str:
    return found.mesh.replace(",", " x ").replace("=", " ")


def _nodes(about: dict[str, Any]) -> tuple[int, int]:
    return about["gpus"] // about["gpus_per_node"], about["gpus_per_node"]


def _arguments(found: Candidate, about: dict[str, Any]) -> str:
    """What a script with the Trainer's arguments has to be told."""
    steps = f" --gradient_accumulation_steps {found.accumulation}" if found.accumulation > 1 else ""
    precision = "" if about["mixed_precision"] == "no" else f" --{about['mixed_precision']} True"
    return f"--per_device_train_batch_size {found.batch}{steps}{precision}"


def torchrun(found: Candidate, about: dict[str, Any]) -> str:
    """The command that starts ``found`` with torchrun, on each node."""
    nodes, each = _nodes(about)
    meeting = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint FIRST:29500 \\\n    " if nodes > 1 else ""
    if nodes * each == 1:
        return f"python train.py {_arguments(found, about)}"
    return (
        f"torchrun {meeting}--nproc_per_node {each} \\\n    -m hf_automodel_parallel.launch \\\n"
        f"    --auto_parallel {found.flag} \\\n    train.py {_arguments(found, about)}"
    )


def _launch(found: Candidate, about: dict[str, Any], path: Path) -> str:
    rank = " --machine_rank N --main_process_ip FIRST" if _nodes(about)[0] > 1 else ""
    return (
        f"accelerate launch --config_file {path}{rank} \\\n    -m hf_automodel_parallel.launch --auto_parallel {path} "
        f"\\\n    train.py {_arguments(found, about)}"
    )


def accelerate_file(found: Candidate, about: dict[str, Any], path: Path) -> str:
    """The config file of Accelerate; ``--auto_parallel`` reads the options of the package from its section.

    Raises:
        ConfigError: there is one GPU only.
    """
    import yaml

    from ..errors import ConfigError

    nodes, each = _nodes(about)
    if nodes * each == 1:
        raise ConfigError("--write: one GPU needs no config file; start the script with python.")
    values: dict[str, Any] = yaml.safe_load((folder_of("accelerate_configs") / "gpu_fsdp2.yaml").read_text())
    values |= {"num_processes": nodes * each, "num_machines": nodes, "mixed_precision": about["mixed_precision"]}
    if nodes > 1:
        del values["machine_rank"]
        # Ranks follow machine_rank, so neighbours are on one node; the port has to be the same on all.
        values |= {"main_process_port": 29500, "same_network": True, "rdzv_backend": "static"}
    values["fsdp_config"]["fsdp_activation_checkpointing"] = found.checkpointing == "full"
    if found.sizes["tp"] == nodes * each:
        # Nothing for FSDP2 to shard: Accelerate's word for one worker for each process, as torchrun does.
        values["distributed_type"] = "MULTI_GPU"
        del values["fsdp_config"]
    section = {f"{axis}_size": size for axis, size in found.sizes.items()} | found.options
    values["parallelism_config"] = {f"parallelism_config_{name}": value for name, value in section.items()}
    command = _launch(found, about, path).replace("\n", "\n#   ")
    head = (
        f"# {about['model']} on {nodes} {'node' if nodes == 1 else 'nodes'} with {each} GPUs each: {_mesh(found)},\n"
        f"# activation checkpointing {found.checkpointing}, {found.batch} rows of {about['sequence']} tokens a rank.\n"
        f"#\n#   {command}\n#\n"
        "# Accelerate reads the sizes and FSDP's settings, --auto_parallel the whole section parallelism_config, with\n"
        f"# the options that Accelerate does not know. The parameters are {about['dtype']}: load the model so.\n\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)


def sbatch(found: Candidate, about: dict[str, Any], path: Path) -> str:
    """``examples/slurm/train.sbatch`` for ``found``.

    Raises:
        ConfigError: the example is another one than expected.
    """
    from ..errors import ConfigError

    nodes, each = _nodes(about)
    text = (folder_of("examples") / "slurm" / "train.sbatch").read_text()
    for pattern, new in (
        (r"^# One torchrun on each node\..*$", f"# One torchrun on each node. Change the command; sbatch {path}"),
        (r"^#SBATCH --nodes=\d+$", f"#SBATCH --nodes={nodes}"),
        (r"^#SBATCH --gpus-per-node=\d+$", f"#SBATCH --gpus-per-node={each}"),
        (r"^# A copy of the model on each node.*$", f"# {about['model']}: {_mesh(found)}."),
        (r"--nproc_per_node \d+", f"--nproc_per_node {each}"),
        (r'--auto_parallel "[^"]*"', f'--auto_parallel "{found.flag}"'),
        (r" --bf16 True$", f" {_arguments(found, about)}"),
    ):
        text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.M)  # type: ignore[misc]
        if count != 1:
            raise ConfigError(f"--slurm: the example train.sbatch has {count} lines like {pattern!r}, not one.")
    return text
