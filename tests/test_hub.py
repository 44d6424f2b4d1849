"""Models on the Hub, without a network: what would be fetched and sent. Cards say what is known, and no more."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minwm
from minwm import formats
from minwm.checkpoint import CheckpointError, ModelConfig, adopt, load_config, load_model, save_model
from minwm.cli import main
from minwm.cli.base import parse
from minwm.core.config import dumps
from minwm.core.media import write_image
from minwm.core.runtime import MissingExtraError
from minwm.core.trajectory import Motion
from minwm.data.encode import encode_clips
from minwm.data.rerender import RenderConfig, render_worlds
from minwm.formats import open_published
from minwm.hub import BASES, CARD, FILES, HubError, card, load, push, resolve, write_card
from minwm.nets.codec import CodecConfig
from minwm.nets.text import WordText
from minwm.nets.umt5 import Umt5Text
from minwm.nets.wan import WanConfig
from minwm.nets.wan_vae import WanVaeConfig
from minwm.recipes.codec import CodecTraining
from minwm.recipes.diffusion import BidirectionalConfig
from minwm.recipes.dmd import DmdConfig
from minwm.sampling import Bidirectional, FewStep
from minwm.train import Init, OptimConfig, Run, train

hub = pytest.importorskip("huggingface_hub")
known = pytest.importorskip("huggingface_hub.errors")

NETWORK = WanConfig(
    dim=32, heads=2, layers=1, ffn=32, channels=4, text_dim=8, text_length=24, freq_dim=8, camera="dual"
)
MODEL = ModelConfig(
    network=NETWORK,
    sampler=FewStep(steps=2),
    codec=CodecConfig(channels=4, width=8, fine=8, finest=8, decoder_depth=1),
    motion=Motion(move=0.5, turn=24.0, fps=16.0),
    text=WordText(dim=8),
    latents=5,
    height=32,
    width=32,
)
VAE = WanVaeConfig(base=8, decoder_base=8, channels=4, depth=1, mean=(0.0,) * 4, std=(1.0,) * 4)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec, a bidirectional model and a few-step one made from it, trained where huggingface_hub is missing."""
    out = tmp_path_factory.mktemp("project")
    render = RenderConfig(seed=5, motion=MODEL.motion, latents=MODEL.latents, height=32, width=32)
    render_worlds(out / "raw", render, clips=6, workers=1)

    def run(name: str, model: ModelConfig, recipe: Any, data: str, init: Init) -> None:
        known = Run(name=name, model=model, recipe=recipe, init=init, data=str(out / data), tensorboard=False)
        optim, critic = OptimConfig(lr=3e-4), OptimConfig(lr=7e-5)
        train(replace(known, steps=1, batch=2, accumulate=3, optim=optim, critic=critic), out / name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        run("codec", MODEL, CodecTraining(fit_clips=2), "raw", Init())
        encode_clips(out / "raw", out / "latents", minwm.checkpoint.load_codec(out / "codec"), MODEL.text)
        folders = {name: str(out / name) for name in ("codec", "camera")}
        whole = replace(MODEL, sampler=Bidirectional(steps=3))
        run("camera", whole, BidirectionalConfig(), "latents", Init(codec=folders["codec"]))
        init = Init(student=folders["camera"], critic=folders["camera"], real=folders["camera"], codec=folders["codec"])
        run("dmd", MODEL, DmdConfig(steps=2), "latents", init)
    return out


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The few-step model, alone in another place."""
    return shutil.copytree(project / "dmd", tmp_path / "dmd")


@pytest.fixture
def adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published transformer, of a size that counts as Wan's for once, with its VAE."""
    plain = replace(NETWORK, camera="none", text_length=512)
    monkeypatch.setitem(formats.SIZES, "wan2.1-1.3b", plain)
    files = {"transformer": plain, "vae": VAE}
    for name, config in files.items():
        save_file(config.build().state_dict(), tmp_path / f"{name}.safetensors")
    text = Umt5Text(source="weights/Wan", dim=8)
    config = replace(MODEL, codec=VAE, text=text, sampler=Bidirectional(steps=5, guidance=8.0), first=0, latents=8)
    published = open_published(tmp_path / "transformer.safetensors", heads=2)
    adopt(published, config, tmp_path / "vae.safetensors", tmp_path / "model")
    return tmp_path / "model"


def metadata(text: str) -> dict[str, Any]:
    """The front matter, read by the Hub's own library."""
    return hub.ModelCard(text).data.to_dict()


def row(text: str, start: str) -> list[str]:
    """Cells of the one line of a table that begins with a cell."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------------------------------------- cards


def test_training_ends_with_a_card(project: Path) -> None:
    text = (project / "dmd" / CARD).read_text()
    assert text.startswith(card(project / "dmd"))
    assert metadata(text) == {
        "library_name": "minwm",
        "pipeline_tag": "image-to-video",
        "tags": ["world-model", "video-generation", "wan", "few-step", "camera-control", "streaming"],
    }
    parameters = sum(p.numel() for p in load_model(project / "dmd").net.parameters())
    assert f"{parameters:,} parameters (float32): dim 32, heads 2, layers 1" in row(text, "network")[1]
    assert row(text, "sampler")[1] == "`few_step`: 2 network passes per chunk"
    assert row(text, "clip")[1] == "17 frames (1.06 s), 5 latents"
    assert row(text, "chunk")[1].startswith("2 latents, 8 frames (0.5 s); the first one is 1 latent")
    about = json.loads((project / "dmd" / "run.json").read_text())
    assert f"begun {about['started']}" in text and f"torch {torch.__version__}" in text
    assert str(about["commit"] or "unknown") in text
    assert not (project / "codec" / CARD).exists(), "a codec is no model"


def test_the_recipe_goes_back_to_the_first_stage(project: Path) -> None:
    text = card(project / "dmd")
    codec, camera, dmd = (row(text, name) for name in ("codec | codec", "camera", "dmd"))
    assert codec[2:] == ["fresh weights", "1", "6", "0.0003", "float32", "6 (procedural)", "CC0-1.0"]
    clips = json.loads((project / "latents" / "manifest.json").read_text())["counts"]["train"]
    assert camera[1:4] == ["bidirectional", "fresh weights, codec `codec`", "1"]
    assert camera[6:] == ["float32", f"{clips} (procedural)", "CC0-1.0"]
    assert dmd[2] == "student `camera`, critic `camera`, real `camera`, codec `codec`"
    assert dmd[4:6] == ["6", "0.0003, critic 7e-05"]
    assert text.index("| codec | codec") < text.index("| camera |") < text.index("| dmd |")
    assert "Training clips: CC0-1.0." in text


def test_licences_are_known_without_the_data(copy: Path) -> None:
    """What run.json noted counts; a run that noted nothing is looked up while its data is there."""
    path, text = copy / "run.json", card(copy)
    record = json.loads(path.read_text())
    noted = record.pop("data")
    path.write_text(json.dumps(record))
    assert row(card(copy), "dmd") == row(text, "dmd")
    record["run"]["data"] = "gone"
    path.write_text(json.dumps(record | {"data": noted}))
    assert row(card(copy), "dmd") == row(text, "dmd")
    path.write_text(json.dumps(record))
    assert row(card(copy), "dmd")[-2:] == ["unknown", "unknown"]
    assert "Training clips: CC0-1.0, unknown." in card(copy)


def test_a_chain_may_be_cut_or_closed(copy: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    cut = dict(record["run"]["init"], student="runs/gone", critic=None, real=None)

    def rewritten(init: dict[str, Any]) -> str:
        (copy / "run.json").write_text(json.dumps(record | {"run": record["run"] | {"init": init}}))
        return card(copy)

    text = rewritten(cut)
    assert "`gone`, with which it began, is not here any more: what came before is unknown." in text
    assert "Training clips: CC0-1.0, unknown for `gone`." in text and "| camera |" not in text
    circle = rewritten(dict(cut, student=str(copy)))
    assert circle.count("| dmd | dmd |") == 1 and "base_model" not in circle


def test_cameras_are_spelt_out(project: Path) -> None:
    text = card(project / "dmd")
    for fact in (
        "x to the right, y down, z forward",
        "camera-to-world matrices (c2w)",
        "frame `4 i`",
        "PRoPE (`camera=dual`",
        "world-to-camera matrices (w2c)",
        "fx / width = 0.7141, fy / height = 0.7141 (70 x 70 degrees)",
        "0.5 units per second (0.125 per latent)",
        "24 degrees per second (6 per latent)",
    ):
        assert fact in text, fact


def test_an_adopted_model_says_where_it_comes_from_and_no_more(adopted: Path) -> None:
    text = card(adopted, "me/adopted")
    data = metadata(text)
    assert data["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B" and data["pipeline_tag"] == "text-to-video"
    assert not {"camera-control", "streaming"} & set(data["tags"])
    assert "It has no record of a training with minwm; its sizes are those of Wan-AI/Wan2.1-T2V-1.3B." in text
    assert "It has no camera control" in text and "UMT5, is not among the files" in text
    assert "10 network passes per clip, both branches of guidance (8) counted" in text
    assert "Weights: not stated." in text and "Training clips: unknown." in text
    assert "makes whole clips of 29 frames" in text and "minwm play" not in text
    assert "when and where the weights were made is unknown" in text
    assert "| stage |" not in text and "commit" not in text.partition("## Provenance")[2]


def test_every_published_size_has_a_base(adopted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BASES.keys() == formats.SIZES.keys()
    monkeypatch.setitem(formats.SIZES, "wan2.1-1.3b", WanConfig())
    text = card(adopted)
    assert "base_model" not in text and "no record of a training with minwm." in text


def test_a_model_made_from_a_release_names_it(
    project: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats.SIZES, "wan2.1-14b", replace(NETWORK, camera="none"))
    assert "base_model" not in metadata(card(copy)), "it began with fresh weights, whatever its size"
    base = tmp_path / "base"
    base.mkdir()
    for name in FILES:
        shutil.copy(project / "camera" / name, base)
    path = copy / "run.json"
    path.write_text(path.read_text().replace(str(project / "camera"), str(base)))
    text = card(copy)
    assert metadata(text)["base_model"] == "Wan-AI/Wan2.1-T2V-14B"
    assert "`base`, with which it began, has no record of a training with minwm; its sizes are those of" in text


def test_speed_is_what_bench_measured(copy: Path) -> None:
    assert f"Not measured. `minwm bench --model {copy} --json bench.json` does" in card(copy)
    assert main(["bench", "--model", str(copy), "--json", str(copy / "bench.json"), "--repeats", "1"]) == 0
    found = json.loads((copy / "bench.json").read_text())
    speed = card(copy).partition("## Speed")[2].partition("## Use")[0]
    cells = row(speed, f"{found['versions']['cpu']}, 1 used")
    assert cells[1] == torch.__version__ and cells[-1] == found["date"][:10] and cells[-2] == ""
    assert float(cells[2].replace(",", "")) == pytest.approx(found["fps"], rel=0.01)
    assert float(cells[3].replace(",", "")) == pytest.approx(found["chunk_ms"], rel=0.01)
    gpu = found | {"memory_gb": 1.25, "versions": found["versions"] | {"gpu": "H200"}}
    (copy / "gpu.json").write_text(json.dumps(gpu))
    (copy / "other.json").write_text(json.dumps(found | {"passes": 100, "versions": {"gpu": "other", "torch": ""}}))
    assert row(card(copy), "H200")[-2] == "1.25" and "| other |" not in card(copy)


@pytest.mark.parametrize(("name", "made"), [("dmd", "frames"), ("camera", "video")])
def test_what_the_card_tells_to_do_works(
    name: str, made: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image("first.png", np.zeros((40, 40, 3), np.uint8))
    text, names = card(project / name), {}
    (code,), (shell,) = (re.findall(f"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "sh"))
    assert len(code.splitlines()) <= 6
    exec(code, names)
    assert names[made].shape == ({"dmd": 8, "camera": 17}[name], 32, 32, 3)
    generate, *play = shell.splitlines()
    assert main(shlex.split(generate)[1:]) == 0 and (tmp_path / "walk.mp4").exists()
    assert play == ([f"minwm play --model {project / name}"] if name == "dmd" else [])
    assert all(callable(parse(shlex.split(line)[1:])) for line in play)


def test_words_and_licence_of_the_user_stay(copy: Path) -> None:
    path = copy / CARD
    with path.open("a") as file:
        file.write("\nWith thanks to everyone.\n")
    write_card(copy, "me/walker", "cc-by-4.0")
    once = path.read_text()
    assert once.startswith(card(copy, "me/walker", "cc-by-4.0"))
    assert metadata(once)["license"] == "cc-by-4.0" and "Weights: cc-by-4.0." in once
    write_card(copy, "me/walker")
    assert path.read_text() == once and once.endswith("again. -->\nWith thanks to everyone.\n")
    path.write_text("# My own\n")
    write_card(copy)
    assert path.read_text().endswith("again. -->\n# My own\n")
    with pytest.raises(HubError, match=r"'Apache 2\.0' is no licence by its form"):
        card(copy, licence="Apache 2.0")


# ---------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, project: Path) -> list[tuple[str, Any]]:
    """What is asked of the Hub, which has one model and takes everything."""
    seen: list[tuple[str, Any]] = []

    def answer(name: str, result: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, args + tuple(kwargs.items())))
            return result

        monkeypatch.setattr(hub, name, call)

    answer("hf_hub_download", str(project / "dmd" / "model.json"))
    answer("snapshot_download", str(project / "dmd"))
    answer("create_repo", "https://huggingface.co/me/walker")
    answer("upload_folder", None)
    answer("model_info", type("Info", (), {"private": False}))
    return seen


def test_a_folder_is_loaded_without_the_hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(project.parent)
    for name in (project / "dmd", str(project / "dmd"), f"{project.name}/dmd"):  # the last has the form of a Hub id
        model = minwm.load(name)
        assert model.config == MODEL and not any(p.requires_grad for p in model.net.parameters())
    with pytest.raises(MissingExtraError, match=r"pip install 'minwm\[pretrained\]'"):
        load("me/walker")


@pytest.mark.parametrize(("name", "revision"), [("me/walker", None), ("me/walker@v1.0", "v1.0")])
def test_only_model_files_are_fetched(
    name: str, revision: str | None, calls: list[tuple[str, Any]], project: Path
) -> None:
    assert load(name).config == MODEL
    rev = ("revision", revision)
    assert calls == [
        ("hf_hub_download", ("me/walker", "model.json", rev)),
        ("snapshot_download", ("me/walker", rev, ("allow_patterns", list(FILES)), ("local_files_only", False))),
    ]
    assert resolve(Path(name)) == project / "dmd"


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such", "../me/walker", "me/", "me/wal ker", "@v1"])
def test_what_is_neither_folder_nor_hub_id_is_named(name: str, calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(HubError, match=re.escape(f"{name} is no folder, and no model of the Hub by its form")):
        load(name)
    assert not calls


ERRORS = {
    "no such file": known.LocalEntryNotFoundError,
    "no way to the Hub": known.HfHubHTTPError.__bases__[0],  # of the HTTP library, which depends on the version
    "no name that it allows": known.HFValidationError,
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_what_the_hub_refuses_is_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("no\n answer")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    monkeypatch.setattr(hub, "create_repo", refuse)
    assert main(["eval", "--model", "runs/typo"]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: runs/typo is no folder here, and no model that the Hub gives: no answer\n", told)
    assert main(["push", "me/walker", "--model", str(copy)]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: me/walker is not written \(`hf auth login` or HF_TOKEN .*\): no answer\n", told)


def test_push_sends_the_model_and_its_card(
    copy: Path, calls: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "me/walker", "--model", str(copy), "--licence", "apache-2.0"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/walker\n"
    (_, made), (_, sent) = calls
    assert made == ("me/walker", ("private", None), ("exist_ok", True))
    sent = dict(sent)
    assert sent["repo_id"] == "me/walker" and sent["folder_path"] == copy and "token" not in sent
    files = [str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()]
    chosen = list(hub.utils.filter_repo_objects(files, allow_patterns=sent["allow_patterns"]))
    assert sorted(chosen) == sorted([*FILES, CARD]) and len(files) > 8
    text = (copy / CARD).read_text()
    assert metadata(text)["license"] == "apache-2.0" and 'minwm.load("me/walker")' in text and "# walker" in text
    assert str(copy) not in text and str(copy.parents[1]) not in text, "paths of this machine stay here"


def test_a_private_push_never_goes_to_a_public_repository(
    copy: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="me/walker exists and is public"):
        push(copy, "me/walker", private=True)
    assert [name for name, _ in calls] == ["create_repo", "model_info"]
    monkeypatch.setattr(hub, "model_info", lambda _: type("Info", (), {"private": True}))
    push(copy, "me/walker", private=True)
    assert calls[-1][0] == "upload_folder" and ("private", True) in calls[-2][1]


def test_what_is_no_whole_model_is_not_pushed(copy: Path, project: Path, calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(HubError, match="walker is no name of a repository; give USER/NAME"):
        push(copy, "walker")
    with pytest.raises(CheckpointError, match=r"holds no model \(no model\.json\)"):
        push(project / "codec", "me/walker")
    config = replace(MODEL, network=replace(NETWORK, layers=2))
    (copy / "model.json").write_text(dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is of another architecture than Wan: 29 missing"):
        push(copy, "me/walker")
    (copy / "model.json").write_text(dumps(MODEL))
    (copy / "codec.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"codec\.safetensors does not exist"):
        push(copy, "me/walker")
    assert not calls


def test_an_encoder_that_only_this_machine_has_is_not_pushed(adopted: Path, calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(HubError, match=r"names weights/Wan as text\.source, which nobody else has; .* hf://Wan-AI/"):
        push(adopted, "me/walker")
    assert not calls
    config = load_config(adopted)
    elsewhere = replace(config, text=Umt5Text(source="hf://Wan-AI/Wan2.1-T2V-1.3B", dim=8))
    (adopted / "model.json").write_text(dumps(elsewhere))
    push(adopted, "me/walker")
    assert calls[-1][0] == "upload_folder"


def test_a_model_goes_to_a_folder_and_to_the_hub_and_comes_back(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sent = minwm.from_pretrained(project / "dmd"), tmp_path / "sent"
    minwm.save_pretrained(model, tmp_path / "saved", licence="apache-2.0")
    assert metadata((tmp_path / "saved" / CARD).read_text())["license"] == "apache-2.0"
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: "https://huggingface.co/me/walker")
    monkeypatch.setattr(hub, "upload_folder", lambda folder_path, **_: shutil.copytree(folder_path, sent))
    assert minwm.push_to_hub(model, "me/walker") == "https://huggingface.co/me/walker"
    for folder in (tmp_path / "saved", sent):
        found = minwm.load(folder)
        assert found.config == model.config
        pairs = zip(found.net.state_dict().items(), model.net.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_half_precision_is_stated(tmp_path: Path) -> None:
    net: nn.Module = NETWORK.build().to(torch.bfloat16)
    save_model(tmp_path, MODEL, net, MODEL.codec.build())
    assert "parameters (bfloat16)" in card(tmp_path)
