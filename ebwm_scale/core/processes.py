"""Which of how many processes this one is, read from its launcher's environment.

Whatever counts processes asks here; nothing imports torch.

    torchrun, deepspeed, cluster/tasks.py   RANK, WORLD_SIZE, LOCAL_RANK
    srun with several tasks                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    neither                                 one process

An allocation is not a launcher: in the shell that salloc opens, and in a batch script, SLURM_NTASKS
says what was asked for, while `python` starts one process. Whoever asked for several is told how to
start them, and how to run one on purpose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shown


@dataclass(frozen=True)
class Place:
    rank: int
    size: int  # number of processes
    local_rank: int  # on its machine


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process; ConfigError where the environment contradicts itself or names
    tasks that nobody started."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _place_of_launcher(environment)
    of_step = place_in_step(environment)
    if of_step is not None:
        return of_step
    asked = number(environment, "SLURM_NTASKS", 1)
    if asked > 1:
        raise ConfigError(
            f"SLURM_NTASKS is {asked}: this shell's allocation is for {asked} tasks, but this "
            "process is not one that srun started. For one process: SLURM_NTASKS=1 python "
            f"ebwm_scale/train.py ...; for {asked}: slurm/pretrain_nlp.sh, which also runs inside "
            "an allocation"
        )
    return Place(0, 1, 0)


def place_in_step(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place among several tasks of one srun; None outside srun, and in a step of one task."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    size = number(environment, "SLURM_STEP_NUM_TASKS", number(environment, "SLURM_NTASKS", 1))
    if size == 1:
        return None
    return Place(
        number(environment, "SLURM_PROCID", 0), size, number(environment, "SLURM_LOCALID", 0)
    )


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all; never fails, for use in error handlers.

    Where the environment contradicts itself nobody knows who does, and every process speaks.
    """
    try:
        return find_place(environment).rank == 0
    except ConfigError:
        return True


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A variable that holds a whole number; `default` where it is absent or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(
            f"{name} is {shown(text)} in the environment: must be a whole number; unset it"
        )
    return int(text)


def _place_of_launcher(environment: Mapping[str, str]) -> Place:
    rank, size = number(environment, "RANK", 0), number(environment, "WORLD_SIZE", 1)
    if rank >= size or (size > 1 and "RANK" not in environment):
        raise ConfigError(
            f"RANK is {environment.get('RANK', 'absent')} and WORLD_SIZE "
            f"{environment.get('WORLD_SIZE', 'absent')} in the environment: a launcher sets both, "
            "RANK from 0 to WORLD_SIZE - 1. For one process unset both"
        )
    local_rank = number(environment, "LOCAL_RANK", number(environment, "SLURM_LOCALID", 0))
    return Place(rank, size, local_rank)
