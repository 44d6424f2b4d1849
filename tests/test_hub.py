"""Models on the Hub, without a network: what would be fetched and sent."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import pytest
import torch
from huggingface_hub import errors
from projects import MODEL, NETWORK, adopting, copied, metadata, trained_once

import minwm
from minwm.cli import main
from minwm.core.config import dumps
from minwm.core.hub import HubError
from minwm.core.weights import CheckpointError
from minwm.families.wan.text import Umt5Text
from minwm.store.card import CARD
from minwm.store.folder import load_config
from minwm.store.hub import FILES, load, push, resolve

project = pytest.fixture(trained_once, scope="module")
copy = pytest.fixture(copied)
adopted = pytest.fixture(adopting)


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


def test_a_folder_is_loaded_without_the_hub(
    project: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.parent)
    for name in (project / "dmd", str(project / "dmd"), f"{project.name}/dmd"):  # the last has the form of a Hub id
        model = minwm.load(name)
        assert model.config == MODEL and not any(p.requires_grad for p in model.net.parameters())
    assert not calls


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
    "no such file": errors.LocalEntryNotFoundError,
    "no way to the Hub": errors.HfHubHTTPError.__bases__[0],  # of the HTTP library, which depends on the version
    "no name that it allows": errors.HFValidationError,
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
    assert main(["push", "me/walker", "--model", str(copy), "--license", "apache-2.0"]) == 0
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
    minwm.save_pretrained(model, tmp_path / "saved", license="apache-2.0")
    assert metadata((tmp_path / "saved" / CARD).read_text())["license"] == "apache-2.0"
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: "https://huggingface.co/me/walker")
    monkeypatch.setattr(hub, "upload_folder", lambda folder_path, **_: shutil.copytree(folder_path, sent))
    assert minwm.push_to_hub(model, "me/walker") == "https://huggingface.co/me/walker"
    for folder in (tmp_path / "saved", sent):
        found = minwm.load(folder)
        assert found.config == model.config
        pairs = zip(found.net.state_dict().items(), model.net.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
