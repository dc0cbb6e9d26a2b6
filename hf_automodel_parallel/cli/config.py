"""``hf-automodel-parallel config``: a config file for ``accelerate launch``, adapted to a number of GPUs and nodes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import ConfigError

EPILOG = (
    "Examples:\n\n  hf-automodel-parallel config\n\n"
    "  hf-automodel-parallel config gpu_fsdp2_tp --gpus 8 --nodes 2 > cfg.yaml\n\n"
    "  accelerate launch --config_file cfg.yaml -m hf_automodel_parallel.launch train.py"
)

_PACKAGE = Path(__file__).resolve().parents[1]


def config(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="One of the configs; left out: list them."),
    ] = None,
    gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="GPUs (on CPU: processes) of each node, if not those of the file.", min=1),
    ] = None,
    nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of nodes, if not that of the file.", min=1),
    ] = None,
) -> None:
    """Print a config file for accelerate launch; without a name, list those that there are."""
    files = {path.stem: path for path in sorted(folder_of("accelerate_configs").glob("*.yaml"))}
    try:
        if name is None:
            if gpus is not None or nodes is not None:
                option = "--gpus" if gpus is not None else "--nodes"
                raise ConfigError(f"{option} needs the name of a config in front of it: {', '.join(files)}.")
            for known, path in files.items():
                typer.echo(f"{known}\n    {path.read_text().splitlines()[0].removeprefix('# ')}")
            return
        if name not in files:
            raise ConfigError(f"there is no config {name!r}; the names are {', '.join(files)}.")
        typer.echo(adapted(name, files[name].read_text(), gpus, nodes), nl=False)
    except ConfigError as error:
        typer.secho(f"hf-automodel-parallel: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def folder_of(name: str) -> Path:
    """The folder ``name``: inside of an installed package, beside it in a clone."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def adapted(name: str, text: str, gpus: int | None, nodes: int | None) -> str:
    """The config ``text`` for ``nodes`` x ``gpus`` processes; None keeps the file's numbers.

    The sizes of tp and cp stay, besides tp of a file without FSDP. A file with ``dp_replicate`` gets
    one copy of the model to each node; dp_shard takes the rest. Where nothing is left for dp_shard (and cp is 1) the
    result has no FSDP section, because Accelerate refuses one with nothing to shard over.

    Raises:
        ConfigError: the processes cannot be arranged so, or Accelerate would refuse the arrangement.
    """
    if gpus is None and nodes is None:
        return text
    machines, processes = _number(text, "num_machines"), _number(text, "num_processes")
    nodes = machines if nodes is None else nodes
    gpus = processes // machines if gpus is None else gpus
    if nodes * gpus == 1:
        raise ConfigError(f"{name} for one process: there is nothing to parallelise; give --gpus 2 or more.")
    sizes = {axis: int(size) for axis, size in re.findall(r"^\s*parallelism_config_(\w+)_size: (\d+)", text, re.M)}
    sizes["dp_replicate"] = nodes if sizes["dp_replicate"] > 1 else 1
    if "\ndistributed_type: FSDP\n" not in text:
        sizes["tp"] = nodes * gpus  # tensor parallelism alone
    fixed = sizes["dp_replicate"] * sizes["cp"] * sizes["tp"]
    if nodes * gpus % fixed:
        axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "dp_shard" and size > 1)
        raise ConfigError(f"{nodes} x {gpus} processes cannot be divided by {fixed} ({axes}); give another --gpus.")
    sizes["dp_shard"] = nodes * gpus // fixed
    without_fsdp = sizes["dp_shard"] == sizes["cp"] == 1
    if without_fsdp and sizes["dp_replicate"] > 1:
        raise ConfigError(
            f"{nodes} x {gpus} processes leave dp_shard 1 beside dp_replicate {sizes['dp_replicate']} and tp "
            f"{sizes['tp']}, which Accelerate refuses; give --gpus {2 * sizes['cp'] * sizes['tp']} or more, or use "
            "gpu_fsdp2_tp, which shards over the nodes."
        )
    numbers = {f"parallelism_config_{axis}_size": size for axis, size in sizes.items()}
    numbers |= {"num_machines": nodes, "num_processes": nodes * gpus}
    if nodes > 1 and _number(text, "main_process_port") == 0:
        numbers["main_process_port"] = 29500  # the same on all nodes
    _, _, body = text.partition("\n\n")
    for field, number in numbers.items():
        body = re.sub(rf"^(\s*{field}: )\d+", rf"\g<1>{number}", body, flags=re.M)
    if without_fsdp:
        body = re.sub(r"^distributed_type: FSDP$", "distributed_type: MULTI_GPU", body, flags=re.M)
        body = re.sub(r"^fsdp_config:\n(?: .*\n)*\n?", "", body, flags=re.M)
    if nodes > 1:
        body = re.sub(r"^machine_rank: .*\n", "", body, flags=re.M)
        if "rdzv_backend" not in body:
            body = re.sub(r"^(num_machines: .*\n)", r"\1same_network: true\nrdzv_backend: static\n", body, flags=re.M)
    return f"{_header(name, sizes, gpus, nodes)}\n\n{body}"


def _number(text: str, field: str) -> int:
    found = re.search(rf"^\s*{field}: (\d+)", text, re.M)
    return int(found[1]) if found else 1


def _header(name: str, sizes: dict[str, int], gpus: int, nodes: int) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one process"
    rank = " --machine_rank N --main_process_ip FIRST" if nodes > 1 else ""
    return (
        f"# {name} for {nodes} {'node' if nodes == 1 else 'nodes'} with {gpus} processes each: {mesh}.\n"
        f"#   accelerate launch --config_file THIS_FILE{rank} -m hf_automodel_parallel.launch my_script.py"
    )
