"""Which processes share each sample: neighbours, so that one machine has them if it has as many.

    parallel.sequence 2, 4 processes     ranks 0 and 1 share samples, 2 and 3 share others

Gradients are averaged over all of them: those of a group are over parts of its samples, and every
part counts as much (world_model.py).
"""

from __future__ import annotations

import torch.distributed as dist

from ebwm_scale.core.world import World
from ebwm_scale.model.sequence import SequenceGroup
from ebwm_scale.training.distributed import TIMEOUT


def sequence_group(world: World) -> SequenceGroup | None:
    """The group of this process; None where none shares its samples. Every rank must call it."""
    if world.sequence == 1:
        return None
    own = None
    for first in range(0, world.size, world.sequence):
        ranks = list(range(first, first + world.sequence))
        processes = dist.new_group(ranks, timeout=TIMEOUT)  # made by all ranks, whoever is in it
        if world.rank in ranks:
            assert isinstance(processes, dist.ProcessGroup), "this rank is in it"
            own = SequenceGroup(processes, world.rank - first, world.sequence)
    return own
