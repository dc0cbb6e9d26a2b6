"""The commands of README and pages: files that they name exist, flags are read, subcommands and options are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import hf_automodel_parallel
from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.launch import _parse

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py"), *ROOT.glob("examples/slurm/*")]
#: Names that stand for a file of the reader.
YOURS = {"train.py", "my_sft.py", "my_script.py"}


KNOWN = r"^([A-Z_]+=\S* )*(--kill-on-bad-exit=\d )?(torchrun|accelerate launch|hf-automodel-parallel|python) "
#: Other programs, whose lines are looked at below.
OTHERS = {"make", "pip"}


def commands(page: Path) -> list[list[str]]:
    text = page.read_text().replace("\\\\\n", "\\\n").replace("\\\n", " ")
    if page.suffix == ".md":
        text = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))
    lines = (line.removeprefix("srun ").strip().removeprefix("# ") for line in text.splitlines())
    lines = (re.sub(r"^(\d+ GPUs?|CPU) +", "", line) for line in lines)
    parts = (line.partition(" || ")[0] for line in lines)
    return [shlex.split(part, comments=True) for part in parts if re.match(KNOWN, part)]


ALL = [
    pytest.param(command, id=f"{page.stem}-{number}") for page in PAGES for number, command in enumerate(commands(page))
]


@pytest.mark.parametrize("command", ALL)
def test_command_is_what_the_programs_take(command):
    if "hf_automodel_parallel.launch" in command:
        config, _, script, _ = _parse(command[command.index("hf_automodel_parallel.launch") + 1 :])
        if config is not None:
            AutoParallelismConfig.parse(config.replace("$SLURM_NNODES", "2"))
        assert script in YOURS or script.startswith("trl.scripts.") or (ROOT / script).is_file()
    if "--config_file" in command:
        file = ROOT / command[command.index("--config_file") + 1]
        assert AutoParallelismConfig.parse(file) and yaml.safe_load(file.read_text())["num_processes"]
    if command[0] == "hf-automodel-parallel" and "..." not in command:
        check_options(command[1:])


def check_options(arguments: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group if arguments[0].startswith("-") else group.commands[arguments[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in arguments if word.startswith("--")} <= known


MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
BLOCKS = [
    pytest.param(line.strip(), id=f"{page.stem}-{number}")
    for page in PAGES
    if page.suffix == ".md"
    for number, line in enumerate(
        line
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text().replace("\\\n", " "), re.S | re.M)
        for line in block.splitlines()
        if line.strip() and not re.match(KNOWN, line.strip())
    )
]


@pytest.mark.parametrize("line", BLOCKS)
def test_other_lines_of_blocks_are_checked_or_say_why_not(line):
    command, _, comment = line.partition(" #")
    program, *words = shlex.split(command)
    if program not in OTHERS:
        assert re.search(r"not run here: \w+", comment), "a command that no test looks at has to say why"
    elif program == "make":
        assert re.search(rf"^{words[0]}:.*## ", MAKEFILE, re.M)
        assert all(re.search(rf"^{word.partition('=')[0]} *\?=", MAKEFILE, re.M) for word in words[1:])
    else:
        assert words[0] == "install"
        named = {extra for word in words for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", word)))}
        assert named <= set(re.findall(r"^(\w+) = \[", EXTRAS, re.M))


def test_there_are_commands_on_the_pages():
    assert len(ALL) > 15
