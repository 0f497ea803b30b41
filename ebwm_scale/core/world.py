"""The processes of a run as one object: rank, size, device, and the few things ranks tell each
other.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

WATCHED_TIMEOUT = datetime.timedelta(days=20)  # where a watchdog watches; below 2^31 ms


@dataclass(frozen=True)
class World:
    """sequence: how many neighbouring ranks share each sample (parallel.sequence)."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    sequence: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_readers(self) -> int:
        """How many ranks, or groups of ranks that share each sample, read samples of their own."""
        return self.size // self.sequence

    @property
    def reader(self) -> int:
        """Which of them this rank is in."""
        return self.rank // self.sequence

    @property
    def is_first_reader(self) -> bool:
        """Whether this rank speaks for its group of the samples they share."""
        return self.rank % self.sequence == 0

    def all_reduce(self, tensor: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
        """In place over all ranks, and returned."""
        if self.size > 1:
            dist.all_reduce(tensor, operation)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; every rank must call it."""
        if self.size == 1:
            return flag
        return bool(
            self.all_reduce(torch.tensor(float(flag), device=self.device), dist.ReduceOp.MAX).item()
        )

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value (anything that pickles) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather_object(self, value) -> list:
        """Every rank's value (anything that pickles), in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave_hangs_to_the_watchdog(self) -> None:
        """From now on a collective waits as long as it takes. Its own limit goes by the clock, also
        while all processes were suspended; the watchdog's does not, and names the process to blame.
        """
        if self.size > 1:
            for group in dist.distributed_c10d._world.pg_map:
                dist.distributed_c10d._set_pg_timeout(WATCHED_TIMEOUT, group)

    def store(self) -> dist.Store | None:
        """A connection of one's own to what the process group met at, to say things to other ranks
        from a thread; None where there is no other."""
        if self.size == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()  # torch's stubs know no clone()
        return dist.PrefixStore("ebwm", store.clone())


def is_connection_error(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone, or did not come."""
    signs = (
        "Connection closed by peer",
        "Connection reset",
        "Connection refused",
        "Timed out",
        "timed out",
        "Broken pipe",
        "Socket",
        "NCCL",
        "Application timeout",
    )
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
