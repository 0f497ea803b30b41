"""What a configuration would take on a cluster: memory, communication, time, cost; which ZeRO stage
and micro-batch to use. Nothing is allocated.

    python -m ebwm_scale.plan --config configs/nlp/anchored.yaml --machine h100 --nodes 8
        --tokens 100e9

Memory and FLOPs are planning/flops.py's. Time is the sum of
    computation      on a GPU counted launches, bytes and FLOPs over assumed rates (gpu_time.py);
                     on a CPU FLOPs of each part over the share of the peak that it reaches
    communication    bytes that a process sends and receives over its bandwidth, nothing overlapped
so a plan is slower than what overlaps well. The shares of the two CPU machines are fitted to
measured steps, and tests compare the fit with every measured step there is (results/planner.json).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.checks import batch_arithmetic
from ebwm_scale.config.resolved import context_length
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.planning.flops import model_flops, step_flops
from ebwm_scale.planning.gpu_time import gpu_seconds
from ebwm_scale.planning.hardware import HEADROOM, Machine
from ebwm_scale.planning.memory import memory_estimate
from ebwm_scale.planning.parameters import count_parameters
from ebwm_scale.refinement.step_plan import num_graph_steps

# Times a block's parameters are gathered per refinement step at stage 3
# (refinement/block_recompute.py): of a step that is differentiated, and of one that is not.
GRADIENT_PASSES = {"graph": 4, "plain": 2}


@dataclass(frozen=True)
class Plan:
    """Of one ZeRO stage.

    memory: GiB by part; seconds of a training step; None where not even one sample fits. Of a batch
    ramp everything is of the last batches, which are the largest, but ramp_s.
    """

    stage: int
    micro_batch: int | None
    accumulation: int | None
    memory: dict[str, float]
    gigabytes: float
    compute_s: float
    communication_s: float
    mfu: float | None
    tokens_per_day: float
    ramp_s: tuple[float, ...] = ()  # seconds of a step of each piece of train.batch_ramp

    @property
    def fits(self) -> bool:
        return self.micro_batch is not None

    @property
    def step_s(self) -> float:
        return self.compute_s + self.communication_s

    def run_s(self, ramp: BatchRamp, num_steps: int) -> float:
        """Seconds of the first steps of a run whose ramp it was planned for."""
        of_sizes = zip(ramp.steps_of_sizes(num_steps), [*self.ramp_s, self.step_s], strict=True)
        return sum(steps * seconds for steps, seconds in of_sizes)


def plan(
    config: Config,
    machine: Machine,
    *,
    nodes: int,
    gpus_per_node: int | None = None,
    micro_batch: int | None = None,
) -> list[Plan]:
    """A plan for each ZeRO stage that the configuration can run at, with its largest micro-batch
    that fits (or the one given).

    Needs what step_flops needs: data.context_length and the size of the vocabulary or the state.
    Raises ConfigError where the global batch does not divide, and where processes share samples:
    what they exchange is not in the estimate.
    """
    if config.parallel.sequence > 1:
        raise ConfigError(
            f"parallel.sequence is {config.parallel.sequence}: a plan does not count what "
            "processes that share samples exchange; plan with parallel.sequence=1"
        )
    gpus = gpus_per_node or machine.gpus
    world = nodes * gpus
    if config.train.precision == "bf16" and not machine.bf16:
        raise ConfigError(
            f"train.precision is bf16, which {machine.name} is not planned for; use fp32"
        )
    size = config.train.micro_batch_size or micro_batch
    candidates = [size] if size else _divisors(config, world)
    plans = []
    for stage in (0, 1, 2, 3):
        staged = config.replace(deepspeed=config.deepspeed.replace(zero_stage=stage))
        if stage == 3 and config.model.kind == "energy":
            staged = staged.replace(refinement=staged.refinement.replace(recompute="block"))
        plans.append(_plan(staged, machine, nodes, gpus, candidates))
    return plans


def recommended(plans: list[Plan]) -> Plan | None:
    """The fastest that fits; of plans within 2 % of it the lowest stage."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return None
    fastest = min(plan.step_s for plan in fitting)
    return next(plan for plan in fitting if plan.step_s <= 1.02 * fastest)


def _divisors(config: Config, world: int) -> list[int]:
    """Micro-batches that the global batch, and every batch of a ramp, divides into, largest first.

    Raises ConfigError for a world that it does not divide into at all.
    """
    batch_arithmetic(config.train, world, paired=config.refinement.replay)
    share = math.gcd(*(size // world for size in BatchRamp.of(config.train).sizes))
    return [
        size
        for size in range(share, 0, -1)
        if share % size == 0 and not (config.refinement.replay and size % 2)
    ]


def _plan(config: Config, machine: Machine, nodes: int, gpus: int, candidates: list[int]) -> Plan:
    world, device = nodes * gpus, machine.device
    room, chosen, memory = machine.memory * (1 - HEADROOM), None, {}
    for size in candidates:
        memory = memory_estimate(config, world_size=world, micro_batch=size, device=device)
        if memory["total"] <= room:
            chosen = size
            break
    size = chosen or candidates[-1]
    *ramp, last = [
        _step_cost(config, machine, nodes, world, share=samples // world, micro_batch=size)
        for samples in BatchRamp.of(config.train).sizes
    ]
    useful = model_flops(step_flops(config, samples=config.train.global_batch_size // world))
    peak = machine.peak(config.train.precision)
    step = last.seconds
    tokens = config.train.global_batch_size * context_length(config)
    return Plan(
        stage=config.deepspeed.zero_stage,
        micro_batch=chosen,
        accumulation=last.accumulation if chosen else None,
        memory=memory,
        gigabytes=last.gigabytes,
        compute_s=last.compute_s,
        communication_s=last.communication_s,
        mfu=useful / step / peak,
        tokens_per_day=86400 / step * tokens,
        ramp_s=tuple(cost.seconds for cost in ramp),
    )


class _StepCost(NamedTuple):
    """Of one training step."""

    accumulation: int
    gigabytes: float
    compute_s: float
    communication_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.communication_s


def _step_cost(
    config: Config, machine: Machine, nodes: int, world: int, *, share: int, micro_batch: int
) -> _StepCost:
    """share: samples of each process."""
    accumulation = -(-share // micro_batch)
    gigabytes = communicated(config, world=world, accumulation=accumulation) / 1e9
    communication = 0.0
    if world > 1:
        communication = gigabytes / (machine.within if nodes == 1 else machine.between)
    compute = compute_seconds(config, machine, samples=share, micro_batch=micro_batch)
    return _StepCost(accumulation, gigabytes, compute, communication)


def compute_seconds(
    config: Config, machine: Machine, *, samples: int, micro_batch: int | None = None
) -> float:
    """Of one training step of `samples` samples on one GPU (or on a CPU of the table).

    micro_batch: samples at a time; default: all.
    """
    if machine.rates is None:
        return gpu_seconds(config, machine, samples=samples, micro_batch=micro_batch or samples)
    peak = machine.peak(config.train.precision)
    seconds = 0.0
    for part, value in step_flops(config, samples=samples).items():
        seconds += value / (peak * machine.rates[_kind_of_work(part)])
    return seconds


def _kind_of_work(part: str) -> str:
    """Which rate of a CPU a part of step_flops runs at."""
    if part.startswith("attention"):
        return "attention"
    if part in ("vocabulary", "output", "state_projection"):
        return "vocabulary"
    return "blocks"


def communicated(config: Config, *, world: int, accumulation: int) -> float:
    """Bytes that a process sends in a training step, ring algorithms: (n - 1) / n of what is
    reduced or gathered.

    stage 0, 1   gradients are reduced and come back (or weights do):     2 P
    stage 2      gradients of every micro-batch are reduced, weights gathered:   accumulation P + P
    stage 3      gradients as stage 2; weights are gathered whenever a block is computed: per
                 micro-batch, twice for the baseline and for the observed stream, and
                 GRADIENT_PASSES times for every refinement step (refinement/block_recompute.py);
                 what lies outside the blocks once
    """
    import torch

    from ebwm_scale.world_model import WorldModel

    with torch.device("meta"):
        counts = count_parameters(WorldModel(config))
    element, stage, parameters = (
        (2 if config.train.precision == "bf16" else 4),
        config.deepspeed.zero_stage,
        counts["total"],
    )
    if stage <= 1:
        moved = 2.0 * parameters
    elif stage == 2:
        moved = (accumulation + 1.0) * parameters
    else:
        blocks = counts["blocks"]
        passes = 2.0
        if config.model.kind == "energy":
            steps = config.refinement.num_steps
            graph = num_graph_steps(config.refinement, steps)
            passes = (
                2.0 + GRADIENT_PASSES["graph"] * graph + GRADIENT_PASSES["plain"] * (steps - graph)
            )
        moved = accumulation * (passes * blocks + (parameters - blocks) + parameters)
    return element * moved * (world - 1) / world
