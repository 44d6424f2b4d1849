"""Plans for many GPUs; what a real group of processes sends is compared in tests/ranks.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planning import stage

from minwm.bench.memory import plan_training
from minwm.bench.scaling import Cluster, count_uses, scale
from minwm.cli import main
from minwm.core.config import ConfigError

RUN = stage("autoregressive", batch=1, accumulate=4)


def test_gpus_share_what_is_held_then_clips() -> None:
    cluster = Cluster(node=2)
    one, two, eight = (scale(RUN, gpus, cluster) for gpus in (1, 2, 8))
    held = sum(item.bytes for item in plan_training(RUN).held)
    assert one.bytes - two.bytes > 0.4 * held
    assert (one.sequence, two.sequence, eight.sequence) == (1, 1, 2)
    for role, step in one.steps.items():
        assert step.shard == step.copy == step.sequence == step.transfer_s == 0
        assert two.steps[role].flops == step.flops / 2 and two.steps[role].shard > 0 == two.steps[role].sequence
        assert eight.steps[role].flops == pytest.approx(step.flops / 8, rel=0.01) and eight.steps[role].sequence > 0
        assert eight.steps[role].seconds[0] < eight.steps[role].seconds[1]
    copies = scale(replace(RUN, parallel=replace(RUN.parallel, shard=2)), 4, cluster)
    for role, step in scale(RUN, 4, cluster).steps.items():  # weights stay in the node, gradients alone leave it
        assert step.copy == 0 < copies.steps[role].copy < copies.steps[role].shard < step.shard


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


def test_the_command_writes_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "smoke/camera", "--gpus", "4", "--json", str(tmp_path / "plan.json")]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["stages"]["camera"]
    assert [row["gpus"] for row in rows] == [1, 2, 4] and all(row["fits"] for row in rows)
    assert "450 GB/s within 8 GPUs" in capsys.readouterr().out


def test_what_cannot_be_dealt_out_is_named() -> None:
    with pytest.raises(ConfigError, match="4 clips of a step cannot be dealt out to 3 GPUs evenly"):
        scale(RUN, 3, Cluster())
    with pytest.raises(ConfigError, match=r"cluster\.mfu=0: must be more than 0"):
        Cluster(mfu=0)
