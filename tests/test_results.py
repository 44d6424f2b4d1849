"""The numbers in the README are those of the committed results."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELS = {"camera": "bidirectional, 50 steps", "ar": "autoregressive, 50 steps", "dmd": "autoregressive, 4 steps"}


def table() -> str:
    """The README's rows, from the newest committed run of the demo."""
    results = json.loads((ROOT / "results" / "demo-2cpu.json").read_text())
    rows = []
    for name, what in MODELS.items():
        row = results[name]
        follow, bench, quality = row["follow"], row["bench"], row["quality"]
        score = follow["score"]
        rows.append(
            f"| {name}: {what} | {bench['passes']} | {bench['first_ms']:.0f} | {bench['fps']:.0f} "
            f"| {score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}] "
            f"| {100 * follow['retrieval']['value']:.0f}% | {quality['psnr']:.1f} |"
        )
    for name in ("static camera", "another clip's camera", "codec"):
        follow, quality = results[name]["follow"], results[name]["quality"]
        rows.append(
            f"| *{name}* | | | | {follow['score']['value']:.2f} "
            f"| {100 * follow['retrieval']['value']:.0f}% | {quality['psnr']:.1f} |"
        )
    return "\n".join(rows)


def test_the_readme_shows_the_committed_results() -> None:
    assert table() in (ROOT / "README.md").read_text()
