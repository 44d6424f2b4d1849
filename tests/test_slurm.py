"""Tasks of `srun` find each other as torchrun's processes do."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import run
from test_batch import CONFIG

from minwm.bench.stream import random_model
from minwm.cli.slurm import first_host, place_in_step
from minwm.core.files import read_json
from minwm.eval.cases import BASELINES
from minwm.store.folder import save_model

TASK = {
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2",
}  # fmt: skip
PLACE = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu07", "MASTER_PORT": "25602"}


def test_a_task_knows_its_place() -> None:
    assert place_in_step(TASK) == PLACE
    assert place_in_step({**TASK, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == PLACE
    assert place_in_step({**TASK, "CUDA_VISIBLE_DEVICES": "3"}) == {**PLACE, "LOCAL_RANK": "0"}
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert place_in_step({**TASK, **own}) == {**PLACE, **own}


def test_a_lone_task_and_one_of_torchrun_are_left_alone() -> None:
    for env in ({}, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, {**TASK, "RANK": "0"}):
        assert place_in_step(env) == {}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("localhost", "localhost"),
        ("a1,a2", "a1"),
        ("node[01-04,07]-ib", "node01-ib"),
        ("node[7,9-12],login[1-2]", "node7"),
        ("login,node[7,9]", "login"),
        ("rack[2-3]n[08-09].x-y.org", "rack2n08.x-y.org"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_two_tasks_share_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but Slurm's variables; all but their times are those of one process."""
    model = random_model(replace(CONFIG, latents=3))
    save_model(tmp_path / "model", model.config, model.net, model.codec)
    words = "eval --model model --clips 3"
    words += " --counterfactual [] --revisits 0 --walks 0 --seeds 0 --bench-repeats 0"
    step = {**TASK, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "minwm", *words.split(), "--out", "rows", "--json", "two.json"],
            cwd=tmp_path,
            env={**os.environ, **path, **step, "SLURM_PROCID": number},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert [text.count("evaluated ") for text in said] == [3, 2], "of a model and four baselines"
    monkeypatch.chdir(tmp_path)
    assert run(*words.split(), "--json", "one.json") == 0
    one, two = (read_json(tmp_path / file)["rows"] for file in ("one.json", "two.json"))
    for row in (*one.values(), *two.values()):
        del row["eval_seconds"]
    assert one == two and [*one] == ["model", *BASELINES]
