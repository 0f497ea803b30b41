"""Where a process keeps what it updates of a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A range of a parameter inside of a tensor that the optimizer updates.

    offset: where it begins in the flattened tensor; start: where in the flattened parameter; count
    numbers.
    """

    tensor: Tensor
    offset: int
    start: int
    count: int

    def part_of(self, whole: Tensor) -> Tensor:
        """The range's flat view in the tensor, or in another one that lies like it."""
        return whole.view(-1)[self.offset : self.offset + self.count]
