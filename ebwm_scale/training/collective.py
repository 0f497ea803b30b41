"""A sum over all ranks, as the first step of a run makes it: whether it is right, and how fast."""

from __future__ import annotations

import time

COLLECTIVE_MIB = 16


def collective() -> str:
    """Join the group as a run does, sum a tensor over all ranks, check the sum; what to say about
    it.
    """
    import torch

    from ebwm_scale.training.distributed import init_distributed

    world = init_distributed()
    tensor = torch.full((COLLECTIVE_MIB * 2**18,), float(world.rank + 1), device=world.device)
    for _ in range(2):  # the first one connects
        values = tensor.clone()
        world.barrier()
        start = time.perf_counter()
        total = world.all_reduce(values)[[0, -1]].tolist()
        seconds = time.perf_counter() - start
    expected = world.size * (world.size + 1) / 2
    if total != [expected, expected]:
        raise RuntimeError(f"the sum over {world.size} ranks is {total}, expected {expected}")
    backend = torch.distributed.get_backend()
    version = ""
    if backend == "nccl":
        from torch.cuda import nccl

        version = f" {'.'.join(map(str, nccl.version()))}"
    said = (
        f"{backend}{version}: {world.size} processes summed {COLLECTIVE_MIB} MiB in "
        f"{1000 * seconds:.1f} ms"
    )
    if world.size == 1:
        return said
    sent_gib = 2 * (world.size - 1) / world.size * COLLECTIVE_MIB / 1024
    return f"{said}, {sent_gib / seconds:.2f} GiB/s per process"
