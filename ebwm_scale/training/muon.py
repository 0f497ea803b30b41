"""Muon beside AdamW as one optimizer, on whole matrices or on what ZeRO leaves of them.

    momentum    b <- m b + (1 - m) g                number by number, so a part does with its parts
    update      u = orthogonalized((1 - m) g + m b) of a whole matrix: 5 rounds of Newton-Schulz
    weights     w <- (1 - rate decay) w - rate 0.2 sqrt(max(rows, columns)) u

Without ZeRO all of this is torch.optim.Muon's. Under ZeRO a process holds ranges of some matrices,
flattened (deepspeed/zero_state.py). So of as many matrices at a time as there are processes, each
process is sent the parts of one, orthogonalizes it, and sends the result to all. What is computed
is the same, number for number, so all stages train alike.

Sources: Muon, Jordan et al. 2024; its scale, arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from ebwm_scale.checkpoint.parameter_shard import MOMENTUM
from ebwm_scale.training.place import Place


@dataclass(frozen=True)
class Matrix:
    """One that ZeRO has cut.

    place: this process's part of it, None without one. group: the number of its group, by which
    processes without a part know when its turn is.
    """

    shape: torch.Size
    place: Place | None
    group: int

    def is_in(self, flat: Tensor, group: int) -> bool:
        """Whether it is updated with this flat tensor, of the group of that number."""
        return self.group == group if self.place is None else self.place.tensor is flat


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one: their groups, the same objects, and a state that they share.

    DeepSpeed puts float32 copies in place of parameters into the groups, or flat parts of many of
    them, and may step one group at a time; what is in param_groups then is what is stepped.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self.muon = muon
        self.adamw = adamw
        self.matrices: Sequence[Matrix] | None = None  # in one order on all ranks, under ZeRO
        self.groups: Sequence[dict[str, Any]] = ()  # all of them, then
        self.rank = 0
        self.world_size = 1
        self.device = torch.device("cpu")  # where processes meet

    def share(
        self, matrices: Sequence[Matrix], *, rank: int, world_size: int, device: torch.device
    ) -> None:
        """Say how ZeRO has cut the matrices; before the first step, alike on all ranks."""
        self.matrices = matrices
        self.groups = tuple(self.param_groups)
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Muon's update of its matrices and AdamW's of the others."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_muon = [group for group in self.param_groups if "momentum" in group]
        for part in (self.muon, self.adamw):
            part.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.adamw.step()
        for group in of_muon:
            for p in group["params"]:
                if p.grad is not None and MOMENTUM not in self.state[p]:
                    # laid out as the parameter, whatever the gradient's strides: it is saved flat
                    self.state[p][MOMENTUM] = torch.zeros_like(p)
        if self.matrices is None:
            self.muon.param_groups = of_muon
            self.muon.step()
            return loss
        for group in of_muon:
            (number,) = [i for i, other in enumerate(self.groups) if other is group]
            for flat in group["params"]:
                self._step_parts(flat, number, group)
        return loss

    def _step_parts(self, flat: Tensor, number: int, group: dict[str, Any]) -> None:
        """The update of a group's matrices: of those that have a part in a flat tensor of this
        process, and of those that have one in other processes' alone. All processes take the same
        ones in the same order.
        """
        assert self.matrices is not None
        update = None
        if flat.grad is not None:
            momentum = self.state[flat][MOMENTUM]
            momentum.lerp_(flat.grad, 1 - group["momentum"])
            update = momentum
            if group["nesterov"]:
                update = flat.grad.lerp(momentum, group["momentum"])
        matrices = [matrix for matrix in self.matrices if matrix.is_in(flat, number)]
        for first in range(0, len(matrices), self.world_size):
            self._step_some(matrices[first : first + self.world_size], update, group)

    def _step_some(
        self, matrices: Sequence[Matrix], update: Tensor | None, group: dict[str, Any]
    ) -> None:
        """Of at most as many matrices as there are processes: the i-th one is process i's."""
        wholes = []
        for owner, matrix in enumerate(matrices):
            whole = torch.zeros(matrix.shape.numel(), dtype=torch.float32, device=self.device)
            place = matrix.place
            if place is not None and update is not None:
                whole[place.start : place.start + place.count].copy_(place.part_of(update))
            if self.world_size > 1:
                dist.reduce(whole, dst=owner)  # each number is one process's
            if owner == self.rank:
                whole.copy_(self._orthogonalized(whole.view(matrix.shape), group).reshape(-1))
            wholes.append(whole)
        for owner, (matrix, whole) in enumerate(zip(matrices, wholes)):
            if self.world_size > 1:
                dist.broadcast(whole, src=owner)
            place = matrix.place
            if place is None or update is None:
                continue
            rate = group["lr"]
            step_size = _adjust_lr(rate, group["adjust_lr_fn"], matrix.shape)
            weights = place.part_of(place.tensor)
            weights.mul_(1 - rate * group["weight_decay"])
            part = whole[place.start : place.start + place.count].to(weights.device)
            weights.add_(part, alpha=-step_size)

    def _orthogonalized(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        return _zeropower_via_newtonschulz(
            matrix, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
