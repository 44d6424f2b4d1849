"""The numbers in README and docs are those of the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

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
    wan = found["streaming_wan"]
    assert f"latents of {'x'.join(map(str, wan['latents']))}" in text
    assert f"{wan['megabytes'] / wan['records']:.0f} MB, not compressed" in text
    assert f"{wan['clips_per_s_read']:.1f} a second, {wan['megabytes_per_s_read']:.0f} MB/s" in text
    assert f"on {wan['clips_per_s_trained_by_plan']:.2f} a second by `minwm plan`" in text
    assert f"waited for {1000 * wan['longest_wait_s']:.0f} ms at most" in text
    assert "\n".join(poses_rows(found["poses"])) in page
    hours = found["cost"]["core_hours_per_1000"]
    assert f"{hours['videos_ingested']:.2f} core hours with camera files" in text
    assert f"{hours['videos_ingested_with_colmap']:.2f} with COLMAP" in text
    assert f"{hours['clips_encoded']:.2f} to encode" in text


def test_the_page_on_ablations_shows_what_estimated_poses_are_worth() -> None:
    found = json.loads((ROOT / "results" / "estimated-poses.json").read_text())["worlds"]
    page = " ".join((ROOT / "docs" / "ablations.md").read_text().split())
    poses = found["poses"]
    assert (
        f"of {poses['clips']} clips of 256x256 pixels COLMAP placed {poses['placed']}, and {poses['kept']} of" in page
    )
    assert f"{poses['rotation_deg'][1]:.1f} degrees and {100 * poses['path_share'][1]:.1f} % of the path" in page
    assert f"over {poses['rotation_deg'][2]:.1f} degrees and {100 * poses['path_share'][2]:.1f} %" in page
    assert f"{poses['length_ratio'][0]:.2f} to {poses['length_ratio'][2]:.2f} times as long" in page
    for one in (*found["scores"]["camera score"].values(), found["true_minus_colmap"]["camera score"]):
        assert f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" in page


def test_the_page_on_ablations_shows_what_estimated_poses_of_a_game_are_worth() -> None:
    found = json.loads((ROOT / "results" / "estimated-poses.json").read_text())["game"]
    page = (ROOT / "docs" / "ablations.md").read_text()
    text, poses, scores = " ".join(page.split()), found["poses"], found["scores"]
    steps, game = found["training"]["steps"], " ".join((ROOT / "docs" / "own-game.md").read_text().split())
    assert f"After {steps} steps on these clips, videos were made from {found['places']} other places" in text
    assert f"after {steps} steps of {found['training']['batch']} clips of the camera stage" in game
    assert (
        f"of {poses['clips']} clips that a player walks" in text
        and f"Doom](own-game.md) {poses['moving']} move" in text
    )
    assert f"lost one of these, `{poses['lost'][0]}`, and {poses['kept']} moved" in text and len(poses["lost"]) == 1
    assert f"{poses['rotation_deg'][1]:.1f} degrees and {100 * poses['path_share'][1]:.1f} % of the path" in text
    assert f"over {poses['rotation_deg'][2]:.1f} degrees and {100 * poses['path_share'][2]:.1f} %" in text
    assert f"paths {poses['length_ratio'][0]:.2f} to {poses['length_ratio'][2]:.2f} times as long" in text
    for label, arm in {"true": "true poses", "by COLMAP": "poses by COLMAP"}.items():
        cells = [
            *(interval(scores[name][arm]) for name in ("retrieval", "psnr_gap")),
            f"{scores['psnr'][arm]['value']:.1f}",
        ]
        assert f"| {label} | {' | '.join(cells)} | {found['reliance'][arm][0]:.2f} |" in page
        assert (
            scores["retrieval"][arm]["low"] > 1 / len(found["commands"]) and found["lost_by_tracker"][arm]["value"] == 1
        )
    for label, name in {"*none: the first frame held*": "static camera", "decoded*": "codec"}.items():
        row = found["baselines"][name]
        assert f"{label} | {row['retrieval']:.2f} | {row['psnr_gap']:.2f} | {row['psnr']:.1f} | |" in page
    differences = found["true_minus_colmap"]
    assert f"larger by {interval(differences['psnr_gap'], ' dB')}, the PSNR by {interval(differences['psnr'])}" in text
    assert f"and {found['lost_by_tracker']['recording']['value']:.0%}".replace("%", " % of the recordings'") in text


def interval(one: dict[str, float], unit: str = "") -> str:
    return f"{one['value']:.2f}{unit} [{one['low']:.2f}, {one['high']:.2f}]"


def test_no_fault_of_a_training_loses_anything() -> None:
    """What docs/train.md says of the committed run of benchmarks/faults.py."""
    faults = json.loads((ROOT / "results" / "faults.json").read_text())["faults"]
    assert faults["kill -9"]["kills"] >= 50 and faults["kill -9"]["no_saved_step_lost"]
    assert faults["SIGTERM"]["exit_codes"] == [143]
    assert all(faults[name]["half_written"] == 0 for name in ("file size limit", "full disk"))
    jumps = faults["clock jumps"]
    assert jumps["exit_codes"] == [0] and 0 < jumps["counted"] < jumps["seconds"]
    pairs = {name for name in faults if name.startswith("one of two")}
    for name in pairs:
        found = faults[name]
        assert found["exit_code_of_the_other"] == [2] and found["seconds"] < 60 and found["finishes_again"] == [0, 0]
        assert "another process has ended, or hung" in found["message"]
    for name in faults.keys() - pairs:
        assert faults[name]["same_weights"], name
    for name in faults.keys() - pairs - {"kill -9", "SIGTERM", "clock jumps"}:
        assert faults[name]["exit_codes"] == [2] and "error: " in faults[name]["message"], name


def test_the_page_on_training_shows_how_fast_it_is() -> None:
    page = (ROOT / "docs" / "train.md").read_text()
    found = json.loads((ROOT / "results" / "training-throughput.json").read_text())
    for stage, by in found["processes"].items():
        assert f"| `demo/{stage}` | {by['1']['clips_per_s']:.2f} | {by['2']['clips_per_s']:.2f} |" in page
    assert f"takes {found['plain']['times_as_long']:.2f} times as long as the plain loop" in " ".join(page.split())
    for stage, speed in found["place"].items():
        rates = " | ".join(f"{rate:.2f}" for rate in speed["clips_per_cpu_s"].values())
        assert f"| `place/{stage}` | {rates} |" in page
