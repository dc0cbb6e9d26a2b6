"""The pages say what is true: the layers are those of the contract, links lead somewhere."""

import configparser
import re
from pathlib import Path

import hf_automodel_parallel

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_architecture_lists_the_layers_of_the_contract():
    text = (ROOT / "docs/architecture.md").read_text()
    shown = re.search(r"<!-- layers: begin.*?-->\n```\n(.*?)\n```\n<!-- layers: end -->", text, re.S)
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    assert shown is not None
    assert shown[1].split("\n") == contract["importlinter:contract:layers"]["layers"].strip().split("\n")


def test_every_module_and_room_has_a_layer():
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    known = set(re.findall(r"\w+", contract["importlinter:contract:layers"]["layers"]))
    package = ROOT / "hf_automodel_parallel"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert there - {"__init__"} == known


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
