"""Nonsense in every option of every verb and in every kind of file that is read.

Each ends in success or in one line and exit code 2, never in a traceback, and nothing half-written is left.
`make test` tries some hundred inputs, `make test-all` thousands.
"""

import contextlib
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some
from projects import MODEL, NETWORK, trained_once
from safetensors.torch import save_file

import minwm.cli.play
from minwm.cameras.trajectory import parse
from minwm.cli import main
from minwm.cli.base import VERBS, _options
from minwm.core.config import UserError, from_dict, to_dict
from minwm.core.media import write_image
from minwm.experiments.presets.demo import smoke
from minwm.train.build import train
from minwm.train.config import Run

PART = pytest.mark.parametrize("examples", [100, pytest.param(2500, marks=pytest.mark.slow)])


def unhurried(examples: int) -> settings:
    """The same examples every time; what fails is not made smaller, which would take minutes."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=quiet
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained stages, their data, and a file of every kind that a verb reads."""
    out = tmp_path_factory.mktemp("fuzz") / "project"
    shutil.copytree(trained_once(tmp_path_factory), out)  # what others use stays as it is
    (files := out / "files").mkdir()
    parse("w+l*4").track(MODEL.motion, MODEL.intrinsics).save(files / "poses.json")
    rng = np.random.default_rng(0)
    for name in ("photo.png", "photo.jpg", "photo.webp"):
        write_image(files / name, rng.integers(0, 256, (40, 56, 3), np.uint8))
    (files / "prompts.txt").write_text("a red room\na blue one\n")
    weights = replace(NETWORK, camera="none").build().state_dict()
    save_file(weights, files / "wan.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "wan.safetensors")}
    (files / "wan.safetensors.index.json").write_text(json.dumps(index))
    torch.save(NETWORK.build().state_dict(), files / "wan.pth")
    return out


class StartedError(UserError):
    """The long part of a verb has begun: its arguments were taken."""


def begin(*_args: Any, **_kwargs: Any) -> None:
    raise StartedError("enough")


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs that work for minutes, wait for clients or call the Hub stop where that begins."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(minwm.cli.play, "_warm_up", begin)
    for module, name in LONG:
        monkeypatch.setattr(f"{module}.{name}", begin)


LONG = [
    ("minwm.train.build", "train"),
    ("minwm.experiments.pipeline", "run_pipeline"),
    ("minwm.experiments.ablate", "run_ablation"),
    ("minwm.eval.run", "evaluate"),
    ("minwm.eval.suite", "generate_all"),
    ("minwm.session.batch", "generate_all"),
    ("minwm.session.clips", "generate_clips"),
    ("minwm.bench.selftest", "selftest"),
    ("minwm.bench.training", "measure_steps"),
    ("minwm.bench.stream", "bench_model"),
    ("minwm.data.rerender", "render_worlds"),
    ("minwm.data.record", "record"),
    ("minwm.data.splat", "splat_captures"),
]

COMMANDS = {
    ("pipeline",): "smoke --out {out}",
    ("train",): "smoke/camera --root {project} --out {out} --steps 2",
    ("generate",): "--model {project}/dmd --trajectory w*2,l*2 --world 3 --out {out}.mp4",
    ("eval",): "--model {project}/dmd --quick --out {out}",
    ("ablate",): "pose-noise --out {out}",
    ("bench",): "--model {project}/dmd --repeats 1 --chunks 1",
    ("bench-train",): "smoke/camera --steps 1 --warmup 1",
    ("doctor",): "{project}/dmd --json {out}.json",
    ("plan",): "--preset wan2.1-1.3b/dmd --gpu-memory 24",
    ("play",): "--model {project}/dmd --world 3 --port 0",
    ("data", "render"): "--out {out} --clips 2 --latents 3",
    ("data", "ingest"): "{project}/files --out {out} --source-license CC0-1.0",
    ("data", "splat"): "{project}/files --out {out} --source-license CC0-1.0",
    ("data", "record"): "--out {out} --clips 1 --latents 3",
    ("data", "generate"): "{project}/files/prompts.txt --model {project}/dmd --out {out} --source-license CC0-1.0",
    ("data", "encode"): "{project}/raw --codec {project}/codec --out {out}",
    ("data", "copy"): "{project}/raw {out}",
    ("data", "trajectories"): "{project}/latents --teacher {project}/camera --out {out} --clips 1 --ode-steps 4",
    ("data", "prompts"): "{project}/files/prompts.txt --model {project}/dmd",
    ("data", "check"): "{project}/raw --model {project}/dmd",
    ("data", "report"): "{project}/raw --sheet {out}.png",
    ("camera", "check"): "{project}/files/poses.json --json {out}.json",
    ("camera", "convert"): "{project}/files/poses.json {out} --to re10k",
    ("camera", "show"): "w*2,l*2 --model {project}/dmd --out {out}.json",
    ("inspect",): "{project}/dmd",
    ("convert",): "{project}/files/wan.safetensors {out} --heads 2",
    ("selftest",): "--out {out}",
    ("push",): "somebody/something --model {project}/dmd",
}


def test_every_verb_has_a_command() -> None:
    assert set(COMMANDS) == set(VERBS)


def field_names(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield prefix + name
            yield from field_names(value, f"{prefix}{name}.")


RUN = smoke(Path("runs/smoke")).stage("dmd")
FIELDS = sorted({*field_names(to_dict(RUN)), *field_names(to_dict(RUN.model)), "focal", "trajectories", "supersample"})
NUMBERS = ["-1", "0", "1", "2.5", "1e-9", "1e999", "nan", "-inf", str(2**63), str(10**30), "0x10", "1_000", "٣"]
WORDS = ["", " ", "-", "--", "none", "true", "{}", "[]", '{"kind": "wan"}', "[1, 2]", "..", "/dev/null", "/proc", "*",
         "w*2", "{project}", "{project}/dmd", "{project}/files/photo.png", "{project}/latents", "{out}", "\x00",
         "é\ud800", "x" * 300, "a/b", "http://[", "wan", "few_step", "bfloat16", "cuda:9"]  # fmt: skip
values = some.sampled_from(NUMBERS + WORDS) | some.text(max_size=8)


@some.composite
def command_lines(draw: some.DrawFn) -> list[str]:
    """A command that works, with one to three of its words dropped, replaced or added."""
    verb = draw(some.sampled_from(sorted(COMMANDS)))
    words = COMMANDS[verb].split()
    options = [option for option in _options(VERBS[verb].__wrapped__) if option != "--fields"]  # pyright: ignore
    for _ in range(draw(some.integers(1, 3))):
        place, kind = (
            draw(some.integers(0, len(words))),
            draw(some.sampled_from(["drop", "replace", "option", "field"])),
        )
        if kind == "drop":
            words = words[:place] + words[place + 1 :]
        elif kind == "replace":
            words = [*words[:place], draw(values), *words[place + 1 :]]
        else:
            name = draw(
                some.sampled_from(options) if kind == "option" else some.sampled_from(FIELDS).map("--{}".format)
            )
            words += [name, *draw(some.lists(values, max_size=1))]
    return [*verb, *words]


@PART
@pytest.mark.usefixtures("no_long_work")
def test_nonsense_in_options(examples: int, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @unhurried(examples)
    @given(command_lines())
    def attempt(words: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(project, Path(folder) / "project")
            places = {"{project}": str(copy), "{out}": f"{folder}/out"}
            for name, place in places.items():
                words = [word.replace(name, place) for word in words]
            with contextlib.chdir(folder):
                assert_clean(words, Path(folder), capsys)

    attempt()


# ---------------------------------------------------------------------------------------------
# Files

GENERATE = "generate --model {project}/dmd --out {out}.mp4"
ENCODE = "data encode {project}/raw --codec {project}/codec --out {out}"
WEIGHTS = ("model.json", "model.safetensors", "codec.json", "codec.safetensors")


def readers(file: Path) -> list[str]:
    """Commands that read a file of the project; `resume STAGE` trains a stage for one step more."""
    match file.parts:
        case ["files", "poses.json"]:
            use = f"{GENERATE} --world 3 --trajectory {{file}}"
            return ["camera check {file}", "camera show {file} --out {out}.json", use]
        case ["files", "prompts.txt"]:
            return ["data prompts {file} --model {project}/dmd"]
        case ["files", name] if name.startswith("photo"):
            return [f"{GENERATE} --prompt x --trajectory w*2,l*2 --start {{file}}"]
        case ["files", _]:
            return ["inspect {file}", "convert {file} {out} --heads 2"]
        case ["raw", *_]:
            return ["data check {project}/raw --model {project}/dmd", "data report {project}/raw", ENCODE]
        case ["latents", *_]:
            return ["data check {project}/latents --model {project}/dmd", "resume camera"]
        case ["codec", name] if name in WEIGHTS:
            return [ENCODE]
        case [stage, name] if name in WEIGHTS:
            return [f"inspect {{project}}/{stage}", GENERATE.replace("dmd", stage) + " --world 3 --trajectory w*2,l*2"]
        case [stage, *_]:
            return [f"resume {stage}"]
    raise AssertionError(file)


numbers = some.sampled_from([-1, 0, 1, 2.5, 1e-9, 1e400, -1e400, float("nan"), 2**63, 10**30])
leaves = some.none() | some.booleans() | numbers | some.text(max_size=8)
trees = some.recursive(leaves, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner))


@some.composite
def damaged_json(draw: some.DrawFn, text: str) -> bytes:
    """JSON with one value, at any depth, replaced or removed."""
    whole: Any = json.loads(text)
    path, node = list[Any](), whole
    while isinstance(node, dict | list) and node and (not path or draw(some.integers(0, 3))):
        path.append(draw(some.sampled_from(list(node) if isinstance(node, dict) else range(len(node)))))
        node = node[path[-1]]
    if not path:
        return json.dumps(draw(trees)).encode()
    parent: Any = functools.reduce(lambda inner, key: inner[key], path[:-1], whole)
    if draw(some.booleans()):
        parent[path[-1]] = draw(trees)
    else:
        del parent[path[-1]]
    return json.dumps(whole).encode()


@some.composite
def damaged(draw: some.DrawFn, content: bytes, is_json: bool) -> bytes:
    """Another content for a file: cut off, with bytes changed or added, empty, or of another kind."""
    if is_json and draw(some.booleans()):
        return draw(damaged_json(content.decode()))
    place = draw(some.integers(0, len(content)))
    match draw(some.sampled_from(["cut", "change", "add", "replace"])):
        case "cut":
            return content[:place]
        case "change":
            new = draw(some.binary(min_size=1, max_size=8))
            return content[:place] + new + content[place + len(new) :]
        case "add":
            return content[:place] + draw(some.binary(min_size=1, max_size=8)) + content[place:]
    return draw(some.sampled_from([b"", b"\0" * 100, b"[" * 200_000, "{}".encode("utf-16"), b"\x89PNG\r\n", b"PK\3\4"]))


@PART
def test_damaged_files(examples: int, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = sorted(path.relative_to(project) for path in project.rglob("*") if path.is_file())
    files = [file for file in every if file.name not in (".lock", "README.md")]

    @unhurried(examples)
    @given(some.data())
    def attempt(data: some.DataObject) -> None:
        file = data.draw(some.sampled_from(files))
        command = data.draw(some.sampled_from(readers(file)))
        content = data.draw(damaged((project / file).read_bytes(), file.suffix == ".json"))
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(project, Path(folder) / "project"))
            for record in copy.glob("*/run.json"):
                record.write_text(record.read_text().replace(str(project), str(copy)))
            (copy / file).write_bytes(content)
            places = {"project": copy, "out": f"{folder}/out", "file": copy / file}
            words = [word.format(**places) for word in command.split()]
            assert_clean(words, Path(folder), capsys, lambda: resumed(project / words[1] / "run.json", copy / words[1]))

    attempt()


def resumed(record: Path, stage: Path) -> int:
    """Train a stage of a copied project for one step more; as a command would."""
    text = record.read_text().replace(str(record.parent.parent), str(stage.parent))
    run = from_dict(Run, json.loads(text)["run"])
    try:
        train(replace(run, steps=2), stage)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def assert_clean(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], resume: Callable[[], int] | None = None
) -> None:
    """The command succeeds, or fails in one line and leaves nothing half-written."""
    code = resume() if resume and words[0] == "resume" else main(words)
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1)), (words, code, errors)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")], words
