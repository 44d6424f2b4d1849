"""The site is docs/, with README.md as its home page and with the files outside docs/ that a page links to.

Links in the sources are those that work on GitHub; `on_page_markdown` makes them relative to the site.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
README = ROOT / "README.md"
LINK = re.compile(r"(?<=\]\()[\w./-]+")
"""The path in a Markdown link or image; addresses with a scheme are cut off at their colon and name no file."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and the files outside docs/ that it or a page links to."""
    pages = [README, *DOCS.glob("*.md")]
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())}
    for path in sorted({README, *linked}):
        if path.is_file() and not path.is_relative_to(DOCS):
            files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite links to files of the repository into links within the site."""
    if page.file.abs_src_path is None:  # made by a plugin
        return markdown
    source = Path(page.file.abs_src_path).parent

    def rewrite(link: re.Match[str]) -> str:
        target = (source / link[0]).resolve()
        return os.path.relpath(_uri(target), Path(page.file.src_uri).parent) if target.is_file() else link[0]

    return LINK.sub(rewrite, markdown)


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path == README:
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
