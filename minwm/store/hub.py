"""Models on the Hugging Face Hub: a folder or USER/NAME in, model files and their card out."""

import tempfile
from pathlib import Path

import minwm
from minwm.core.hub import REPO, SCHEME, HubError, fetch, upload
from minwm.store.card import CARD, write_card
from minwm.store.folder import FILES, load_config, load_model, save_model
from minwm.store.layouts import FAMILIES
from minwm.store.model import Model


def load(name: str | Path) -> Model:
    """The model in a folder, or on the Hub; on the CPU, in float32; `.ready()` puts it where it runs.

    Raises HubError if there is none of that name, CheckpointError if its files do not belong together.
    """
    return load_model(resolve(name))


def resolve(name: str | Path) -> Path:
    """The folder of that name, else the local copy of the Hub's USER/NAME or USER/NAME@REVISION.

    Only the files of a model folder are downloaded. Raises HubError.
    """
    folder = Path(name)
    if folder.exists():
        return folder
    repo, _, revision = str(name).partition("@")
    if not REPO.fullmatch(repo):
        raise HubError(f"{name} is no folder, and no model of the Hub by its form (USER/NAME or USER/NAME@REVISION)")
    return fetch(repo, FILES, revision or None, first=FILES[0])  # others keep gigabytes by our names


from_pretrained = load


def save_pretrained(model: Model, folder: Path, license: str | None = None) -> None:
    """Write a model folder and its card; `load` and `push` read it."""
    save_model(folder, model.config, model.net, model.codec)
    write_card(folder, license=license)


def push_to_hub(model: Model, repo: str, *, private: bool = False, license: str | None = None) -> str:
    """`push` of a model in memory: its card has no training history and no measurements."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder), license)
        return push(Path(folder), repo, private=private, license=license)


def push(folder: Path, repo: str, *, private: bool = False, license: str | None = None) -> str:
    """Write the card of a model folder, and put both into a repository of the Hub; returns its address.

    A new repository is private if asked, else as the account's default is. `license` is an identifier of the Hub, such
    as apache-2.0; without one, that of the existing card stays. Credentials are HF_TOKEN or those of `hf auth login`.
    Raises CheckpointError if the folder is no whole model; HubError if the Hub refuses, if `private` is asked for a
    public repository, or if the text encoder is a folder of this machine: then nothing is uploaded.
    """
    if not REPO.fullmatch(repo):
        raise HubError(f"{repo} is no name of a repository; give USER/NAME")
    config = load_config(folder)
    source = config.text.source
    if source and not source.startswith(SCHEME):
        example, *_ = FAMILIES[config.network.kind].RELEASES.values()
        raise HubError(
            f"{folder}/model.json names {source} as text.source, which nobody else has; write there the "
            f"repository of the Hub that it came from, such as {SCHEME}{example.repo}"
        )
    write_card(folder, repo, license)
    return upload(folder, repo, [*FILES, CARD], f"Model and card, by minwm {minwm.__version__}", private)
