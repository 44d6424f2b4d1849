"""Files from and to the Hugging Face Hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from minwm.core.config import UserError
from minwm.core.files import write_text

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
    import huggingface_hub as hub

    with _explained(f"{repo} is no folder here, and no model that the Hub gives"):
        if first:
            hub.hf_hub_download(repo, first, revision=revision)
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[*patterns], local_files_only=local))


def upload(folder: Path, repo: str, patterns: Sequence[str], message: str, private: bool) -> str:
    """Upload the files of a folder that match `patterns`, creating the repository if needed; returns its URL.

    Raises HubError if the Hub refuses, and before any upload if `private` is asked for a public repository.
    """
    import huggingface_hub as hub

    with _explained(f"{repo} is not written (`hf auth login` or HF_TOKEN says who you are)"):
        address = hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise HubError(f"{repo} exists and is public; make it private in its settings, or give another name")
        hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*patterns], commit_message=message)
    return str(address)


def render_card(template: Path, metadata: Mapping[str, Any], **values: Any) -> str:
    """A model card: a Jinja template with `values`, and YAML front matter with what is not None of `metadata`.

    Raises ValueError if the values lack something that the template names.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import UndefinedError

    try:
        return str(ModelCard.from_template(ModelCardData(**metadata), template_path=str(template), **values))
    except UndefinedError as error:
        raise ValueError(str(error)) from error


def write_eval_results(path: Path, dataset: str, scores: Mapping[str, float]) -> None:
    """Scores by task of a benchmark, as the Hub reads them from `.eval_results/*.yaml` in a repository of a model."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    entries = [EvalResultEntry(dataset, task, score) for task, score in scores.items()]
    write_text(path, yaml_dump(eval_result_entries_to_yaml(entries)))


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turn errors of the Hub and of the network into HubError: `problem`, then the error in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    http_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # of its HTTP library
    try:
        yield
    except (OSError, ValueError, *http_errors) as error:
        raise HubError(f"{problem}: {' '.join(str(error).split()) or type(error).__name__}") from error
