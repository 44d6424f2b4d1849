"""Cards of models: they say what is known, and no more."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from projects import MODEL, NETWORK, adopting, copied, metadata, row, trained_once
from torch import nn

from minwm.cli import main
from minwm.cli.base import parse
from minwm.core.hub import HubError
from minwm.core.media import write_image
from minwm.families.wan.convert import RELEASES
from minwm.families.wan.transformer import WanConfig
from minwm.store.card import CARD, card, write_card
from minwm.store.folder import ORIGIN, load_model, save_model
from minwm.store.hub import FILES

project = pytest.fixture(trained_once, scope="module")
copy = pytest.fixture(copied)
adopted = pytest.fixture(adopting)


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
    average = "average, decay 0.99"
    assert codec[2:] == ["fresh weights", "1", "6", "0.0003", average, "float32", "6 (procedural)", "CC0-1.0"]
    clips = json.loads((project / "latents" / "manifest.json").read_text())["counts"]["train"]
    assert camera[1:4] == ["bidirectional", "fresh weights, codec `codec`", "1"]
    assert camera[6:] == [average, "float32", f"{clips} (procedural)", "CC0-1.0"]
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


def test_only_a_published_size_has_a_base(adopted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RELEASES, "wan2.1-1.3b", replace(RELEASES["wan2.1-1.3b"], config=WanConfig()))
    (adopted / ORIGIN).unlink()
    text = card(adopted)
    assert "base_model" not in text and "no record of a training with minwm." in text


def test_a_model_made_from_a_release_names_it(
    project: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(NETWORK, camera="none")
    monkeypatch.setitem(RELEASES, "wan2.1-14b", replace(RELEASES["wan2.1-14b"], config=plain))
    assert "base_model" not in metadata(card(copy)), "it began with fresh weights, whatever its size"
    base = tmp_path / "base"
    base.mkdir()
    for name in FILES:
        shutil.copy(project / "camera" / name, base)
    path = copy / "run.json"
    path.write_text(path.read_text().replace(str(project / "camera"), str(base)))
    text = card(copy)
    assert metadata(text)["base_model"] == "Wan-AI/Wan2.1-T2V-14B"
    assert "- Wan-AI/Wan2.1-T2V-14B, from which they come: apache-2.0.\n" in text
    assert "`base`, with which it began, has no record of a training with minwm; its sizes are those of" in text


def test_speed_is_what_bench_measured(copy: Path) -> None:
    assert f"Not measured. `minwm bench --model {copy} --json bench.json` does" in card(copy)
    assert main(["bench", "--model", str(copy), "--json", str(copy / "bench.json"), "--repeats", "1"]) == 0
    found = json.loads((copy / "bench.json").read_text())
    speed = card(copy).partition("## Speed")[2].partition("## Use")[0]
    cells = row(speed, f"{found['versions']['cpu']}, 1 used")
    assert cells[1] == torch.__version__ and cells[-1] == found["date"][:10] and cells[-2] == ""
    assert float(cells[2].replace(",", "")) == pytest.approx(found["fps"], rel=0.01)
    assert float(cells[3].replace(",", "")) == pytest.approx(found["chunk"]["median_ms"], rel=0.01)
    gpu = found | {"allocated_gb": 1.25, "versions": found["versions"] | {"gpu": "H200"}}
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
    with pytest.raises(HubError, match=r"license='Apache 2\.0': give an identifier"):
        card(copy, license="Apache 2.0")


def test_half_precision_is_stated(tmp_path: Path) -> None:
    net: nn.Module = NETWORK.build().to(torch.bfloat16)
    save_model(tmp_path, MODEL, net, MODEL.codec.build())
    assert "parameters (bfloat16)" in card(tmp_path)
