"""Write what `make gpu` measured into docs/performance.md, and its files to results/gpu.

python benchmarks/performance_page.py runs/gpu
"""

import argparse
import shutil
from pathlib import Path

from minwm.bench.parts import GPU, GPU_REFERENCE
from minwm.bench.selftest import finished, plan_table, reference_table, target_table
from minwm.core.config import UserError
from minwm.core.files import read_json, write_text

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "results" / "gpu"
PARTS = (*GPU, *GPU_REFERENCE)
BEGIN, END = "<!-- make gpu: begin -->\n", "<!-- make gpu: end -->\n"


def section(folder: Path) -> str:
    """Tables of the parts that have succeeded in a folder, and on which machine."""
    outcomes = finished(PARTS, folder)
    files = [read_json(folder / f"{outcome.part.name}.json") for outcome in outcomes if outcome.state == "done"]
    machines = dict.fromkeys(
        f"Measured at commit {x['commit']} on {x['versions'].get('gpu')}, PyTorch {x['versions']['torch']}."
        for x in files
    )
    tables = target_table(outcomes), reference_table(outcomes), plan_table(outcomes)
    return "\n\n".join(filter(None, [*machines, *tables])) + "\n"


def with_section(page: str, text: str) -> str:
    """The page with the text between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the page has no section between {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="what minwm selftest --gpu wrote")
    folder = parser.parse_args().folder
    if folder != RESULTS:
        RESULTS.mkdir(exist_ok=True)
        for outcome in finished(PARTS, folder):
            if outcome.state == "done":
                shutil.copy(folder / f"{outcome.part.name}.json", RESULTS)
    write_text(PAGE, with_section(PAGE.read_text(), section(RESULTS)))


if __name__ == "__main__":
    main()
