"""The pages name what exists: every term of the glossary in the code, every Python file, every command."""

import contextlib
import dataclasses
import importlib
import inspect
import re
import shlex
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from minwm.cli import main
from minwm.cli.base import parse as parse_command
from minwm.core.config import override, to_dict
from minwm.experiments.presets import PIPELINES
from minwm.train.config import Run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = [line.split("|")[3] for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("|")]
PLACES = (ROOT / "docs" / "paper.md").read_text().split("\n## Where everything is")[1].split("\n## ")[0].splitlines()
PLACES = [line.split("|")[2:4] for line in PLACES if line.startswith("|") and "`" in line and "preset `" not in line]
NAMES = [name for row in [*ROWS, *(code for code, _ in PLACES)] for name in re.findall(r"`([\w.]+)`", row)]
BLOCKS = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("minwm ")]
WAN, HUNYUAN = (ROOT / "docs" / "paper.md").read_text().split("\n## ")[1:3]
DIFFERENCES = [
    ("paper" if table is WAN else "paper-hunyuan", fields)
    for table in (WAN, HUNYUAN)
    for line in table.splitlines()
    if line.startswith("|") and (fields := re.findall(r"`([a-z]\w*(?:\.\w+)*)(?:=([^`]+))?`", line.split("|")[-2]))
]
"""The preset that has it so, and the fields that bring the paper's or the released code's way back."""


def attribute(owner: Any, name: str) -> Any:
    """A module, class, function or field; fields without a default are no attributes of their class."""
    if inspect.isclass(owner) and dataclasses.is_dataclass(owner):
        fields = {field.name: field for field in dataclasses.fields(owner)}
        if name in fields:
            return fields[name]
    if inspect.ismodule(owner) and not hasattr(owner, name):
        return importlib.import_module(f"{owner.__name__}.{name}")
    return inspect.getattr_static(owner, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_glossary_names_code_that_exists(name: str) -> None:
    owner: Any = importlib.import_module("minwm")
    for part in name.split("."):
        owner = attribute(owner, part)


@pytest.mark.parametrize(
    ("name", "value"), [pair for _, fields in PLACES for pair in re.findall(r"`([\w.]+)=([^`]+)`", fields)]
)
def test_the_preset_paper_has_the_values_that_are_said(name: str, value: str, tmp_path: Path) -> None:
    stage, _, field = name.partition(".")
    assert str(attrgetter(field)(PIPELINES["paper"](tmp_path).stage(stage))) == value


def reads(run: Run, name: str) -> bool:
    """Whether the run has such a field."""
    with contextlib.suppress(AttributeError):
        attrgetter(name)(run)
        return True
    return False


@pytest.mark.parametrize(("preset", "fields"), DIFFERENCES, ids=str)
def test_differences_from_the_paper_name_their_fields(preset: str, fields: list[tuple[str, str]]) -> None:
    """And the preset has the values that it is said to have."""
    values = {name: value for name, value in fields if value}
    runs = [run for run in PIPELINES[preset](Path()).stages if all(reads(run, name) for name, _ in fields)]
    assert any(override(run, values) == run for run in runs)


@pytest.mark.parametrize(("plain", "paper"), [("wan2.1-1.3b", "paper"), ("hunyuan1.5-8b", "paper-hunyuan")])
def test_the_presets_of_the_paper_differ_where_the_page_says(plain: str, paper: str) -> None:
    """And nowhere else from the preset of the same model."""

    def fields(cfg: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(cfg, dict):
            return {name: cfg}
        return {path: x for key, value in cfg.items() for path, x in fields(value, f"{name}.{key}").items()}

    both = (PIPELINES[name](Path()).stages for name in (plain, paper))
    pairs = [(fields(to_dict(a)), fields(to_dict(b))) for a, b in zip(*both, strict=True)]
    changed = {name[1:] for a, b in pairs for name in a.keys() | b.keys() if a[name] != b[name]}
    assert len(changed) > 5 and changed <= {name for preset, row in DIFFERENCES for name, _ in row if preset == paper}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    files = re.findall(r"`(?:minwm/)?([\w/-]+\.py)`", page.read_text())
    assert not [file for file in files if not ((ROOT / "minwm" / file).exists() or (ROOT / file).exists())]


@pytest.mark.parametrize("text", COMMANDS)
def test_documented_commands_are_understood(text: str) -> None:
    """Parsing binds the arguments and runs nothing; fields are checked against the preset."""
    words = shlex.split(text)[1:]
    work = parse_command(words)
    assert callable(work)
    if words[0] in ("train", "pipeline") or words[:2] == ["data", "render"]:
        assert main([*words, *(() if "--show" in words else ("--show",))]) == 0


def test_the_readme_lists_every_file() -> None:
    tree = re.search(r"```\n(minwm/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    listed = re.findall(r"── (\w+\.\w+)", tree[1])
    package = [p.name for p in (ROOT / "minwm").rglob("*") if p.suffix in (".py", ".html") and p.stat().st_size]
    assert sorted(listed) == sorted(package)
