"""Plans for many GPUs; what a real group of processes sends is compared in tests/ranks.py."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import stage

from minwm.bench.memory import GIB, plan_training, size
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


def table(preset: str, plan: str, counts: tuple[int, ...]) -> str:
    """Rows of a page: steps of each stage, and for some numbers of GPUs the memory of each and the GPU-hours."""
    lines, totals = list[str](), defaultdict[tuple[int, int], float](float)
    for name, rows in committed(plan).items():
        cells = [name, f"{presets.stage(f'{preset}/{name}', Path()).steps:,}"]
        for row in (row for row in rows if row["gpus"] in counts):
            for i, hours in enumerate(row["gpu_hours"]):
                totals[row["gpus"], i] += hours
            cells += [size(row["bytes"]), "{:.0f} to {:.0f}".format(*row["gpu_hours"])]
        lines.append(f"| {' | '.join(cells)} |")
    total = " | | ".join(f"{totals[count, 0]:.0f} to {totals[count, 1]:.0f}" for count in counts)
    return "\n".join([*lines, f"| all | | | {total} |"])


def test_pages_show_the_committed_plans() -> None:
    wan, hunyuan = ((ROOT / "docs" / page).read_text() for page in ("wan.md", "hunyuan.md"))
    assert table("wan2.1-1.3b", "plan-wan", (1, 8, 16)) in PAGE
    gib = [rows[0]["bytes"] / GIB for rows in committed().values()]
    assert f"{min(gib):.0f} to {max(gib):.0f} GiB by stage" in wan
    lora = [
        f"| {name} | {size(row['bytes'])}{', fits' * row['fits']} |"
        for name, (row,) in committed("plan-wan-lora").items()
    ]
    assert "\n".join(lora) in PAGE
    (eight,) = [row for row in committed("plan-hunyuan")["camera"] if row["gpus"] == 8]
    said = "{:.0f} to {:.0f} GPU-hours on 8 H100".format(*eight["gpu_hours"])
    assert eight["fits"] and said in hunyuan and f"with {size(eight['bytes'])} on each" in hunyuan


def test_the_committed_plan_is_that_of_the_preset_as_it_is() -> None:
    run = presets.stage("wan2.1-1.3b/camera", Path())
    (saved,) = [row for row in committed()["camera"] if row["gpus"] == 8]
    assert vars(plan_step(run, "student", Cluster(), shard=8, copies=1, sequence=1)) == saved["steps"]["student"]


def test_what_cannot_be_dealt_out_is_named() -> None:
    with pytest.raises(ConfigError, match="4 clips of a step cannot be dealt out to 3 GPUs evenly"):
        scale(RUN, 3, Cluster())
    with pytest.raises(ConfigError, match=r"cluster\.mfu=0: must be more than 0"):
        Cluster(mfu=0)
