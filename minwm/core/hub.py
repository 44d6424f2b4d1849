"""Files from and to the Hugging Face Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minwm.core.config import UserError
from minwm.core.runtime import require

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""A repository name, USER/NAME."""
SCHEME = "hf://"
"""What a path on the Hub begins with: hf://USER/NAME."""


class HubError(UserError):
    """A repository cannot be downloaded from the Hub or written to it."""


def fetch(
    repo: str, patterns: Sequence[str], revision: str | None = None, *, first: str | None = None, local: bool = False
) -> Path:
    """Download the files of a repository that match `patterns`; returns the local folder. Raises HubError.

    `first` is downloaded before the rest: a repository without that file is refused. `local` uses the cache alone.
    """
    hub = require("huggingface_hub", "pretrained")
    with _explained(f"{repo} is no folder here, and no model that the Hub gives"):
        if first:
            hub.hf_hub_download(repo, first, revision=revision)
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*patterns], local_files_only=local))


def upload(folder: Path, repo: str, patterns: Sequence[str], message: str, private: bool) -> str:
    """Upload the files of a folder that match `patterns`, creating the repository if needed; returns its URL.

    Raises HubError if the Hub refuses, and before any upload if `private` is asked for a public repository.
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
    """Turn errors of the Hub and of the network into HubError: `problem`, then the error in one line."""
    refused = require("huggingface_hub.errors", "pretrained").HfHubHTTPError
    try:
        yield
    except (OSError, ValueError, *refused.__bases__) as error:  # its bases: the errors of its HTTP library
        raise HubError(f"{problem}: {' '.join(str(error).split()) or type(error).__name__}") from error
