"""Processes: who am I, start the group, and the few things ranks agree on.

The same code under python, deepspeed, torchrun and srun.
"""

from __future__ import annotations

import atexit
import datetime
import os
import socket

import torch
import torch.distributed as dist

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.processes import Place, find_place, number
from ebwm_scale.core.world import World

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective; validation and saving stay far below


def ranks_from_env() -> Place:
    """The place of this process, and what torch.distributed reads of it set in the environment."""
    environment, place = os.environ, find_place()
    environment["RANK"], environment["WORLD_SIZE"] = str(place.rank), str(place.size)
    environment["LOCAL_RANK"] = str(place.local_rank)
    if place.size > 1:
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(key):
                raise ConfigError(
                    f"{key} is not set: {place.size} processes need an address to meet at. Start "
                    "through "
                    "slurm/pretrain_nlp.sh, or export it in the job script; for one process: srun "
                    "--ntasks=1 python ..."
                )
        number(environment, "MASTER_PORT", 0)
    elif environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Nobody to meet: any free port (0) does, whatever a launcher gave to all the runs of this
        # machine. torchrun listens by itself.
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = "127.0.0.1", "0"
    return place


def init_distributed() -> World:
    """Start the process group: NCCL where every rank has a GPU, gloo otherwise."""
    place = ranks_from_env()
    rank = place.rank
    size = place.size
    local_rank = place.local_rank
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # known, so not searched for with a warning
    import deepspeed

    # On a CPU DeepSpeed would compile a shared-memory transport at this point: minutes, and a lock
    # that outlives a killed job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_gpu:
        if torch.cuda.device_count() == 1:  # the launcher shows each task its own GPU only
            local_rank = 0
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if not on_gpu and size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # every rank would otherwise start a thread per core, and threads that wait for each other
        # in turns are many times slower
        torch.set_num_threads(
            max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        )
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo", timeout=TIMEOUT, verbose=False
        )
    except RuntimeError as error:  # torch's DistNetworkError among them
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(_port_in_use(os.environ["MASTER_PORT"])) from None
    atexit.register(_leave_world)
    return World(rank, size, local_rank, device)


def _leave_world() -> None:
    """End a gloo group while the interpreter is whole.

    Left to the interpreter's own end, its threads sometimes abort a process that has finished what
    it was doing, and its exit code is lost (134 in place of 75).
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _port_in_use(port: str) -> str:
    return (
        f"port {port}, at which the launcher has this run's processes meet, is in use on "
        f"{socket.gethostname()}, most often "
        "by another run. Give the launcher one of its own: deepspeed --master_port 29501 "
        "ebwm_scale/train.py ..., "
        "torchrun --standalone (finds one by itself), or MASTER_PORT where you set it"
    )
