"""Slurm's tasks as processes that find each other: `srun python -m minwm train ...`, one task per GPU."""

import re
from collections.abc import Mapping


def place_in_step(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set, of a task of `srun`; none for a lone task, and below torchrun.

    The first task is on the first host of the step. MASTER_ADDR and MASTER_PORT that are set stay.
    """
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    own_gpu = "," not in env.get("CUDA_VISIBLE_DEVICES", ",")  # by --gpus-per-task
    port = 20000 + (100 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 10000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if own_gpu else env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


def first_host(hosts: str) -> str:
    """
    >>> first_host("node[01-04,07]-ib,login")
    'node01-ib'
    """
    return re.sub(r"\[(\w+)[^]]*]", r"\1", hosts).partition(",")[0]
