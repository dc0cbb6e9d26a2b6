"""The Dockerfile is read here, not built: instructions, what they copy, which user runs."""

import re
from pathlib import Path

import pytest

import hf_automodel_parallel

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]
TEXT = (ROOT / "docker/Dockerfile").read_text()
INSTRUCTIONS = "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM LABEL RUN USER VOLUME WORKDIR".split()


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in TEXT.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([a-z]+) = \[", section, re.M))


def test_instructions_are_known_and_arguments_are_used():
    steps = instructions()
    assert steps[0][0] == "FROM" and {word for word, _ in steps} <= set(INSTRUCTIONS)
    arguments = dict(rest.split("=", 1) for word, rest in steps if word == "ARG")
    commands = " ".join(rest for word, rest in steps if word == "RUN")
    assert set(arguments) == set(re.findall(r"\$([A-Z_]+)", commands))
    assert set(arguments["EXTRAS"].split(",")) <= extras()
    assert re.search(rf"^TORCH +\?= {re.escape(arguments['TORCH'])}$", (ROOT / "Makefile").read_text(), re.M)


def test_the_last_user_is_not_root_and_every_install_leaves_no_cache():
    steps = instructions()
    users = [rest for word, rest in steps if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    created = [rest for word, rest in steps if word == "RUN" and "useradd" in rest]
    assert created and users[-1] in created[0]
    for _, command in (step for step in steps if step[0] == "RUN"):
        assert "pip install" not in command or "--no-cache-dir" in command
        assert "apt-get install" not in command or "rm -rf /var/lib/apt/lists/*" in command


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "setup.py", "README.md", "LICENSE", "accelerate_configs", "examples"]
)
def test_what_the_build_reads_is_in_the_context(name):
    """`COPY .` takes what .dockerignore lets through; setup.py and pyproject.toml name these."""
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert kept[0] == "**" and f"!{name}" in kept and (ROOT / name).exists()
