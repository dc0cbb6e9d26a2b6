"""``python -m hf_automodel_parallel.launch``: run an unmodified training script, parallelised by this package.

``Accelerator.__init__`` builds a ``ParallelismConfig`` from the environment when nobody passes one. For this process,
that one name in the module ``accelerate.accelerator`` is replaced by a factory of :class:`AutoParallelismConfig`;
nothing else is changed, and a script that is started without this launcher does not import the package.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from .config import CONFIG_VARIABLE, AutoParallelismConfig
from .core.mesh import AXES
from .errors import AutoParallelError, ConfigError

USAGE = """\
usage: accelerate launch [accelerate options] -m hf_automodel_parallel.launch [--auto_parallel CONFIG] SCRIPT [args ...]

Run SCRIPT unchanged; its Accelerator or Trainer parallelises the model (tensor parallelism, FSDP2, HSDP).

  --auto_parallel CONFIG   'tp=2,dp_shard=4', or a YAML or JSON file with fields of AutoParallelismConfig. Wins over the
                           parallelism_config section of Accelerate's config file and over $HF_AUTO_PARALLEL.
  -m MODULE                run a module instead of a script file
  -h, --help               show this text

examples:
  accelerate launch --config_file accelerate_configs/cpu_fsdp2_tp2.yaml -m hf_automodel_parallel.launch train.py
  torchrun --nproc_per_node 8 -m hf_automodel_parallel.launch --auto_parallel tp=2 train.py
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m hf_automodel_parallel.launch``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config_text, is_module, script, rest = _parse(arguments)
    try:
        install(config_text)
    except AutoParallelError as error:
        # One line instead of a traceback through runpy; every rank reads the same text and ends the same way.
        sys.exit(f"hf_automodel_parallel: {error}")
    sys.argv = [script, *rest]
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    if not Path(script).is_file():
        sys.exit(f"hf_automodel_parallel: the script {script!r} does not exist.")
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def install(config_text: str | None) -> None:
    """Make this process's ``Accelerator`` build an :class:`AutoParallelismConfig`.

    Args:
        config_text: a config in text form, or None for the environment's (``$HF_AUTO_PARALLEL``, else the
            ``parallelism_config`` section that ``accelerate launch`` put into ``PARALLELISM_CONFIG_*``).

    Raises:
        ConfigError: the text cannot be read, or nothing says how to parallelise.
    """
    import accelerate.accelerator

    if config_text is None:
        config_text = os.environ.get(CONFIG_VARIABLE) or None
    if config_text is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        raise ConfigError(
            "nothing says how to parallelise. Give --auto_parallel (for example tp=2), or an Accelerate config file "
            "with a parallelism_config section (accelerate launch --config_file ...)."
        )
    if config_text is not None:
        # The config replaces the section of the file: sizes it leaves open are inferred, not taken from there.
        for axis in AXES:
            os.environ.pop(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", None)
        AutoParallelismConfig.parse(config_text)  # errors now, before anything is loaded
        os.environ[CONFIG_VARIABLE] = config_text
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    if _on_cpu():
        # Accelerate tells CPU workers of an FSDP config nothing about the CPU and then does not start gloo.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    accelerate.accelerator.ParallelismConfig = _from_environment  # type: ignore[misc,assignment]


def _from_environment(*args: Any, **kwargs: Any) -> AutoParallelismConfig:
    """What ``Accelerator.__init__`` calls where it would build a ``ParallelismConfig``."""
    text = os.environ.get(CONFIG_VARIABLE)
    if not text or args or kwargs:
        return AutoParallelismConfig(*args, **kwargs)
    return AutoParallelismConfig.parse(text)


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _parse(arguments: list[str]) -> tuple[str | None, bool, str, list[str]]:
    """Split our options from the script and its arguments; everything after the script belongs to the script."""
    config_text: str | None = None
    position = 0
    while position < len(arguments) and arguments[position].startswith("-"):
        option, separator, value = arguments[position].partition("=")
        if option in ("-h", "--help"):
            print(USAGE, end="")
            sys.exit(0)
        if option == "-m":
            if position + 1 >= len(arguments):
                sys.exit(f"hf_automodel_parallel: -m needs the name of a module.\n\n{USAGE}")
            return config_text, True, arguments[position + 1], arguments[position + 2 :]
        if option not in ("--auto_parallel", "--auto-parallel"):
            sys.exit(f"hf_automodel_parallel: unknown option {option!r} before the script.\n\n{USAGE}")
        if not separator:
            position += 1
            if position >= len(arguments):
                sys.exit(f"hf_automodel_parallel: --auto_parallel needs a value such as tp=2.\n\n{USAGE}")
            value = arguments[position]
        config_text = value
        position += 1
    if position >= len(arguments):
        sys.exit(f"hf_automodel_parallel: no script given.\n\n{USAGE}")
    return config_text, False, arguments[position], arguments[position + 1 :]


if __name__ == "__main__":
    main()
