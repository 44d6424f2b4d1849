"""Plans for many GPUs; what a real group of processes sends is compared in tests/ranks.py."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import stage

from minwm.bench.memory import GIB, plan_training, reserve, size
from minwm.bench.scaling import Cluster, Step, count_uses, gpu_hours, plan_step, scale
from minwm.cli import main
from minwm.core.config import ConfigError
from minwm.experiments import presets
from minwm.recipes.diffusion import AutoregressiveConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "train.md").read_text()
RUN = stage("autoregressive", batch=1, accumulate=4)


def test_gpus_share_what_is_held_then_clips() -> None:
    cluster = Cluster(node=2)
    one, two, eight = (scale(RUN, gpus, cluster) for gpus in (1, 2, 8))
    plan = plan_training(RUN)
    held = sum(item.bytes for item in plan.held)
    assert one.bytes == plan.total and 0.1 * held < one.bytes - two.bytes < 0.5 * held  # two gathers units, too
    assert (one.sequence, two.sequence, eight.sequence) == (1, 1, 2)
    for role, step in one.steps.items():
        assert step.shard == step.copy == step.sequence == step.transfer_s == 0
        assert two.steps[role].flops == step.flops / 2 and two.steps[role].shard > 0 == two.steps[role].sequence
        assert eight.steps[role].flops == pytest.approx(step.flops / 8, rel=0.01) and eight.steps[role].sequence > 0
        assert eight.steps[role].seconds[0] < eight.steps[role].seconds[1]
    pair = scale(replace(RUN, parallel=replace(RUN.parallel, sequence=2)), 2, cluster)
    assert pair.sequence == 2 and pair.bytes < two.bytes
    copies = scale(replace(RUN, parallel=replace(RUN.parallel, shard=2)), 4, cluster)
    for role, step in scale(RUN, 4, cluster).steps.items():  # weights stay in the node, gradients alone leave it
        assert step.copy == 0 < copies.steps[role].copy < copies.steps[role].shard < step.shard


def test_gpu_hours_are_those_of_each_role_in_its_turn() -> None:
    """Seven steps: the student, 4 times the critic, the student, the critic."""
    none = Step(flops=0, shard=0, copy=0, sequence=0, compute_s=0, transfer_s=0)
    steps = {"student": replace(none, compute_s=900, transfer_s=180), "critic": replace(none, compute_s=360)}
    assert gpu_hours(stage("dmd", steps=7), 2, steps) == pytest.approx((2.0, 2.2))


def test_more_layers_are_as_many_times_one() -> None:
    """Counted with one and two of them, and with as many as there are."""
    deep = replace(RUN, model=replace(RUN.model, network=replace(RUN.model.network, layers=2)))
    found = count_uses(deep, "student", 2)
    deeper = count_uses(
        replace(deep, model=replace(deep.model, network=replace(deep.model.network, layers=3))), "student", 2
    )
    one = count_uses(RUN, "student", 2)
    assert found.exchanged - one.exchanged == deeper.exchanged - found.exchanged > 0
    assert deeper.flops - found.flops == pytest.approx(found.flops - one.flops)
    assert len(deeper.units) - len(found.units) == 1


def test_what_never_happens_is_not_counted() -> None:
    """A self-conditioned context takes a rollout; whether a batch has one, no draw without data says."""
    runs = {p: replace(RUN, recipe=AutoregressiveConfig(self_conditioning=p)) for p in (0.0, 0.1)}
    block = {p: count_uses(run, "student", 1).units[0] for p, run in runs.items()}
    assert block[0.0].forward == 1 < block[0.1].forward and block[0.0].backward == block[0.1].backward == 1


def test_the_command_writes_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "smoke/camera", "--gpus", "4", "--json", str(tmp_path / "plan.json")]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["stages"]["camera"]
    assert [row["gpus"] for row in rows] == [1, 2, 4] and all(row["fits"] for row in rows)
    assert "450 GB/s within 8 GPUs" in capsys.readouterr().out


def committed(name: str = "plan-wan") -> dict[str, list[dict[str, Any]]]:
    """Rows of each stage, by `minwm plan`."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["stages"]


FAMILIES = {"Wan2.1-1.3B": ("wan2.1-1.3b", "plan-wan"), "HunyuanVideo-1.5": ("hunyuan1.5-8b", "plan-hunyuan")}
"""Preset and committed plan of each."""


def memory(row: dict[str, Any]) -> str:
    return size(row["bytes"]) if row["fits"] else f"*{size(row['bytes'])}*"


def hours(*rows: dict[str, Any]) -> str:
    low, high = (sum(row["gpu_hours"][i] for row in rows) for i in (0, 1))
    return f"{low:.0f} to {high:.0f}"


def on(count: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["gpus"] == count)


def costs(family: str) -> str:
    """Rows of a page: steps of each stage, memory of a GPU on 1, 8 and 16 of them, and GPU-hours."""
    preset, plan = FAMILIES[family]
    stages, lines = committed(plan), [f"| **{family}** | | | | | | |"]
    for name, rows in stages.items():
        cells = [name, f"{presets.stage(f'{preset}/{name}', Path()).steps:,}", memory(on(1, rows))]
        cells += [x for count in (8, 16) for x in (memory(on(count, rows)), hours(on(count, rows)))]
        lines.append(f"| {' | '.join(cells)} |")
    eight, sixteen = (hours(*(on(count, rows) for rows in stages.values())) for count in (8, 16))
    return "\n".join([*lines, f"| all | | | | {eight} | | {sixteen} |"])


def dearest(plan: str) -> tuple[str, list[dict[str, Any]]]:
    """The stage that takes the most GPU-hours."""
    return max(committed(plan).items(), key=lambda stage: on(8, stage[1])["gpu_hours"])


def up_to_256() -> str:
    """Rows of a page: memory, seconds of a step and GPU-hours of the dearest stage of both families."""
    stages = {family: dearest(plan) for family, (_, plan) in FAMILIES.items()}
    names = [f"{family}, {name}: each | seconds a step | GPU-hours" for family, (name, _) in stages.items()]
    lines = [f"| GPUs | a clip on | {' | '.join(names)} |", "|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for count in (1, 8, 16, 64, 256):
        found = [on(count, rows) for _, rows in stages.values()]
        cells = [str(count), str(found[0]["sequence"])]
        for row in found:
            step = Step(**row["steps"]["student"])
            cells += [memory(row), "{:.3g} to {:.3g}".format(*step.seconds), hours(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_pages_show_the_committed_plans() -> None:
    wan, hunyuan = ((ROOT / "docs" / page).read_text() for page in ("wan.md", "hunyuan.md"))
    assert "\n".join(map(costs, FAMILIES)) in PAGE and up_to_256() in PAGE
    for page, plan in ((wan, "plan-wan"), (hunyuan, "plan-hunyuan")):
        stages = committed(plan)
        gib = [rows[0]["bytes"] / GIB for rows in stages.values()]
        assert f"{min(gib):.0f} to {max(gib):.0f} GiB by stage" in page
        (found,) = re.findall(r"All stages are\s([\d,]+)\sGPU-hours", page)
        assert found == f"{sum(rows[0]['gpu_hours'][0] for rows in stages.values()):,.0f}"
    lora = [
        f"| {name} | {size(row['bytes'])}{', fits' * row['fits']} |"
        for name, (row,) in committed("plan-wan-lora").items()
    ]
    assert "\n".join(lora) in PAGE


CLIPS_ON = ("plan-hunyuan-dmd-4", "plan-hunyuan-dmd-4-8", "plan-hunyuan-dmd-8")
"""Plans of distribution matching in which 4 GPUs, the same with weights among 8, and 8 share a clip."""


def test_the_page_shows_how_many_share_a_clip_of_distribution_matching() -> None:
    plans, lines = [committed(name)["dmd"] for name in CLIPS_ON], list[str]()
    for count in (8, 16, 32, 64):
        rows = [on(count, rows) for rows in plans]
        cells = [cell for row in rows for cell in (size(row["bytes"]), hours(row))]
        lines.append(f"| {count} | {' | '.join(cells)} |")
        assert all(holds(row, gib) for row in rows for gib in (80, 141))
    page, alone = (ROOT / "docs" / "hunyuan.md").read_text(), committed("plan-hunyuan")["dmd"]
    assert "\n".join(lines) in page
    four, eight, thirty_two, many = on(4, plans[0]), on(8, alone), on(32, alone), on(64, alone)
    assert f"{size(four['bytes'])} on 4 GPUs, which 141 GiB hold" in page and holds(four, 141) and not holds(four, 80)
    assert f"{size(eight['bytes'])} on each of 8 GPUs" in page and f"{size(thirty_two['bytes'])} on each of 32" in page
    assert not (holds(thirty_two, 141) or holds(many, 80)) and many["sequence"] == 2


def holds(row: dict[str, Any], gib: int) -> bool:
    """Whether a GPU of that memory holds its part."""
    return row["bytes"] + reserve(gib * GIB) <= gib * GIB


def test_the_committed_plan_is_that_of_the_preset_as_it_is() -> None:
    run = presets.stage("wan2.1-1.3b/camera", Path())
    (saved,) = [row for row in committed()["camera"] if row["gpus"] == 8]
    assert vars(plan_step(run, "student", Cluster(), shard=8, copies=1, sequence=1)) == saved["steps"]["student"]


def test_what_cannot_be_dealt_out_is_named() -> None:
    with pytest.raises(ConfigError, match="4 clips of a step cannot be dealt out to 3 GPUs evenly"):
        scale(RUN, 3, Cluster())
    with pytest.raises(ConfigError, match=r"cluster\.mfu=0: must be more than 0"):
        Cluster(mfu=0)
