"""The numbers in the README are those of the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest
from world_record import draw as draw_training

from minwm.core.config import from_dict
from minwm.experiments.ablate import ArmResult, draw
from minwm.experiments.ablations import ablation

ROOT = Path(__file__).parents[1]
MODELS = {"camera": "bidirectional, 50 steps", "ar": "autoregressive, 50 steps", "dmd": "autoregressive, 4 steps"}


def table(demo: str) -> str:
    """The rows of the README, or of docs/hunyuan.md, from the newest committed run of a demo."""
    results = json.loads((ROOT / "results" / f"{demo}-2cpu.json").read_text())
    rows = []
    for name, what in MODELS.items():
        row = results[name]
        follow, bench, quality = row["follow"], row["bench"], row["quality"]
        score = follow["score"]
        rows.append(
            f"| {name}: {what} | {bench['passes']} | {bench['first_chunk']['median_ms']:.0f} | {bench['fps']:.0f} "
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
    readme = (ROOT / "README.md").read_text()
    assert table("demo") in readme
    assert table("demo-hunyuan") in (ROOT / "docs" / "hunyuan.md").read_text()
    world = json.loads((ROOT / "results" / "world-64.json").read_text())["rows"]["dmd"]
    turn = world["follow"]["motion"]["overall"]["turn_error"]["value"]
    assert f"misses {100 * turn:.0f} % of a turn" in readme
    assert f"{collapsed(world['drift'])} minute-long streams dissolved" in " ".join(readme.split())


def play_table() -> str:
    """The rows of docs/play.md."""
    results = json.loads((ROOT / "results" / "play-cpu.json").read_text())
    names = {"minwm/assets/world/dmd": "the model of many worlds, 64x64, chunks of 8 frames"}
    names |= {"world 7, 128x128": "a rendered world, 128x128, chunks of 4"}
    rows = ["| | frames/s | input to photon, p50 | p95 | chunk | decode | encode |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, what in names.items():
        row = results[name]
        photon = f"{row['input_to_photon_p50_ms']:.0f} ms | {row['input_to_photon_p95_ms']:.0f} ms"
        stages = " | ".join(f"{row[f'{stage}_ms']:.1f} ms" for stage in ("diffuse", "decode", "encode"))
        rows.append(f"| {what} | {row['fps']:.1f} | {photon} | {stages} |")
    return "\n".join(rows)


def soaks() -> dict[str, dict]:
    """Ten minutes of play each, by file and game."""
    files = [json.loads((ROOT / "results" / name).read_text()) for name in ("play-soak.json", "play-soak-busy.json")]
    assert all({"command", "date", "commit", "versions", "what"} <= set(results) for results in files)
    games = [(name, row) for results in files for name, row in results.items() if "samples" in row]
    return {f"{i // 2}: {name}": row for i, (name, row) in enumerate(games)}


@pytest.mark.parametrize("row", soaks().values(), ids=[*soaks()])
def test_ten_minutes_of_play_need_no_more_memory(row: dict) -> None:
    first, last = row["first third"], row["last third"]
    assert all(len(samples) == 60 for samples in row["samples"].values()), "ten seconds each"
    assert last["server_threads"] == first["server_threads"]
    assert last["server_mib"] < first["server_mib"] + 10 and last["page_mib"] < first["page_mib"] + 2


@pytest.mark.parametrize("name", ["0: runs/ar-4-steps", "1: world 7, 64x64"])
def test_ten_minutes_of_play_are_as_quick_at_their_end(name: str) -> None:
    """Of the others the machine, which did more and more beside them, says nothing."""
    first, last = soaks()[name]["first third"], soaks()[name]["last third"]
    for key in ("input_to_photon_p50_ms", "input_to_photon_p95_ms"):
        assert last[key] < 1.1 * first[key]
    assert last["fps"] > 0.9 * first["fps"]


def test_the_player_is_as_quick_as_its_page_says() -> None:
    assert play_table() in (ROOT / "docs" / "play.md").read_text()


def ablation_table(name: str) -> str:
    """The rows of docs/ablations.md."""
    results = json.loads((ROOT / "results" / f"ablation-{name}.json").read_text())
    listens = all(arm["reliance"] is not None for arm in results["arms"])
    drifts = all(arm.get("drift") for arm in results["arms"])
    head = ["camera score [95%]", "turn", "turn missed", "direction missed", "PSNR"]
    head += ["feature distance"] * drifts + ["training"]
    rows = [[results["varies"], *head[:1], *["reliance"] * listens, *head[1:]]]
    for arm in results["arms"]:
        score, motion = arm["follow"]["score"], arm["follow"]["motion"]["overall"]
        cells = [arm["name"], f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"]
        cells += [f"{arm['reliance']:.2f}"] if listens else []
        cells += [f"{motion['turn_ratio']['value']:.2f}", f"{100 * motion['turn_error']['value']:.0f} %"]
        cells += [f"{motion['direction_deg']['value']:.0f}°", f"{arm['quality']['psnr']:.1f} dB"]
        cells += [f"{max(route['feature_distance'][-1] for route in arm['drift'].values()):.2f}"] if drifts else []
        rows.append([*cells, f"{arm['seconds']:.0f} s"])
    rows.insert(1, ["---", *["--:"] * (len(rows[0]) - 1)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@pytest.mark.parametrize("name", [path.stem.partition("-")[2] for path in ROOT.glob("results/ablation-*.json")])
def test_the_ablations_page_shows_the_committed_results(name: str) -> None:
    assert ablation_table(name) in (ROOT / "docs" / "ablations.md").read_text()
    results = json.loads((ROOT / "results" / f"ablation-{name}.json").read_text())
    drawing = draw(ablation(name, ROOT), [from_dict(ArmResult, arm) for arm in results["arms"]])
    assert drawing == (ROOT / "docs" / f"ablation-{name}.svg").read_text()


FORMS = {
    "plain": "straightforward",
    "reference": "reference",
    "engine": "engine",
    "compiled": "engine, `--compile`",
}


def race_table() -> str:
    """The rows of docs/performance.md: the engine against other forms."""
    threads = json.loads((ROOT / "results" / "bench-cpu.json").read_text())["threads"]
    rows = [["", *(f"{count} thread{'s' * (count != '1')} | times as fast" for count in threads)]]
    rows.append(["---", *["--: | --:"] * len(threads)])
    for form, name in FORMS.items():
        found = (row[form] for row in threads.values())
        rows.append([name, *(f"{x['median_ms']:.1f} ms | {x['times_as_fast_as_plain']:.2f}" for x in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def speed_table() -> str:
    """The same page: stages of a chunk beside their bounds."""
    speed = json.loads((ROOT / "results" / "speed-cpu.json").read_text())
    rows = ["| | median | p90 | GFLOP | of the roofline |", "|---|--:|--:|--:|--:|"]
    named = {
        **{name.replace("_", " "): stage for name, stage in speed["stages"].items()},
        "M1, first chunk": speed["first_chunk"],
        "M2, steady chunk": speed["chunk"],
        "M5, action to pixel": speed["action_to_pixel"],
    }
    for name, row in named.items():
        bound = f"{row['gflop']:.2f} | {row['percent']:.0f}%" if row["gflop"] else "|"
        rows.append(f"| {name} | {row['median_ms']:.1f} ms | {row['p90_ms']:.1f} ms | {bound} |")
    return "\n".join(rows)


def options_table() -> str:
    """The same page: what is lost by options that change the result."""
    results = json.loads((ROOT / "results" / "options-cpu.json").read_text())
    rows = ["| | passes per chunk | PSNR to the usual stream | PSNR to the true view |", "|---|--:|--:|--:|"]
    for name, row in results["options"].items():
        usual, true = (
            f"{x['value']:.1f} dB [{x['low']:.1f}, {x['high']:.1f}]" if x else ""
            for x in (row.get("usual stream"), row["true view"])
        )
        rows.append(f"| {name} | {row['passes']} | {usual} | {true} |")
    return "\n".join(rows)


def train_table() -> str:
    """The same page: steps of training."""
    stages = json.loads((ROOT / "results" / "train-cpu.json").read_text())["stages"]
    rows = ["| stage | trains | step | p90 | GFLOP | clips/s | MFU |", "|---|---|--:|--:|--:|--:|--:|"]
    for name, stage in stages.items():
        for i, (role, row) in enumerate(stage["roles"].items()):
            times = f"{row['median_ms']:.0f} ms | {row['p90_ms']:.0f} ms | {row['gflop']:.1f}"
            clips = f"{stage['clips_per_s']:.1f}" if i == 0 else ""
            rows.append(f"| {name if i == 0 else ''} | {role} | {times} | {clips} | {row['mfu']:.0f}% |")
    return "\n".join(rows)


def test_the_page_on_performance_shows_the_committed_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert race_table() in page and speed_table() in page and options_table() in page and train_table() in page


def poses_rows(found: dict[str, Any]) -> list[str]:
    """The rows of docs/customise.md on COLMAP, of the experiment `poses`."""
    rows = []
    for name, (known, solved) in found["rows"].items():
        for row in (known, solved):
            lens = {"known": "given", "solved": "solved for"}[row["focal"]]
            median = f"{row['rotation_deg_50']:.1f}° | {100 * row['path_share_50']:.1f} %"
            worst = f"{row['rotation_deg_90']:.0f}°, {100 * row['path_share_90']:.0f} %"
            rows.append(f"| {name} | {lens} | {row['moving_lost']} of {row['moving_clips']} | {median} | {worst} |")
    return rows


def splat_rows(found: dict[str, Any]) -> list[str]:
    """The rows of docs/customise.md on captured scenes, of the experiment `splats`."""
    rows = []
    for name, row in found["rows"].items():
        novel = f"{row['psnr_of_clips']:.1f} dB" if "psnr_of_clips" in row else ""
        dropped = ", ".join(f"{n} {rule}" for rule, n in row["dropped"].items())
        numbers = f"{row['pictures']} | {row['points']} | {row['psnr_held_out']:.1f} dB | {novel}"
        rows.append(f"| {name} | {numbers} | {row['clips']} | {dropped} |")
    return rows


def test_the_page_shows_what_data_are_worth_and_cost() -> None:
    found = json.loads((ROOT / "results" / "data.json").read_text())
    page = (ROOT / "docs" / "customise.md").read_text()
    text, stream = " ".join(page.split()), found["streaming"]
    assert "\n".join(splat_rows(found["splats"])) in page
    assert f"{stream['clips_per_s_read']:.0f} clips a second" in text
    assert f"trained on {stream['clips_per_s_trained']:.1f}" in text
    assert f"waited {1000 * stream['longest_wait_s']:.0f} ms at most" in text
    assert "\n".join(poses_rows(found["poses"])) in page
    hours = found["cost"]["core_hours_per_1000"]
    assert f"{hours['videos_ingested']:.2f} core hours with camera files" in text
    assert f"{hours['videos_ingested_with_colmap']:.2f} with COLMAP" in text
    assert f"{hours['clips_encoded']:.2f} to encode" in text


def test_the_page_on_ablations_shows_what_estimated_poses_are_worth() -> None:
    found = json.loads((ROOT / "results" / "estimated-poses.json").read_text())
    page = " ".join((ROOT / "docs" / "ablations.md").read_text().split())
    poses = found["poses"]
    assert (
        f"of {poses['clips']} clips of 256x256 pixels COLMAP placed {poses['placed']}, and {poses['kept']} of" in page
    )
    assert f"{poses['rotation_deg'][1]:.1f} degrees and {100 * poses['path_share'][1]:.1f} % of the path" in page
    assert f"over {poses['rotation_deg'][2]:.1f} degrees and {100 * poses['path_share'][2]:.1f} %" in page
    assert f"{poses['length_ratio'][0]:.2f} to {poses['length_ratio'][2]:.2f} times as long" in page
    for one in (*found["camera_score"].values(), found["true_minus_colmap"]):
        assert f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" in page


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
    for label, row in {"8 steps |": "model", "has them |": "few_steps", "codec alone |": "codec"}.items():
        after = " / ".join(f"{value:.1f}" for value in found[row]["psnr_at_seconds"])
        assert f"{label} {after} dB | {100 * found[row]['sharpness']:.0f} % |" in page
    assert stages_table("place", times=False) in page and place_targets() in page
    dmd = json.loads((ROOT / "results" / "place-dmd.json").read_text())
    after, still = (
        " / ".join(f"{x:.1f}" for x in of) for of in (dmd["model"]["psnr_at_seconds"], dmd["still"].values())
    )
    assert (
        f"| {after} dB | {100 * dmd['model']['sharpness']:.0f} % |" in page and f"{still} dB after 1, 5 and 20" in page
    )
    runs = json.loads((ROOT / "results" / "place-training.json").read_text())
    steps = {name: run["steps"] for name, run in runs.items()}
    said = " ".join(page.split())
    for name in ("foundation-1", "foundation-2", "camera-1", "ar-5", "consistency-1", "dmd-1"):
        assert f"`{name}` ({steps[name]:,}" in said
    before, last = (dict(runs["foundation-3"]["held_out_loss"])[step] for step in (4900, 12000))
    assert f"(from {before:.3f} to {last:.3f})" in said


def place_targets() -> str:
    """The same page: what is asked of the student, and what it reaches."""
    rows = json.loads((ROOT / "results" / "place.json").read_text())["rows"]
    motion = rows["dmd"]["follow"]["motion"]["overall"]
    after, teacher = ([x["value"] for x in rows[name]["quality"]["psnr_at"]] for name in ("dmd", "ar"))
    return "\n".join(
        (
            "| | asked | `dmd` |",
            "|---|--:|--:|",
            f"| yaw and pitch missed, median over 2 s | 10 % | {100 * motion['turn_error']['value']:.0f} % |",
            f"| direction of movement missed, median | 10° | {motion['direction_deg']['value']:.0f}° |",
            f"| PSNR to the truth after 1 s | 25 dB | {after[0]:.1f} dB |",
            f"| the same, ahead of its multi-step teacher `ar` | -1 dB | {after[0] - teacher[0]:+.1f} dB |",
        )
    )


WAYS = {
    "camera": "bidirectional",
    "ar": "autoregressive",
    "ode": "few steps",
    "consistency": "few steps",
    "dmd": "few steps",
}


def collapsed(routes: dict[str, dict]) -> str:
    """How many of all streams."""
    ends = [second for row in routes.values() for second in row["collapsed"]]
    return f"{sum(second is not None for second in ends)} of {len(ends)}"


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


def test_what_the_pages_say_of_the_tracker_is_as_committed() -> None:
    rows = json.loads((ROOT / "results" / "tracker.json").read_text())["rows"]
    page = " ".join((ROOT / "docs" / "evaluation.md").read_text().split())
    for name, kind in (
        ("softened", "details"),
        ("softened and stained", "details"),
        ("softened and stained", "colours"),
    ):
        row = rows[name][kind]
        assert f"{row['direction_deg']:.0f} degrees and {100 * row['turn_error']:.0f} %" in page


def recovery_tables() -> tuple[str, str]:
    """The rows of docs/evaluation.md: cameras recovered from videos of the commanded motion, and of others."""
    rows = json.loads((ROOT / "results" / "camera-recovery.json").read_text())["rows"]
    exact = [
        "| video | lost | rotation, ° | direction, ° | speed ratio | turn ratio | strays |",
        "|---|---|---|---|---|---|---|",
    ]
    wrong = ["| video | exact | 0.8x speed | 0.5x speed | static | opposite | yaw drift |", "|---" * 7 + "|"]
    for video in (name.removesuffix(", exact") for name in rows if name.endswith(", exact")):
        exact.append(f"| {video} | {recovery_cells(rows[f'{video}, exact'])} |")
        speeds = (rows[f"{video}, {name}"]["speed_ratio"]["value"] for name in SPEEDS)
        drift = rows[f"{video}, yaw drift"]["rot_err_deg"]["value"]
        wrong.append(f"| {video} | {' | '.join(f'{speed:.2f}' for speed in speeds)} | {drift:.2f}° |")
    return "\n".join(exact), "\n".join(wrong)


SPEEDS = {"exact": 1.0, "0.8x speed": 0.8, "0.5x speed": 0.5, "static": 0.0, "opposite": -1.0}
"""Of videos whose motion is not the commanded one, over the commanded speed."""


def test_the_page_shows_which_estimator_of_cameras_is_nearer_to_the_truth() -> None:
    by = {name: f"camera-recovery{suffix}.json" for name, suffix in (("colmap", "-colmap"), ("klt", ""))}
    rows = {name: json.loads((ROOT / "results" / file).read_text())["rows"] for name, file in by.items()}
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for video, row in rows["colmap"].items():
        for name in by:
            assert f"| {video.removesuffix(', exact')} | {name} | {recovery_cells(rows[name][video])} |" in page
        assert row["failed"]["value"] == row["lost"]["value"] == 0
        assert row["rot_err_deg"]["value"] > 8 * rows["klt"][video]["rot_err_deg"]["value"]
        assert row["rot_err_deg"]["low"] > rows["klt"][video]["rot_err_deg"]["high"], "or the page must say otherwise"


def test_the_page_shows_how_far_recovered_cameras_are_off() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert all(table in page for table in recovery_tables())
    rows = json.loads((ROOT / "results" / "camera-recovery.json").read_text())["rows"]
    assert len(rows) == 3 * 3 * (len(SPEEDS) + 1)
    for video, row in rows.items():
        if not video.startswith("64") and not video.endswith("yaw drift"):
            assert abs(row["speed_ratio"]["value"] - SPEEDS[video.partition(", ")[2]]) < 0.15


CAMERA = {"lost": "lost", "rotation, °": "rot_err_deg", "direction, °": "direction_err_deg"}
CAMERA |= {"speed ratio": "speed_ratio", "turn ratio": "turn_ratio"}
LIKENESS = {"PSNR, dB": "psnr", "SSIM": "ssim", "FLIP": "flip"}
SUITE = {"NavScore": "nav_score", "WorldScore": "worldscore", "revisits gain, dB": "gain", "seams": "seam"}


def scores_table(rows: dict[str, dict[str, dict]], columns: dict[str, str]) -> str:
    """Means by row and quantity."""
    lines = [f"| | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for row, found in rows.items():
        means = [found[name]["mean"]["value"] if name in found else None for name in columns.values()]
        lines.append(f"| {row} | {' | '.join('' if x is None else f'{x:.2f}' for x in means)} |")
    return "\n".join(lines)


def quantities(rows: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Of all metrics, by row."""
    return {name: {q: x for found in row["scores"].values() for q, x in found.items()} for name, row in rows.items()}


def recorded_table(file: str, *columns: str) -> str:
    """The rows of docs/evaluation.md: shipped models against clips of scenes not seen, as any recorded ones."""
    results = json.loads((ROOT / "results" / file).read_text())
    every = {**CAMERA, **LIKENESS}
    rows = quantities({**results["baselines"], **results["videos"]})
    return scores_table(rows, {name: every[name] for name in columns or every})


def suite_table() -> str:
    """The rows of docs/evaluation.md: the shipped models along the suite, and what wrong paths would score."""
    results = json.loads((ROOT / "results" / "suite.json").read_text())
    rows = quantities(results["videos"])
    last = [*rows.values()][-1]
    for wrong in ("static", "opposite", "half speed"):
        rows[f"*{wrong}*"] = {name: last[f"{name} ({wrong})"] for name in ("nav_score", "worldscore")}
    return scores_table(rows, {**CAMERA, **SUITE})


def test_the_page_shows_what_recorded_clips_say_of_the_shipped_models() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    columns = [name for name in (*CAMERA, *LIKENESS) if name != "speed ratio"]
    assert recorded_table("world-recorded.json", *columns) in page and recorded_table("place-recorded.json") in page
    assert suite_table() in page and suite_table() in (ROOT / "README.md").read_text()
    suite = quantities(json.loads((ROOT / "results" / "suite.json").read_text())["videos"])
    every = [row["lost"]["mean"]["value"] for row in suite.values()]
    assert f"In {100 * min(every):.0f} to {100 * max(every):.0f} % of the seconds" in page
    recorded, aligned = (
        json.loads((ROOT / "results" / f"world-{name}.json").read_text()) for name in ("recorded", "64")
    )
    lost = [recorded["videos"][name]["scores"]["camera"]["lost"]["mean"]["value"] for name in ("dmd", "ar")]
    turns = [aligned["rows"][name]["follow"]["motion"]["overall"]["turn_error"]["value"] for name in ("dmd", "ar")]
    lost, missed = (" and ".join(f"{100 * share:.0f}" for share in shares) for shares in (lost, turns))
    assert f"`dmd` and `ar` {lost} %" in page and f"these miss only {missed} % of\na turn" in page


def test_the_pages_show_what_was_measured_on_game_footage() -> None:
    """True cameras pass, each wrong reading of them fails; and how far recovered ones are off."""
    results = json.loads((ROOT / "results" / "game-footage.json").read_text())
    checked, page = results["camera_check"]["rows"], (ROOT / "docs" / "own-game.md").read_text()
    for name, row in checked.items():
        named = "" if name == "true" else f"{row['named']:.0%}"
        cells = f"{row['passes']:.0%} | {named} | {row['residual_pixels']:.2f} | {row['in_front']:.2f}"
        assert f"| {name} | {cells} |" in page
        assert row["passes"] == (name == "true")
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for name, row in results["camera_recovery"]["rows"].items():
        assert f"| {name} | {recovery_cells(row, 'relative_speed')} |" in page
    costs = results["heights"]["cost"]
    assert min(costs, key=costs.__getitem__) == "1.2" and results["heights"]["with_steps"] > 1


def recovery_cells(row: dict, speed: str = "speed_ratio") -> str:
    names = ("lost", "rot_err_deg", "direction_err_deg", speed, "turn_ratio", "strays")
    return " | ".join(f"{row[name]['value']:.2f}" for name in names)


def test_no_fault_of_a_training_loses_anything() -> None:
    """What docs/train.md says of the committed run of benchmarks/faults.py."""
    faults = json.loads((ROOT / "results" / "faults.json").read_text())["faults"]
    assert faults["kill -9"]["kills"] >= 50 and faults["kill -9"]["no_saved_step_lost"]
    assert faults["SIGTERM"]["exit_codes"] == [143]
    assert faults["file size limit"]["half_written"] == 0
    pairs = {name for name in faults if name.startswith("one of two")}
    for name in pairs:
        found = faults[name]
        assert found["exit_code_of_the_other"] == [2] and found["seconds"] < 60 and found["finishes_again"] == [0, 0]
        assert "another process has ended, or hung" in found["message"]
    for name in faults.keys() - pairs:
        assert faults[name]["same_weights"], name
    for name in faults.keys() - pairs - {"kill -9", "SIGTERM"}:
        assert faults[name]["exit_codes"] == [2] and "error: " in faults[name]["message"], name
