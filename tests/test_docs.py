"""The pages name what exists: every term of the glossary in the code, every Python file."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = [line.split("|")[3] for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("|")]
NAMES = [name for row in ROWS for name in re.findall(r"`([\w.]+)`", row)]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    files = re.findall(r"`(?:minwm/)?([\w/-]+\.py)`", page.read_text())
    assert not [file for file in files if not ((ROOT / "minwm" / file).exists() or (ROOT / file).exists())]
