"""A report as one HTML file with its videos, charts and tables inside, readable without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from minwm.core.files import write_text
from minwm.eval.cases import BASELINES
from minwm.eval.stats import Interval


@dataclass(frozen=True)
class Section:
    """A part of the page; left out if its `html` is empty."""

    key: str
    title: str
    html: str


def write_page(
    path: Path,
    title: str,
    sentence: str,
    facts: Mapping[str, str],
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
) -> Path:
    """Write the page in one piece and return its path. `facts` are shown as they are; `tiles` are the few numbers worth
    knowing, each with what it is."""
    shown = [section for section in sections if section.html]
    template = Template(files("minwm.eval.report").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        sentence=escape(sentence),
        facts=facts_list(facts),
        tiles="".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles),
        nav="".join(f'<a href="#{s.key}">{s.title}</a>' for s in shown),
        sections="".join(f'<section id="{s.key}"><h2>{s.title}</h2>{s.html}</section>' for s in shown),
    )
    write_text(path, page)
    return path


def facts_list(facts: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]], kind: str = "") -> str:
    """Rows of cells (HTML) by name; those of baselines are set apart. `kind` is a class of the style sheet."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(
        f"<tr{' class=baseline' * (name in BASELINES)}><th>{escape(name)}</th>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows.items()
    )
    return f'<div class="wide"><table class="{kind}"><tr>{titles}</tr>{body}</table></div>'


def commands(lines: Mapping[str, str]) -> Section:
    """Commands by what they do."""
    html = "".join(f"<p>{escape(what)}</p><pre><code>{escape(line)}</code></pre>" for what, line in lines.items())
    return Section("reproduce", "Run it again, change one thing", html)


def caveats(texts: Sequence[str]) -> Section:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return Section("caveats", "What to keep in mind", f"<ul>{items}</ul>")


def interval(x: Interval | None, digits: int) -> str:
    """A value with its interval, or a dash."""
    if x is None:
        return fixed(None, digits)
    return f"{fixed(x.value, digits)} <small>[{fixed(x.low, digits)}, {fixed(x.high, digits)}]</small>"


def fixed(value: float | None, digits: int) -> str:
    """Fixed digits with a real minus sign, and never a negative zero; a dash for None."""
    return "&ndash;" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "&minus;")
