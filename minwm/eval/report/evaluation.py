"""The page of `minwm eval`."""

from collections.abc import Mapping
from pathlib import Path

from minwm.bench.target import Target
from minwm.eval.report.charts import duration
from minwm.eval.report.gallery import examples, gallery
from minwm.eval.report.page import caveats, commands, write_page
from minwm.eval.report.sections import evaluation_sections, target_section, tiles
from minwm.eval.run import Evaluation

CAVEATS = (
    "Camera following is measured on pixels, by aligning them to the known scene, and only where the first frame saw "
    "it. What a model invents elsewhere counts in PSNR, which it cannot keep high, but not in following.",
    "LPIPS is left out: it needs the weights of a network trained on photographs, which tell little about rendered "
    "scenes.",
)


def write_evaluation(
    path: Path, result: Evaluation, targets: Mapping[str, Mapping[Target, float]], facts: Mapping[str, str], line: str
) -> Path:
    """Write the page and return its path. `line` is the command that made the numbers."""
    seconds = sum(row.eval_seconds for row in result.rows.values())
    return write_page(
        path,
        "minwm eval: " + ", ".join(result.models),
        "What the models make of scenes that no stage has seen, beside the truth and three other baselines.",
        facts,
        [(duration(seconds), "whole run"), *tiles(result.rows)],
        [
            target_section(targets),
            gallery(examples(result, [*result.rows]), result.config.motion.fps),
            *evaluation_sections(result.rows),
            commands({"These numbers again": line}),
            caveats(CAVEATS),
        ],
    )
