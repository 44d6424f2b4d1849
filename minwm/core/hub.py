"""Files from and to the Hugging Face Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minwm.core.config import UserError
from minwm.core.runtime import require

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""USER/NAME."""
SCHEME = "hf://"
"""What a path on the Hub begins with: hf://USER/NAME."""


class HubError(UserError):
    """A model is neither here nor on the Hub, or the Hub does not take it."""


def fetch(
    repo: str, patterns: Sequence[str], revision: str | None = None, *, first: str | None = None, local: bool = False
) -> Path:
    """The local copy of what `patterns` name in a repository; `local`: as it came before, without asking the Hub.

    The file `first` is asked for by itself: a repository without it is not fetched. Raises HubError.
    """
    hub = require("huggingface_hub", "pretrained")
    with _explained(f"{repo} is no folder here, and no model that the Hub gives"):
        if first:
            hub.hf_hub_download(repo, first, revision=revision)
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*patterns], local_files_only=local))


def upload(folder: Path, repo: str, patterns: Sequence[str], message: str, private: bool) -> str:
    """Put what `patterns` name in a folder into a repository, made if need be; returns its address.

    Raises HubError if the Hub refuses, or shows to all what was to be private: then nothing is uploaded.
    """
    hub = require("huggingface_hub", "pretrained")
    with _explained(f"{repo} is not written (`hf auth login` or HF_TOKEN says who you are)"):
        address = hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise HubError(f"{repo} exists and is public; make it private in its settings, or give another name")
        hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*patterns], commit_message=message)
    return str(address)


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """What the Hub or the way to it says, as one line after `problem`."""
    refused = require("huggingface_hub.errors", "pretrained").HfHubHTTPError
    try:
        yield
    except (OSError, ValueError, *refused.__bases__) as error:  # its bases: the errors of its HTTP library
        raise HubError(f"{problem}: {' '.join(str(error).split()) or type(error).__name__}") from error
