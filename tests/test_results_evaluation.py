"""What docs/evaluation.md, and README's table of the suite, say is what was measured."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


RECOVERY = ("lost", "rot_err_deg", "direction_err_deg", "speed_ratio", "turn_ratio", "strays")


def recovery_cells(row: dict, speed: str = "speed_ratio") -> str:
    return " | ".join(f"{row[speed if name == 'speed_ratio' else name]['value']:.2f}" for name in RECOVERY)


def test_the_page_shows_two_estimators_of_cameras_beside_each_other() -> None:
    found = json.loads((ROOT / "results" / "camera-recovery-colmap.json").read_text())
    page = (ROOT / "docs" / "evaluation.md").read_text()
    agree, differ = list[dict[str, float]](), list[dict[str, float]]()
    for video, klt in found["rows"].items():
        witness, label = found["witnesses"][video], video.removesuffix(", exact")
        for name, row in (("klt", klt), ("colmap", witness)):
            assert f"| {label} | {name} | {recovery_cells(row)} |" in page
        differences = [witness["differences"][name] for name in RECOVERY]
        medians = " | ".join(f"{one['median']['value']:.2f}" for one in differences)
        beyond = " | ".join(f"{len(one['beyond'])} of {one['videos']}" for one in differences)
        assert f"| {label} | median difference | {medians} |\n| {label} | videos beyond the limit | {beyond} |" in page
        assert witness["failed"]["value"] == witness["lost"]["value"] == 0
        assert witness["rot_err_deg"]["value"] > 8 * klt["rot_err_deg"]["value"]
        assert witness["rot_err_deg"]["low"] > klt["rot_err_deg"]["high"], "or the page must say otherwise"
        for clip in witness["rotation_errors"]["klt"]:
            errors = {name: by_clip[clip] for name, by_clip in witness["rotation_errors"].items()}
            (differ if clip in witness["differences"]["rot_err_deg"]["beyond"] else agree).append(errors)
    worst = max(max(errors.values()) for errors in agree), max(errors["klt"] for errors in differ)
    assert f"In the {len(agree)} of these {len(agree + differ)} videos" in page and worst[0] < 1.4 and worst[1] < 4.5
    assert all(errors["colmap"] > errors["klt"] for errors in differ) and f"In the other {len(differ)} COLMAP" in page


def test_the_page_shows_how_far_recovered_cameras_are_off() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert all(table in page for table in recovery_tables())
    rows = json.loads((ROOT / "results" / "camera-recovery.json").read_text())["rows"]
    assert len(rows) == 3 * 3 * (len(SPEEDS) + 1)
    for video, row in rows.items():
        if not video.startswith("64") and not video.endswith("yaw drift"):
            assert abs(row["speed_ratio"]["value"] - SPEEDS[video.partition(", ")[2]]) < 0.15


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
    wrong = results["wrong_motions"]["rows"]
    for video in ("128 game", "256 game"):
        turns = {name: wrong[f"{video}, {name}"]["turn_ratio"]["value"] for name in SPEEDS}
        drift = [wrong[f"{video}, {name}"]["rot_err_deg"]["value"] for name in ("exact", "yaw drift")]
        cells = [*(f"{turn:.2f}" for turn in turns.values()), *(f"{error:.2f}°" for error in drift)]
        assert f"| {video} | {' | '.join(cells)} |" in page
        assert all(abs(turn - SPEEDS[name]) < 0.15 for name, turn in turns.items())
    relative = [
        wrong[f"{video}, {name}"]["relative_speed"]["value"]
        for name in [*SPEEDS][:3]
        for video in ("128 game", "256 game")
    ]
    assert f"{min(relative):.2f} to {max(relative):.2f} at every speed" in page
    costs = results["heights"]["cost"]
    assert min(costs, key=costs.__getitem__) == "1.2" and results["heights"]["with_steps"] > 1


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


def suite_rows() -> dict[str, dict[str, dict]]:
    """Quantities of the shipped models along the suite, of which two were measured together."""
    worlds, place = (json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in ("suite", "suite-place"))
    shipped = {name: worlds["videos"][name] for name in ("world/ar", "world/dmd")}
    return quantities({**shipped, "place/dmd": place["videos"]["dmd"]})


def suite_table() -> str:
    """The rows of docs/evaluation.md: the shipped models along the suite, and what wrong paths would score."""
    rows = suite_rows()
    last = [*rows.values()][-1]
    for wrong in ("static", "opposite", "half speed"):
        rows[f"*{wrong}*"] = {name: last[f"{name} ({wrong})"] for name in ("nav_score", "worldscore")}
    return scores_table(rows, {**CAMERA, **SUITE})


def test_the_page_shows_what_recorded_clips_say_of_the_shipped_models() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    columns = [name for name in (*CAMERA, *LIKENESS) if name != "speed ratio"]
    assert recorded_table("world-recorded.json", *columns) in page and recorded_table("place-recorded.json") in page
    assert suite_table() in page and suite_table() in (ROOT / "README.md").read_text()
    every = [row["lost"]["mean"]["value"] for row in suite_rows().values()]
    assert f"In {100 * min(every):.0f} to {100 * max(every):.0f} % of the seconds" in page
    recorded, aligned = (
        json.loads((ROOT / "results" / f"world-{name}.json").read_text()) for name in ("recorded", "64")
    )
    lost = [recorded["videos"][name]["scores"]["camera"]["lost"]["mean"]["value"] for name in ("dmd", "ar")]
    turns = [aligned["rows"][name]["follow"]["motion"]["overall"]["turn_error"]["value"] for name in ("dmd", "ar")]
    lost, missed = (" and ".join(f"{100 * share:.0f}" for share in shares) for shares in (lost, turns))
    assert f"`dmd` and `ar` {lost} %" in page and f"these miss only {missed} % of\na turn" in page
