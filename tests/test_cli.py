"""The command line: what works, and that every bad input is one clear line, exit code 2 and nothing half-written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import error_line, run
from safetensors.torch import load_file, save_file

import minwm.core.files
import minwm.data.trajectories
import minwm.session.generate as generate_module
import minwm.train.state
from minwm.cameras.trajectory import Motion, parse
from minwm.core import media
from minwm.core.config import dumps
from minwm.core.media import read_video, write_image
from minwm.data.dataset import ShardDataset
from minwm.experiments import presets
from minwm.experiments.pipeline import collect_for
from minwm.experiments.presets.demo import smoke
from minwm.store.folder import load_config, save_codec, save_model

line = pytest.fixture(error_line)

MODELS = ("foundation", "camera", "ar", "dmd")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of the preset `smoke`: random models, and six clips of nine latents."""
    out = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    plan = smoke(out)
    codec = plan.stage("codec").model.codec.build()
    save_codec(out / "codec", codec)
    for name in MODELS:
        config = plan.stage(name).model
        save_model(out / name, config, config.network.build(), codec)
    assert run("data", "render", "--out", out / "raw", "--clips", 6, "--latents", 9, "--seed", 5) == 0
    assert run("data", "encode", out / "raw", "--codec", out / "codec", "--out", out / "latents") == 0
    return out


def train(project: Path, out: Path, *more: object) -> int:
    fields = ("--steps", 4, "--save-every", 2, "--tensorboard", "false")
    return run("train", "smoke/foundation", "--root", project, "--out", out, *fields, *more)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


BAD = [
    ("pipeline smoky", "there is no pipeline 'smoky'; did you mean 'smoke'?"),
    ("pipeline smoke --until dmt", "there is no stage 'dmt'; did you mean 'dmd'?"),
    ("pipeline smoke --camra.steps 5", "Pipeline has no field 'camra'; did you mean 'camera'?"),
    ("pipeline smoke --camera.step 5", "Run has no field 'step'; did you mean 'steps'?"),
    ("pipeline smoke --render.hight 5", "RenderConfig has no field 'hight'; did you mean 'height'?"),
    ("pipeline smoke --dmd.recipe.guidance much", "DmdConfig.guidance = 'much': expected float"),
    ("pipeline smoke --evaluated dmd,arr", "there is no stage 'arr'; did you mean 'ar'?"),
    ("pipeline smoke --camera.steps", "--camera.steps needs a value"),
    ("train smoke/camra", "there is no stage 'camra'; did you mean 'camera'?"),
    ("train smoke", "'smoke' names no stage; give PIPELINE/STAGE"),
    ("train smoke/camera --optim.lrr 1e-5", "OptimConfig has no field 'lrr'; did you mean 'lr'?"),
    ("train smoke/camera --recipe.text_dropuot 0", "no field 'text_dropuot'; did you mean 'text_dropout'?"),
    ("train smoke/camera --steps many", "Run.steps = 'many': expected int"),
    ("train smoke/camera --steps 0", "run.steps=0: must be at least 1"),
    ("train smoke/camera --steps", "--steps needs a value"),
    ("train smoke/camera steps", "'steps' is no field; write --FIELD VALUE"),
    ("trian smoke/camera", "there is no command 'trian'; did you mean 'train'?"),
    ("camera chek", "Expected one of {convert, check, show}; run minwm --help"),
    ("camera check x --jsn y", "there is no option '--jsn'; did you mean '--json'?"),
    ("play --grpahs", "there is no option '--grpahs'; did you mean '--graphs'?"),
    ("generate", "Missing from minwm generate: --model DIR"),
    ("camera show w*2,q*3", "'q' is not a key; use w s a d"),
    ("camera show none.json", "none.json: cannot read a camera track"),
    ("camera show w*2 --json \ud800", "is no file name"),
    ("camera check none.json", "none.json: cannot read a camera track"),
    ("inspect nowhere", "nowhere does not exist"),
    ("data check nowhere", "nowhere/manifest.json: missing"),
    ("data trajectories nowhere --teacher nowhere --out x", "nowhere"),
    ("data encode nowhere --codec nowhere --out x", "nowhere holds no codec (neither codec.json nor model.json)"),
    ("generate --model nowhere --trajectory w*8 --world 1 --out x.avi", "the name must end in .mp4"),
]


@pytest.mark.parametrize(("words", "problem"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line(
    words: str, problem: str, line: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words.split()) == 2
    assert problem in line()
    assert not list(tmp_path.iterdir())


def test_a_malformed_trajectory_is_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("camera", "show", "w*8,aa*4") == 2
    _, shown, caret = capsys.readouterr().err.splitlines()
    assert shown[caret.index("^") : caret.rindex("^") + 1] == "aa*4"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--world 1 --trajectory w*7", "give 6 latents (25 frames) or 8 latents (33 frames)"),
        ("--world 1 --trajectory dn*8", "world 1 has no free path"),
        ("--world -1 --trajectory w*8", "worlds are numbered from 0"),
        ("--trajectory w*8", "give --prompt TEXT (and --start FILE), or --world SEED"),
        ("--trajectory w*8 --start small.png", "give --prompt TEXT (and --start FILE)"),
        ("--trajectory w*8 --prompt x --start none.png", "none.png cannot be read as an image"),
        ("--trajectory track.json --world 1 --keys", "track.json holds poses, not keys"),
        ("--trajectory w*8 --prompt x --start small.mp4", "small.json is missing, and cameras are not guessed"),
        ("--trajectory w*8 --prompt x --start-poses track.json", "give --start FILE.mp4"),
    ],
)
def test_generation_refuses(
    words: str, problem: str, project: Path, line: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image("small.png", np.zeros((16, 32, 3), np.uint8))
    parse("w*8").track(Motion(0.5, 24.0, 16.0), np.array([0.7, 0.7, 0.5, 0.5])).save("track.json")
    before = set(tmp_path.iterdir())
    assert run("generate", "--model", project / "dmd", "--out", "x.mp4", *words.split()) == 2
    assert problem in line()
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_a_learning_rate_is_finite(value: str, line: Callable[[], str], tmp_path: Path) -> None:
    assert run("train", "smoke/camera", "--out", tmp_path / "x", "--optim.lr", value) == 2
    assert "lr" in line() and not leftovers(tmp_path)


def test_prompts_outside_the_encoding_of_the_console() -> None:
    code = "import functools, minwm.cli as cli; cli.parse = lambda _: functools.partial(print, '\\u96ea'); cli.main([])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\u96ea\n"


def test_a_bidirectional_model_has_one_length(project: Path, line: Callable[[], str], tmp_path: Path) -> None:
    words = ("--world", 1, "--trajectory", "w*6", "--out", tmp_path / "x.mp4")
    assert run("generate", "--model", project / "camera", *words) == 2
    assert "give 8 latents (33 frames)" in line()


def test_generate_writes_a_video(project: Path, tmp_path: Path, line: Callable[[], str]) -> None:
    words = ("generate", "--model", project / "dmd", "--world", 3, "--trajectory", "j*2")
    assert run(*words, "--out", tmp_path / "a.mp4") == 0
    assert run(*words, "--out", tmp_path / "b.mp4", "--keys", "--compare") == 0
    (plain, fps), (both, _) = read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4")
    assert plain.shape == (9, 64, 64, 3) and fps == 16 and both.shape == (9, 256, 512, 3)
    parse("j*2").track(Motion(0.5, 24.0, 16.0), np.array([0.7, 0.7, 0.5, 0.5])).save(tmp_path / "a.json")
    more = ("--start", tmp_path / "a.mp4", "--prompt", "a room", "--trajectory", "j*2", "--out", tmp_path / "c.mp4")
    assert run(*words[:3], *more) == 0
    longer, _ = read_video(tmp_path / "c.mp4")
    assert longer.shape == (17, 64, 64, 3)
    assert run(*words, "--out", tmp_path / "a.mp4") == 2
    assert "a.mp4 exists; delete it, or give another name" in line()


@pytest.mark.parametrize(("part", "value"), [("model", float("nan")), ("model", 1e30), ("codec", float("nan"))])
@pytest.mark.parametrize("name", ["dmd", "camera"])
def test_output_that_is_no_picture_is_an_error(
    name: str, part: str, value: float, project: Path, tmp_path: Path, line: Callable[[], str]
) -> None:
    """Few-step and bidirectional models, with one spoilt tensor in the network or in the decoder."""
    other = shutil.copytree(project / name, tmp_path / "other")
    tensors = load_file(other / f"{part}.safetensors")
    last = "head.head.weight" if part == "model" else [key for key in tensors if key.endswith("weight")][-1]
    save_file({**tensors, last: torch.full_like(tensors[last], value)}, other / f"{part}.safetensors")
    length = "j*2" if name == "dmd" else "j*8"
    words = ("--world", 3, "--trajectory", length, "--out", tmp_path / "x.mp4")
    assert run("generate", "--model", other, *words) == 2
    assert "the model gives no picture but numbers up to" in line()
    assert list(tmp_path.iterdir()) == [other]


def test_models_start_as_they_were_trained(project: Path, tmp_path: Path, line: Callable[[], str]) -> None:
    model, image = tmp_path / "text", tmp_path / "x.png"
    write_image(image, np.zeros((64, 64, 3), np.uint8))
    shutil.copytree(project / "dmd", model)
    config = load_config(model)
    (model / "model.json").write_text(dumps(replace(config, stream=replace(config.stream, first_chunk=2))))
    words = ("--prompt", "x", "--trajectory", "w*7", "--out", tmp_path / "x.mp4")
    assert run("generate", "--model", model, "--start", image, *words) == 2
    assert "this model starts from its prompt alone, with 2 latents" in (shown := line())
    assert "stream.image_start=true" in shown and hasattr(config.stream, "image_start")
    for name in ("dmd", "camera"):
        assert run("generate", "--model", project / name, *words[:2], "--trajectory", "w*8", *words[4:]) == 2
        assert "this model starts from an image: give one (--start PNG, or --world SEED)" in line()


OUTPUTS = {
    "generate --model nowhere --trajectory w*8 --world 1 --out": "x.mp4",
    "bench --model nowhere --json": "x.json",
    "eval --model nowhere --html": "x.html",
    "train smoke/foundation --out": "x",
}


@pytest.mark.parametrize(("words", "name"), OUTPUTS.items(), ids=OUTPUTS)
def test_unwritable_outputs_are_noticed_before_any_work(
    words: str, name: str, tmp_path: Path, line: Callable[[], str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "deeper" / name
    assert run(*words.split(), out) == 2
    assert f"{out} cannot be written ({tmp_path / 'file'}: Not a directory)" in line()


def test_generate_writes_frames_as_they_come(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is open before the first chunk, and each chunk is encoded before the next is made."""
    seen, chunks = list[int](), generate_module.stream_latents

    def watched(*args: Any) -> Iterator[torch.Tensor]:
        for latents in chunks(*args):
            seen.append(len(leftovers(tmp_path)))
            yield latents
            assert sum(frames() is not None for frames in made) <= 1, "earlier frames are not kept"

    made, overlay_keys = list[weakref.ref](), media.overlay_keys

    def overlay(frames: np.ndarray, keys: Any) -> np.ndarray:
        made.append(weakref.ref(frames))
        return overlay_keys(frames, keys)

    monkeypatch.setattr(media, "overlay_keys", overlay)
    monkeypatch.setattr(generate_module, "stream_latents", watched)
    words = ("--world", 3, "--trajectory", "j*6", "--out", tmp_path / "a.mp4", "--keys")
    assert run("generate", "--model", project / "dmd", *words) == 0
    assert seen == [1] * 4 and "frames 25/25" in capsys.readouterr().err


def test_after_an_interruption_generate_does_not_say_that_it_continues(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "stream_latents", interrupt)
    words = ("--world", 3, "--trajectory", "j*2", "--out", tmp_path / "a.mp4")
    assert run("generate", "--model", project / "dmd", *words) == 130
    assert "the same command again starts over" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mirrored_pose_names_its_frame(project: Path, tmp_path: Path, line: Callable[[], str]) -> None:
    path = tmp_path / "track.json"
    assert run("camera", "show", "w*2", "--out", path) == 0
    assert run("camera", "check", path) == 0
    record = json.loads(path.read_text())
    record["c2w"][3][1][1] = -1.0
    path.write_text(json.dumps(record))
    use = ("generate", "--model", project / "dmd", "--world", 1, "--out", tmp_path / "x.mp4", "--trajectory", path)
    for words in (("camera", "check", path), use):
        assert run(*words) == 2
        assert "frame 3: det(R) = -1.0, a rotation has +1" in line()
    assert list(tmp_path.iterdir()) == [path]


def test_a_truncated_shard_is_named(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Callable[[], str]
) -> None:
    latents = shutil.copytree(project / "latents", tmp_path / "latents")
    assert run("data", "check", latents) == 0
    shard = next(latents.glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size - 1000)
    problem = f"{shard}: {shard.stat().st_size} bytes, its index says {shard.stat().st_size + 1000} (cut off?)"
    capsys.readouterr()
    assert run("data", "check", latents) == 2
    shown = capsys.readouterr()
    assert problem in shown.out and "error: " in shown.err
    assert train(project, tmp_path / "run", "--data", latents) == 2
    assert problem in line()
    assert not (tmp_path / "run" / "state").exists() and not leftovers(tmp_path)


def test_weights_of_another_architecture_are_refused(project: Path, tmp_path: Path, line: Callable[[], str]) -> None:
    other = shutil.copytree(project / "dmd", tmp_path / "other")
    config = smoke(project).stage("dmd").model
    wider = replace(config, network=replace(config.network, dim=64))
    (other / "model.json").write_text(dumps(wider))
    assert run("inspect", other) == 2
    assert "model.safetensors is of another architecture than Wan: " in line()
    assert train(project, tmp_path / "run", "--init.student", project / "dmd") == 2
    assert "prope_o" in line()
    assert not (tmp_path / "run" / "state").exists()


def test_a_full_disk_leaves_nothing(
    project: Path, tmp_path: Path, line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(minwm.core.files, "_sync", full)
    assert run("camera", "show", "w", "--out", tmp_path / "x.json") == 2
    assert re.search(r"no space left to write .*x\.json: \d+ bytes are free", line())
    assert train(project, tmp_path / "run") == 2
    assert "no space left to write" in line()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], [".lock"])


def test_an_interrupted_save_keeps_the_one_before(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(project, tmp_path / "whole") == 0
    out, save = tmp_path / "cut", minwm.train.state.save

    def interrupt(tensors: dict[str, torch.Tensor], **how: Any) -> None:
        save(tensors, **how)
        if (out / "state" / "000002").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(minwm.train.state, "save", interrupt)
        assert train(project, out) == 130
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("interrupted: ") and "the same command again continues" in shown
    assert [path.name for path in (out / "state").iterdir()] == ["000002"]
    assert not leftovers(out) and not (out / "model.json").exists()
    assert train(project, out) == 0
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_trajectories_are_collected_by_the_verb_as_by_the_pipeline(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Callable[[], str]
) -> None:
    """And on it goes where it was interrupted."""
    out, written = tmp_path / "trajectories", minwm.data.trajectories.write_shard
    fields = ("--clips", 3, "--guidance", 2, "--ode-steps", 4, "--sampler.steps", 2, "--batch", 2)
    words = ("data", "trajectories", project / "latents", "--teacher", project / "ar", "--out", out, *fields)

    def interrupt(path: Path, *rest: Any) -> None:
        written(path, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(minwm.data.trajectories, "write_shard", interrupt)
        assert run(*words) == 130
    half = {path.name for path in out.glob("*.tar")}
    assert run(*words) == run(*words) == 0
    assert half < {path.name for path in out.glob("*.tar")} and not leftovers(out)
    stage = presets.stage("smoke/ode", project)
    sampler, init = replace(stage.model.sampler, steps=2), replace(stage.init, student=str(project / "ar"))
    recipe = replace(stage.recipe, guidance=2.0, ode_steps=4)
    (tmp_path / "latents").symlink_to(project / "latents")
    shutil.move(out, tmp_path / "verb")
    stage = replace(stage, recipe=recipe, model=replace(stage.model, sampler=sampler), init=init, seed=0)
    collect_for(stage, tmp_path, 3)
    one, two = (ShardDataset(path, "train").batch([0, 1, 2]).trajectory for path in (out, tmp_path / "verb"))
    assert one is not None and two is not None and len(one) == 3
    assert torch.equal(one, two)
    assert run(*words, "--ode-stepz", 4) == 2
    assert "CollectConfig has no field 'ode_stepz'; did you mean 'ode_steps'?" in line()
    assert run(*words, "--clips", 0) == 2
    assert "trajectories.clips=0: must be at least 1" in line()
    assert run(*words, "--seed", 1) == 2
    assert "holds trajectories with another seed: 0, now 1" in line()
    assert run(*words[:4], project / "camera", *words[5:]) == 2
    assert "the teacher is a bidirectional model" in line()


def test_a_run_folder_is_not_reused(project: Path, tmp_path: Path, line: Callable[[], str]) -> None:
    assert train(project, tmp_path) == 0
    assert train(project, tmp_path, "--optim.lr", "1e-9") == 2
    assert "holds a run with another optim; give another --out, or delete it" in line()


def test_fields_are_read_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    fields = ("--optim.lr", "1e-4", "--steps=7", "recipe.image_start=0.5", "--save-every", "3")
    assert run("train", "smoke/camera", *fields, "--show") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optim"]["lr"] == 1e-4 and shown["steps"] == 7 and shown["save_every"] == 3
    assert shown["recipe"] == shown["recipe"] | {"kind": "bidirectional", "image_start": 0.5}
    fields = "--camera.steps 5 --dmd.recipe.guidance=2 codec.batch=3 --render.height 32 --collect 7"
    assert run("pipeline", "smoke", *fields.split(), "--show") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["camera"]["steps"] == 5 and shown["dmd"]["recipe"]["guidance"] == 2 and shown["codec"]["batch"] == 3
    assert shown["render"]["height"] == 32 and shown["collect"] == 7 and shown["evaluation"]["clips"] == 3
    assert run("data", "render", "--out", "x", "--motion.fps", "8", "--trajectories", '["w*4,a*4"]', "--show") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["motion"]["fps"] == 8 and shown["trajectories"] == ["w*4,a*4"]


def test_numbers_are_written(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("inspect", project / "dmd"), ("data", "report", project / "raw"), ("camera", "show", "w*2")):
        assert run(*words, "--json", tmp_path / "x.json") == 0
        written = json.loads((tmp_path / "x.json").read_text())
        assert {"command", "commit", "versions"} < written.keys()
    shown = capsys.readouterr().out
    assert "sampler.kind: few_step" in shown and "clips: 6" in shown and "(2 latents after the first" in shown
    assert written["forward"] == [0.0, 0.125, 0.25]


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "minwm pipeline demo" in capsys.readouterr().out
    script = "import sys, minwm.cli; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_lists_pipelines_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("pipeline", "train", "bench-train"):
        assert run(words, "--help") == 0
        shown = capsys.readouterr().out
        assert "smoke " in shown and "Every line of the pipeline in under a minute" in shown
    assert run("pipeline", "smoke", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--render.height INT", "--evaluation.clips INT", "--collect INT", "--encode.val FLOAT"):
        assert option in shown
    assert "minwm train smoke/consistency --help" in shown
    assert run("train", "smoke/dmd", "--help") == 0
    shown = capsys.readouterr().out
    assert "--optim.lr FLOAT" in shown and "Clips of a micro-batch" in shown and "--recipe.guidance FLOAT" in shown
    for words in (("eval",), ("data", "render"), ("data", "encode"), ("data", "trajectories")):
        assert run(*words, "--help") == 0
    shown = capsys.readouterr().out
    assert "--clips INT" in shown and "--fov FLOAT" in shown and "--shard-size INT" in shown
    assert "--ode-steps INT" in shown and "--sampler.shift FLOAT" in shown
