"""What README, docs/world.md and docs/place.md say of the models that come with the package is what was measured."""

import json
from pathlib import Path

from world_record import draw as draw_training

ROOT = Path(__file__).parents[1]


def collapsed(routes: dict[str, dict]) -> str:
    """How many of all streams."""
    ends = [second for row in routes.values() for second in row["collapsed"]]
    return f"{sum(second is not None for second in ends)} of {len(ends)}"


WAYS = {
    "camera": "bidirectional",
    "ar": "autoregressive",
    "ode": "few steps",
    "consistency": "few steps",
    "dmd": "few steps",
}


def stages_table(name: str, times: bool = True) -> str:
    """The rows of docs/world.md and docs/place.md: the stages of a model that comes with the package, and baselines.
    `times` of a machine that did nothing else."""
    results = json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]
    head = ["", "passes", "first chunk", "times as fast", "camera score [95%]", "turn missed", "direction missed"]
    seconds = len(next(iter(results.values()))["quality"]["psnr_at"])
    head += ["PSNR after 1 s", f"{seconds} s", "long rollouts that collapsed"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    slowest = next(iter(results.values()))["bench"]["first_chunk"]["median_ms"]
    for name, row in results.items():
        if name == "ground truth":
            continue
        bench, score, motion = row["bench"], row["follow"]["score"], row["follow"]["motion"]["overall"]
        cells = [f"*{name}*", "", "", ""]
        if bench:
            first = bench["first_chunk"]["median_ms"]
            cells = [f"{name}: {WAYS[name]}", f"{bench['passes']}", f"{first:.0f} ms", f"{slowest / first:.1f}"]
        cells.append(f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]")
        cells.append(f"{100 * motion['turn_error']['value']:.0f} %")
        cells.append(f"{motion['direction_deg']['value']:.0f}°")
        cells += [f"{row['quality']['psnr_at'][i]['value']:.1f} dB" for i in (0, -1)]
        cells.append(collapsed(row["drift"]) if row["drift"] else "")
        rows.append(cells)
    if not times:
        rows = [[*cells[:2], *cells[4:-1]] for cells in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_page_on_the_place_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "place.md").read_text()
    far = {
        "`foundation-1`, trained on neighbours": "place-neighbours",
        "`foundation-2`, on far views": "place-foundation-2",
        "`foundation-3`, the same after 12,000 steps": "place-foundation",
        "`ar-5`": "place-ar",
    }
    for label, name in far.items():
        views = json.loads((ROOT / "results" / f"{name}.json").read_text())["far_views"]
        assert f"| {label} | {' | '.join(f'{value:.1f}' for value in views.values())} |" in page
    found = json.loads((ROOT / "results" / "place-ar.json").read_text())
    rows = {"8 steps |": found["model"], "has them |": found["few_steps"], "codec alone |": found["codec"]}
    students = {
        name: json.loads((ROOT / "results" / f"{name}.json").read_text())
        for name in (
            *("place-dmd-1", "place-dmd-2", "place-dmd-2-views", "place-dmd-3", "place-dmd-4", "place-dmd-3-steps"),
            *("place-dmd-4-views", "place-dmd-5", "place-ar-7", "place-dmd-6", "place-dmd"),
        )
    }
    rows |= {"`dmd-1`, of the same kind, 4 steps |": students["place-dmd-1"]["model"]}
    rows |= {"`dmd-2`, with 560 views, 4 steps |": students["place-dmd-2"]["model"]}
    rows |= {"`dmd-2`, streamed as `dmd-3` is |": students["place-dmd-2-views"]["model"]}
    rows |= {"`dmd-3`, trained with 4,160 views and a window of two |": students["place-dmd-3"]["model"]}
    rows |= {"`dmd-4`, with a regression, 2 steps |": students["place-dmd-4"]["model"]}
    rows |= {"`dmd-4`, 3 steps |": students["place-dmd-3-steps"]["model"]}
    rows |= {"`dmd-4`, with four of 66,432 views, 2 steps |": students["place-dmd-4-views"]["model"]}
    rows |= {"`dmd-5`, streamed with four of 262,272, 2 steps |": students["place-dmd-5"]["model"]}
    rows |= {"`ar-7`, with six of 393,408 views, 8 steps |": students["place-ar-7"]["model"]}
    rows |= {"`ar-7`, 2 steps |": students["place-ar-7"]["few_steps"]}
    rows |= {"`dmd-6`, 2 steps |": students["place-dmd-6"]["model"]}
    rows |= {"`dmd-7`, with seven views, 2 steps |": students["place-dmd"]["model"]}
    rows |= {"the codec of `dmd-6` alone |": students["place-dmd-6"]["codec"]}
    for label, row in rows.items():
        after = " / ".join(f"{value:.1f}" for value in row["psnr_at_seconds"])
        assert f"{label} {after} dB | {100 * row['sharpness']:.0f} % |" in page
    for name in ("place-apart", "place-dmd-3-2-steps"):
        row = json.loads((ROOT / "results" / f"{name}.json").read_text())["model"]
        after = " / ".join(f"{value:.1f}" for value in row["psnr_at_seconds"])
        assert f"{after} dB at {100 * row['sharpness']:.0f} %" in " ".join(page.split())
    for name, count in (("place-dmd-7-six", "six"), ("place-dmd-7-eight", "eight")):
        row = json.loads((ROOT / "results" / f"{name}.json").read_text())["model"]
        said = f"{row['psnr']:.1f} dB at {100 * row['sharpness']:.0f} % of the gradient energy with {count}"
        assert said in " ".join(page.split())
    assert stages_table("place", times=False) in page and place_targets() in page
    minutes = json.loads((ROOT / "results" / "place-minutes.json").read_text())["rows"]["dmd"]["drift"]
    sharp = minutes["random walk"]["sharpness"]
    fifth, mean = 100 * sharp[4], 100 * sum(sharp) / len(sharp)
    assert f"{fifth:.0f} % of the truth's in their fifth second, and {mean:.0f} % over" in " ".join(page.split())
    for name, label in (("place-dmd", "it has"), ("place-dmd-2", "had"), ("place-dmd-2-views", "to")):
        still = " / ".join(f"{students[name]['still'][second]:.1f}" for second in ("1", "5", "20"))
        assert f"{label} {still} dB" in " ".join(page.split())
    first, *_, fifth = students["place-dmd-1"]["model"]["psnr_at_seconds"]
    assert f"fell from {first:.1f} to {fifth:.1f} dB within five seconds" in " ".join(page.split())
    before = json.loads((ROOT / "results" / "place-560-views.json").read_text())["rows"]["dmd"]["follow"]["score"]
    assert f"its score was {before['value']:.2f}" in " ".join(page.split())
    runs = json.loads((ROOT / "results" / "place-training.json").read_text())
    steps = {name: run["steps"] for name, run in runs.items()}
    said = " ".join(page.split())
    for name in ("foundation-1", "foundation-2", "camera-1", "ar-5", "consistency-1", "dmd-1", "ar-6", "camera-3"):
        assert f"`{name}` ({steps[name]:,}" in said
    before, last = (dict(runs["foundation-3"]["held_out_loss"])[step] for step in (4900, 12000))
    assert f"(from {before:.3f} to {last:.3f})" in said


def place_targets() -> str:
    """The same page: what is asked of the student, and what it reaches."""
    rows = json.loads((ROOT / "results" / "place.json").read_text())["rows"]
    minutes = json.loads((ROOT / "results" / "place-minutes.json").read_text())["rows"]["dmd"]["drift"]
    walked, turn = minutes["random walk"]["psnr"][59], minutes["turn around"]
    turned = turn["first_look"]["value"] - turn["psnr"][0]["value"]
    motion = rows["dmd"]["follow"]["motion"]["overall"]
    play = json.loads((ROOT / "results" / "place-play.json").read_text())["minwm/assets/place/dmd"]
    walks = json.loads((ROOT / "results" / "place-dmd.json").read_text())["model"]
    after, teacher = ([x["value"] for x in rows[name]["quality"]["psnr_at"]] for name in ("dmd", "ar"))
    return "\n".join(
        (
            "| | asked | `dmd` |",
            "|---|--:|--:|",
            f"| yaw and pitch missed, median over 5 s | 10 % | {100 * motion['turn_error']['value']:.0f} % |",
            f"| direction of movement missed, median | 10° | {motion['direction_deg']['value']:.0f}° |",
            f"| PSNR to the truth after 1 s | 25 dB | {after[0]:.1f} dB |",
            f"| after 5 s | 23 dB | {after[4]:.1f} dB |",
            f"| after 60 s of a random walk | 20 dB | {walked['value']:.1f} dB |",
            f"| a full turn to the first look, ahead of the same streams after 1 s | -1 dB | {turned:+.1f} dB |",
            f"| minute-long streams that collapsed | 0 | {collapsed(minutes)} |",
            f"| gradient energy, of the truth's, on the 12 walks below | 80 % | {100 * walks['sharpness']:.0f} % |",
            f"| PSNR after 1 s, ahead of its multi-step teacher `ar` | -1 dB | {after[0] - teacher[0]:+.1f} dB |",
            f"| frames per second in the browser, 2 cores | 16 | {play['fps']:.1f} |",
            f"| key to picture there, median | 300 ms | {play['input_to_photon_p50_ms']:.0f} ms |",
        )
    )


def targets_table() -> str:
    """The same page: what was asked of the student, beside it, its first second and its bidirectional teacher."""
    rows = json.loads((ROOT / "results" / "world-64.json").read_text())["rows"]
    motion = [rows[name]["follow"]["motion"] for name in ("dmd", "camera")]
    seen = motion[0]["overall"], motion[0]["per_second"][0], motion[1]["overall"]
    turns = (f"{100 * x['turn_error']['value']:.0f} %" for x in seen)
    directions = (f"{x['direction_deg']['value']:.0f}°" for x in seen)
    after_1_s = [rows[name]["quality"]["psnr_at"][0]["value"] for name in ("dmd", "ar")]
    return "\n".join(
        (
            "| | asked | `dmd` | its first second | its teacher `camera` |",
            "|---|--:|--:|--:|--:|",
            f"| yaw and pitch missed | 15 % | {' | '.join(turns)} |",
            f"| direction of movement missed, median | 15° | {' | '.join(directions)} |",
            f"| PSNR after 1 s, ahead of its multi-step teacher | -2 dB | {after_1_s[0] - after_1_s[1]:+.1f} dB | | |",
            f"| minute-long rollouts that collapsed | 0 | {collapsed(rows['dmd']['drift'])} | | |",
        )
    )


def training_table() -> str:
    """The same page: how the stages were trained."""
    runs = json.loads((ROOT / "results" / "world-64-training.json").read_text())["runs"]
    rows = ["| run | steps | clips per step | learning rate | hours |", "|---|--:|--:|--:|--:|"]
    rows += [
        f"| {run['stage']} | {run['steps']} | {run['batch']} | {run['optim']['lr']:g} | {run['hours']:.1f} |"
        for run in runs
    ]
    return "\n".join(rows)


def test_the_page_on_the_world_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "world.md").read_text()
    assert stages_table("world-64") in page and training_table() in page and targets_table() in page
    truth = json.loads((ROOT / "results" / "world-64.json").read_text())["rows"]["ground truth"]
    assert collapsed(truth["drift"]).startswith("0 of "), "or the criterion is wrong"
    training = json.loads((ROOT / "results" / "world-64-training.json").read_text())
    assert draw_training(training) == (ROOT / "docs" / "world-training.svg").read_text()


def test_the_readme_says_how_the_student_of_many_worlds_does() -> None:
    readme = (ROOT / "README.md").read_text()
    world = json.loads((ROOT / "results" / "world-64.json").read_text())["rows"]["dmd"]
    turn = world["follow"]["motion"]["overall"]["turn_error"]["value"]
    assert f"misses {100 * turn:.0f} % of a turn" in readme
    assert f"{collapsed(world['drift'])} minute-long streams dissolved" in " ".join(readme.split())
