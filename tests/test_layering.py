"""The structure of the package: which way imports point, and the house rules that a parser can check."""

import ast
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import minwm

PACKAGE = Path(minwm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEVEL = {
    "core": 0, "cameras": 1, "render": 2, "control": 2, "nets": 3, "families": 4, "stream": 5, "data": 5, "store": 6,
    "recipes": 7, "session": 7, "train": 8, "play": 8, "bench": 9, "eval": 10, "experiments": 11, "cli": 12,
    "__main__": 13,
}  # fmt: skip
LIGHT = {"torch", "numpy", "einops", "jaxtyping", "safetensors", "PIL"}
"""What any file may import at its top; every other library is imported inside functions, in one file each."""
SHARED = {"tyro", "rich"}
"""Small libraries that any file may use, inside functions unless it is the command line."""
FILE_LINES, FUNCTION_LINES = 450, 60

by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def part(file: Path) -> str:
    """core/flow.py -> core."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(node: ast.AST) -> list[str]:
    """The modules that a statement or a `require("x", ...)` names."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=str(module), names=names) if module == "minwm":
            return [f"minwm.{name.name}" for name in names]
        case ast.ImportFrom(module=str(module)):
            return [module]
        case ast.Call(func=ast.Name(id="require"), args=[ast.Constant(value=str(module)), *_]):
            return [module]
    return []


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not those in functions or under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def outside(module: str) -> str | None:
    """The top name of a third-party module, None for python's own and ours."""
    top = module.partition(".")[0]
    return None if top in sys.stdlib_module_names or top == "minwm" else top


@by_file
def test_imports_only_point_down(file: Path) -> None:
    here = part(file)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no level: give it one in this file and in the design"
    nodes = list(ast.walk(tree(file)))
    assert not [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level], "imports are written in full"
    for module in (name for node in nodes for name in modules(node) if name.startswith("minwm.")):
        there = module.split(".")[1]
        assert there == here or LEVEL[there] < LEVEL[here], (
            f"{file.name} ({here}, level {LEVEL[here]}) imports {module} (level {LEVEL[there]}); "
            "move the shared part down"
        )


COMPILED = {"kernels.py": {"triton"}, "fast_kernels.py": {"numba"}}
"""Files that are themselves imported only where their compiler is installed."""


@by_file
def test_only_light_libraries_are_imported_at_the_top(file: Path) -> None:
    allowed = (LIGHT | SHARED if part(file) == "cli" else LIGHT) | COMPILED.get(file.name, set())
    for node in at_import(tree(file)):
        for module in modules(node):
            assert outside(module) in {None, *allowed}, f"import {module} inside the function that uses it"


def test_each_heavy_library_has_one_home() -> None:
    homes = defaultdict(set)
    for file in FILES:
        for node in ast.walk(tree(file)):
            for library in map(outside, modules(node)):
                if library and library not in LIGHT | SHARED:
                    homes[library].add(str(file.relative_to(PACKAGE)))
    assert not {library: files for library, files in homes.items() if len(files) > 1}


@by_file
def test_files_and_functions_stay_small(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= FILE_LINES, f"{lines} lines"
    for function in functions(file):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length < FUNCTION_LINES, f"{function.name}, line {function.lineno}, has {length} lines"


@by_file
def test_arguments_are_typed(file: Path) -> None:
    for function in functions(file):
        if "triton.jit" in map(ast.unparse, function.decorator_list):  # its types are found when it is compiled
            continue
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [a.arg for a in every if a and not a.annotation and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name}, line {function.lineno}: no type for {bare}"


@by_file
def test_no_print_no_blind_except_no_guessed_attribute(file: Path) -> None:
    for node in ast.walk(tree(file)):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                assert part(file) == "cli", f"line {node.lineno}: only the command line prints"
            case ast.Call(func=ast.Name(id="getattr"), args=[_, _, _]):
                raise AssertionError(f"line {node.lineno}: getattr with a default hides what an object has")
            case ast.ExceptHandler(type=None | ast.Name(id="Exception")):
                raise AssertionError(f"line {node.lineno}: name the exceptions you expect")
            case ast.ExceptHandler(type=ast.Name(id="BaseException"), body=body):
                assert isinstance(body[-1], ast.Raise), f"line {node.lineno}: raise again what you caught"


def test_importing_minwm_does_nothing() -> None:
    """No torch, no change of the environment, and quick; the names come when they are asked for."""
    script = """
import os, sys
before, loaded = dict(os.environ), set(sys.modules)
import minwm
assert dict(os.environ) == before
assert "torch" not in sys.modules and "numpy" not in sys.modules, sorted(set(sys.modules) - loaded)
assert {"CameraTrack", "Clip", "Session", "load"} <= set(dir(minwm))
from minwm import CameraTrack, Clip, Session, load
import torch
assert CameraTrack.__name__ == "CameraTrack" and not torch.cuda.is_initialized()
assert dict(os.environ) == before
"""
    environment = dict(os.environ, PYTHONPATH=str(PACKAGE.parent))
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import minwm"], check=True, env=environment)
    assert time.monotonic() - start < 2
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        minwm.Nothing  # noqa: B018  (reading it is the test)
