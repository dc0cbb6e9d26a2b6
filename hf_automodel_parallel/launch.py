"""``python -m hf_automodel_parallel.launch``: run an unmodified training script, parallelised by this package.

``Accelerator.__init__`` builds a ``ParallelismConfig`` from the environment if its caller passes none. In this process
the launcher replaces this one name in the module ``accelerate.accelerator`` by a factory of
:class:`AutoParallelismConfig`. Nothing else changes, and a script without the launcher does not import the package.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from . import compat
from .config import CONFIG_VARIABLE, AutoParallelismConfig
from .core.mesh import AXES
from .core.output import DETAILS, verbosity
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


logger = logging.getLogger(__name__)

#: The launcher's own option in both spellings.
FLAG = ("--auto_parallel", "--auto-parallel")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m hf_automodel_parallel.launch``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config_text, is_module, script, rest = _parse(arguments)
    try:
        install(config_text, flag_of_script=_has_flag(rest))
    except AutoParallelError as error:
        # One line instead of a traceback through runpy. All ranks read the same text and exit in the same way.
        sys.exit(f"hf_automodel_parallel: {error}")
    sys.argv = [script, *rest]
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    if not Path(script).is_file():
        sys.exit(f"hf_automodel_parallel: the script {script!r} does not exist.")
    # As `python SCRIPT` does; runpy.run_path does not add the folder of a script file.
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def install(config_text: str | None, flag_of_script: bool = False) -> None:
    """Make ``Accelerator`` build an :class:`AutoParallelismConfig` in this process, and libraries less talkative.

    What is silenced stands in :mod:`.compat.library_output`; ``verbose=2`` leaves all of it.

    Args:
        config_text: a config in text form. None: the environment decides (``$HF_AUTO_PARALLEL``, or else the
            ``parallelism_config`` section that ``accelerate launch`` exports as ``PARALLELISM_CONFIG_*``).
        flag_of_script: the flag stands behind the script, for the message.

    Raises:
        ConfigError: the text cannot be read, or there is no config at all.
    """
    import accelerate.accelerator

    if config_text is None:
        config_text = os.environ.get(CONFIG_VARIABLE) or None
    if config_text is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        if flag_of_script:
            raise ConfigError(
                "--auto_parallel stands behind the script, so it is an argument of the script. Put it in front of the "
                "script; or, if the script's own arguments have the flag (AutoParallelTrainingArguments), start the "
                "script without hf_automodel_parallel.launch."
            )
        raise ConfigError(
            "nothing says how to parallelise. Give --auto_parallel (for example tp=2), or an Accelerate config file "
            "with a parallelism_config section (accelerate launch --config_file ...)."
        )
    verbose = None
    if config_text is not None:
        # The given config replaces the section of Accelerate's config file: a size that it does not set is inferred and
        # not read from there.
        replaced = {axis: os.environ.pop(f"PARALLELISM_CONFIG_{axis.upper()}_SIZE", "1") for axis in AXES}
        config = AutoParallelismConfig.parse(config_text)  # errors now, before anything is loaded
        verbose = config.verbose
        _say_who_won(config, {f"{axis}_size": size for axis, size in replaced.items()})
        os.environ[CONFIG_VARIABLE] = config_text
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    if _on_cpu():
        # With an FSDP config, Accelerate does not set this variable for CPU workers, and then does not start gloo.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if verbosity(verbose) != DETAILS:
        compat.silence_libraries(int(os.environ.get("RANK", "0")))
    accelerate.accelerator.ParallelismConfig = _from_environment  # type: ignore[misc,assignment]


def _say_who_won(config: AutoParallelismConfig, replaced: dict[str, str]) -> None:
    """Say that ``config`` is used, and not the sizes of Accelerate's config file, ``replaced``, if they differ."""
    given = {name: str(value) for name, value in config.to_dict().items() if name in replaced}
    section = {name: size for name, size in replaced.items() if size != "1"}
    if section and os.environ.get("RANK", "0") == "0" and any(given.get(n, s) != s for n, s in replaced.items()):
        logger.warning(
            "%r is used, not the parallelism_config section of Accelerate's config file (%s), which differs.",
            config,
            ", ".join(f"{name}={size}" for name, size in section.items()),
        )


def _has_flag(arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] in FLAG for argument in arguments)


def _from_environment(*args: Any, **kwargs: Any) -> AutoParallelismConfig:
    """Return the config of the environment. ``Accelerator.__init__`` calls this instead of ``ParallelismConfig``."""
    text = os.environ.get(CONFIG_VARIABLE)
    if not text or args or kwargs:
        return AutoParallelismConfig(*args, **kwargs)
    state = compat.accelerator_already_exists()
    if state is not None and isinstance(state.parallelism_config, AutoParallelismConfig):
        return state.parallelism_config  # of the first Accelerator, which this one shares
    return AutoParallelismConfig.parse(text)


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _parse(arguments: list[str]) -> tuple[str | None, bool, str, list[str]]:
    """Separate the launcher's options from the script and its arguments. All arguments after the script belong to it.

    Returns:
        (config text or None, the script is a module, script, arguments of the script).
    """
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
        if option not in FLAG:
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
