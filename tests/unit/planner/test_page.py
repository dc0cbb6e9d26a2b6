"""The page of ``plan --html``, from a stored plan, and its grid of points, on figures that stand in for runs."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_automodel_parallel
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.errors import ConfigError, UnsupportedError
from hf_automodel_parallel.planner import explain as explaining
from hf_automodel_parallel.planner.explanation import Explanation
from hf_automodel_parallel.planner.grid import Grid, explain_grid, parse_grid
from hf_automodel_parallel.planner.page import page

ROOT = Path(hf_automodel_parallel.__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "docs" / "plan-llama-3.1-405b.json").read_text())


class Elements(HTMLParser):
    """The elements of a page: tags and attributes, and the text of the one that holds the data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.data += data if self._inside else ""


def stored(**changes):
    found = Explanation(**copy.deepcopy({**EXAMPLE, **changes}))
    return Grid(found, [found])


def data_of(text):
    return json.loads(Elements(text).data)


def test_every_section_is_there_and_nothing_is_fetched():
    text = page(stored())
    elements = Elements(text)
    ids = {attributes.get("id") for _, attributes in elements.tags}
    assert {"controls", "tiles", "warnings", "memory", "points", "mesh", "layer", "collectives", "plan"} <= ids
    for tag, attributes in elements.tags:
        assert tag not in ("link", "img", "iframe", "base") and not attributes.keys() & {"src", "href", "srcset"}
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text
    assert "__" not in re.sub(r'"(?:[^"\\]|\\.)*"', "", elements.data) and not re.search("__(TITLE|DATA)__", text)
    # What a label speaks of is there.
    labels = {value for _, a in elements.tags for name, value in a.items() if name in ("aria-labelledby", "for")}
    assert labels <= ids


def test_figures_are_those_of_the_plan():
    data = data_of(page(stored()))
    (point,) = data["points"]
    for name in ("memory", "peaks", "rows", "seconds", "warnings", "sizes", "by_checkpointing"):
        assert point[name] == EXAMPLE[name]
    assert {row["axis"]: row.pop("in_node") for row in point["collectives"]} == {"tp": True, "dp_shard": False}
    assert point["collectives"] == EXAMPLE["collectives"]
    styles = {node["name"]: node["style"] for node in modules(point["layer"]["inside"])}
    assert styles["self_attn.q_proj"] == "colwise" and styles["mlp.down_proj"] == "rowwise"
    assert styles["input_layernorm"] == "on sequence shards" and styles["mlp"] is None
    assert (data["ranks"], data["gpus_per_node"], data["axes"][-1]) == (1024, 8, "tp")


def modules(nodes):
    for node in nodes:
        if node["kind"] == "module":
            yield node
            yield from modules(node["inside"])


def test_the_stored_layer_is_one_of_a_llama():
    """Sequence shards outside of the blocks, whole sequences inside, one collective at each boundary."""
    inside = EXAMPLE["layer"]["inside"]
    assert [node["kind"] for node in inside] == ["collective", *("module", "module", "add") * 2]
    attention = inside[2]
    assert [node["kind"] for node in attention["inside"]] == ["collective", *["module"] * 3, "attention", "module"]
    assert attention["input"] == [1, 1024, 16384] and attention["inside"][0]["op"] == "all_gather"
    q, k, v, core, o = attention["inside"][1:]
    assert q["input"] == [1, 8192, 16384] and q["from"] == k["from"] == v["from"] != o["from"]
    assert q["weights"][0] | {"shape": [16384, 16384], "local": [2048, 16384], "dim": 0} == q["weights"][0]
    assert core["query"] == [1, 16, 8192, 128] and core["key"][2] == 8192
    assert [call["op"] for call in o["inside"]] == ["reduce_scatter"] and o["output"] == [1, 1024, 16384]
    assert {"all_gather dp_shard", "reduce_scatter dp_shard"} <= EXAMPLE["layer"]["backward"].keys()


def test_names_are_escaped():
    name = '</script><script>alert("1")</script>&<!--'
    text = page(stored(about={**EXAMPLE["about"], "model": name}, notes=[name], rows=[[name] * 5]))
    assert text.count("</script") == page(stored()).count("</script") and "<!--" not in text
    assert data_of(text)["points"][0]["about"]["model"] == name
    assert "<title>&lt;/script&gt;" in text


def figures(setting):
    """Stands in for a run: memory that grows with the tokens and shrinks with tp."""
    size = setting.sequence * 100 // setting.config["tp_size"]
    names = ("parameters", "gradients", "optimizer", "buffers", "logits", "gathered")
    found = {name: 10 for name in names} | {"activations": size, "peaks": {"forward": size + 60}}
    return found | {"collectives": {"all_reduce tp": [1, 8, 8]}, "layer": {}}


def run(job):
    if job.placed.config["tp_size"] == 16:
        raise UnsupportedError("tp_size=16: 8 heads")
    about = {"layers": 2, "flops_per_token": 1, "experts_used": None}
    yield about | {"shard_bytes": 10, "parameters": 100, "trainable": 100}
    yield from map(figures, job.settings)


def test_grid(monkeypatch):
    monkeypatch.setattr(explaining, "results_of", run)
    said = []
    given = {"sequence": 64, "checkpointing": ("full",), "progress": said.append}
    grid = explain_grid("gemma3-27b", "tp=8,dp_shard=4", **given)
    seen = {(p.sizes["tp"], p.sizes["dp_shard"], p.about["sequence"], p.about["checkpointing"]) for p in grid.points}
    assert seen == {(tp, 32 // tp, s, m) for tp, s in [(4, 64), (8, 64), (8, 128)] for m in ("none", "full")}
    assert grid.refused == [{"tp": 16, "sequence": 64, "reason": "tp_size=16: 8 heads"}]
    assert grid.asked.memory["peak"] == 860 and grid.asked.about["checkpointing"] == "none"
    assert sum("of 3 other points" in line for line in said) == 7
    grid = explain_grid(
        "gemma3-27b", "tp=8,dp_shard=4", parse_grid(["tp=1,3 seq=32", "checkpointing=full"]), sequence=64
    )
    assert {(p.sizes["tp"], p.about["sequence"]) for p in grid.points} == {(8, 64), (1, 32)}
    assert "tp=3 does not divide the 32 ranks" in grid.refused[0]["reason"]


@pytest.mark.parametrize("text", ["tp=", "tp=x", "pp=2", "seq=0", "tp", "checkpointing=some"])
def test_wrong_axes_of_a_grid(text):
    with pytest.raises(ConfigError, match="--html-grid"):
        parse_grid([text])


def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(explaining, "results_of", run)
    file = tmp_path / "report.html"
    arguments = ["plan", "gemma3-27b", "--tp", "2", "--dp-shard", "4", "--no-modes", "--seq", "64", "--html", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--html-grid", "tp=2,4 seq=64", "--gpu-memory", "80GiB"])
    assert result.exit_code == 0 and "gemma3-27b on 8 ranks" in result.output
    data = data_of(file.read_text())
    assert [point["sizes"]["tp"] for point in data["points"]] == [2, 4] and data["gpu_memory"] == 80 << 30
    wrong = {
        ("--no-step",): "leave out --no-step",
        ("--html", str(tmp_path / "nowhere" / "a.html")): "there is no folder",
    }
    for options, sentence in wrong.items():
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 1 and sentence in result.output and len(result.output.strip().splitlines()) == 1
    result = CliRunner().invoke(app, [*arguments[:-2], "--html-grid", "tp=2"])
    assert result.exit_code == 1 and "add --html" in result.output
