"""Weights and optimizer state by parameter name, whatever the ZeRO stage: what each process holds,
and how any process takes what it needs.

A shard is a range of a flattened parameter: its float32 weights (the master copy, where there is
one), the moments of AdamW or Muon, and the weights' average where there is one.

    stage 0     every process holds everything; of the parameters in order, process r writes those
                with index % world size == r
    stage 1, 2  a process holds a range of all parameters laid end to end: shards that may start
                and end inside a parameter
    stage 3     a process holds the r-th part of every parameter

`save` takes the shards of this process, `load` any set of shards that cover the parameters: so a
checkpoint of any number of processes and any stage continues on any other. Values are copied as
they are: with nothing changed, the continued run is bitwise the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebwm_scale.checkpoint.parameter_shard import (
    AVERAGE,
    MOMENTS,
    MOMENTUM,
    OF_WEIGHTS,
    ParameterShard,
)
from ebwm_scale.training.deepspeed.partitioned import partitioned
from ebwm_scale.training.place import Place
from ebwm_scale.training.weight_average import WeightAverage


class ZeroState:
    """The shards of a DeepSpeed engine's process.

    `stage`, `half`: deepspeed.zero_stage, and whether weights are bf16. `average`: of the weights
    (train.ema), or None.
    """

    def __init__(
        self,
        deepspeed_engine,
        *,
        stage: int,
        half: bool,
        rank: int,
        world_size: int,
        average: WeightAverage | None = None,
    ):
        self.average = average
        self.module, self.optimizer = deepspeed_engine.module, deepspeed_engine.optimizer
        self.stage = stage
        self.half = half
        self.rank = rank
        self.world_size = world_size
        self.inner = (
            self.optimizer if stage == 0 and not half else self.optimizer.optimizer
        )  # torch's AdamW
        self.masters: dict[int, Tensor] = {}  # stage 0 in bf16: parameter -> float32 copy
        if stage == 0 and half:
            self.masters = {
                id(p): master
                for group, copies in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups)
                for p, master in zip(group, copies)
            }

    def shards(self) -> Iterator[ParameterShard]:
        for index, (name, p) in enumerate(self.module.named_parameters()):
            start, values = self._with_average(name, p)
            owned = (
                self.stage == 3
                or (self.stage > 0 and p.requires_grad)
                or index % self.world_size == self.rank
            )
            if owned and values and values["weight"].numel():
                yield ParameterShard(name, start, values)

    def places(self) -> Iterator[tuple[str, Place]]:
        """What this process updates, of each parameter that is learned: over all processes each
        number once.
        """
        for index, (name, p) in enumerate(self.module.named_parameters()):
            if not p.requires_grad:
                continue
            place = self.place_of(p)
            is_owned = self.stage > 0 or index % self.world_size == self.rank
            if is_owned and place is not None and place.count:
                yield name, place

    def weights(self) -> dict[str, Tensor]:
        """Views of the float32 weights that this process updates, flat, by parameter."""
        found = {}
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                _, values = self._local(p)
                if values and values["weight"].numel():
                    found[name] = values["weight"]
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it forward passes use the weights' average; behind it what they used before, to
        the bit. Every rank must enter it. Takes a copy of the model.
        """
        kept = []
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                if not p.requires_grad:
                    continue
                used = partitioned(p).ds_tensor if self.stage == 3 else p.data
                kept.append((used, used.clone()))
                self._use_average(name, p, used)
        try:
            yield
        finally:
            for used, before in kept:
                used.copy_(before)

    def _use_average(self, name: str, p: nn.Parameter, used: Tensor) -> None:
        """Write the average into what the forward pass uses: of stage 3 this process's part.

        Before the first update the average is the weights.
        """
        start, values = self._with_average(name, p)
        mine = values.get(AVERAGE, values.get("weight"))
        if self.stage in (0, 3):
            if mine is not None:
                used.view(-1)[: mine.numel()].copy_(mine)
            return
        whole = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        if mine is not None:
            whole[start : start + mine.numel()].copy_(mine)
        if self.world_size > 1:
            dist.all_reduce(whole)  # each number is one process's
        used.view(-1).copy_(whole)

    def step_count(self) -> float:
        """Updates AdamW has made, the same for all parameters; skipped ones do not count."""
        counts = (state["step"] for state in self.inner.state.values() if "step" in state)
        return float(next(counts, 0.0))

    def load(self, read: Callable[[str, str], Tensor], step_count: float) -> None:
        """read(name, kind) -> the whole flattened float32 tensor; called for one parameter after
        the other.
        """
        self._create_moments(step_count)
        if self.average is not None:
            self.average.updates = int(step_count)
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                start, values = self._with_average(name, p)
                weight = read(name, "weight")
                for kind, mine in values.items():
                    whole = weight if kind == "weight" else read(name, kind)
                    mine.copy_(whole[start : start + mine.numel()])
                if self.stage == 3:
                    own = partitioned(p).ds_tensor
                    part = weight[self.rank * own.numel() :][: own.numel()]
                    own[: part.numel()].copy_(part)
                if p.numel() == weight.numel():  # what the forward pass sees
                    p.copy_(weight.view_as(p))

    def _with_average(self, name: str, p: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
        """What _local gives, and the average of these weights where there is one."""
        start, values = self._local(p)
        if self.average is not None and name in self.average.values:
            values[AVERAGE] = self.average.values[name]
        return start, values

    def _local(self, p: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
        """(start, kind -> flat view) of what this process updates of p; no values where that is
        nothing.
        """
        place = self.place_of(p)
        if place is None:
            return 0, {}
        state = self.inner.state.get(place.tensor, {})
        kinds = (*MOMENTS, MOMENTUM, *OF_WEIGHTS)
        kept = {key: place.part_of(state[key]) for key in kinds if key in state}
        return place.start, {"weight": place.part_of(place.tensor.detach()), **kept}

    def place_of(self, p: nn.Parameter) -> Place | None:
        """Where this process keeps its part of p; None where it has none."""
        if self.stage == 3:
            return self._partition_of(p)
        if not p.requires_grad or self.stage == 0:
            return Place(self.masters.get(id(p), p), 0, 0, p.numel())
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        flat = self.optimizer.single_partition_of_fp32_groups[self.group_of(p)]
        return Place(flat, address.start, mapping.lp_fragment_address.start, address.numel)

    def _partition_of(self, p: nn.Parameter) -> Place:
        own = partitioned(p).ds_tensor
        size = getattr(own, "ds_numel", own.numel())
        start = self.rank * size
        count = max(0, min(size, partitioned(p).ds_numel - start))
        if not p.requires_grad:
            return Place(own, 0, start, count)
        group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
        return Place(self.optimizer.fp32_partitioned_groups_flat[group], offset, start, count)

    def group_of(self, p: nn.Parameter) -> int:
        """The number of its group among the optimizer's, alike on all processes."""
        if self.stage == 3:
            part, _, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
            return self.optimizer.sub_group_to_group_id[part]
        return next(
            i for i, group in enumerate(self.optimizer.bit16_groups) if any(p is q for q in group)
        )

    def _create_moments(self, step_count: float) -> None:
        """The optimizer makes its state in its first update; here it is needed before."""
        if self.stage == 3:
            group_of = self.optimizer.sub_group_to_group_id
            updated = [
                (tensor, "momentum" in self.inner.param_groups[group_of[index]])
                for index, tensor in enumerate(self.optimizer.fp32_partitioned_groups_flat)
            ]
        else:
            updated = [
                (tensor, "momentum" in group)
                for group in self.inner.param_groups
                for tensor in group["params"]
            ]
        for tensor, is_muons in updated:
            state = self.inner.state[tensor]
            if not is_muons:
                state["step"] = torch.tensor(step_count, dtype=torch.float32)
            kinds = getattr(self.inner, "kinds", MOMENTS)
            for key in (MOMENTUM,) if is_muons else kinds:
                if key not in state:
                    state[key] = torch.zeros_like(tensor)
