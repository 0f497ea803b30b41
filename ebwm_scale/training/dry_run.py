"""train.py --dry-run: what would run and what it costs, with the time of a step measured on this
machine. Writes nothing.

A CPU measures a small part of a step, of at most MEASURED_FLOPS, and scales it by the FLOPs of the
whole; a GPU measures a whole micro-batch.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable

import torch

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.model.conditions import example_conditions
from ebwm_scale.planning.dry_run import describe
from ebwm_scale.planning.flops import step_flops
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.preflight import RunCheck
from ebwm_scale.world_model import WorldModel

MEASURED_FLOPS = 5e10  # a second or two of two CPU cores
PATIENCE_S = 5.0  # a first pass that took longer is not repeated
BYTES_PER_PARAMETER = 12  # weights, gradients, and what a step holds besides


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured of a micro-batch: some samples, maybe of fewer positions, and how much more
    the whole is.
    """

    config: Config
    samples: int
    factor: float


def dry_run(check: RunCheck, summary: dict, say: Callable[[str], None]) -> None:
    """Print the resolved configuration, the costs, and the time of the run guessed from one step.

    summary: of the data.
    """
    config = check.config
    with torch.device("meta"):
        model = WorldModel(config)
    say(config.to_yaml())
    seconds = None
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    if needed > memory_bytes():
        say(f"not measured: a step needs {needed / 2**30:.0f} GiB, more than this machine has")
    else:
        seconds = measure_step(config, check.micro_batch, say) * check.accumulation
        seconds /= config.parallel.sequence  # measured with whole samples
    say(
        describe(
            config,
            model,
            world_size=check.world_size,
            data_summary=summary,
            seconds_per_step=seconds,
        )
    )
    for _, text in check.warnings:
        say(f"warning: {text}")
    if check.saved is not None:
        say("\n".join([f"would resume at step {check.saved.step}", *check.changes]))


def memory_bytes() -> int:
    """Of the device that would be measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def part_of(config: Config, micro_batch: int, limit: float) -> Part:
    """As many samples of the micro-batch as `limit` FLOPs allow; of one, as many positions."""
    whole = _flops(config, micro_batch)
    samples = micro_batch
    if whole > limit:
        samples = max(1, int(micro_batch * limit / whole))
    small = config
    positions = resolved.context_length(config)
    size = resolved.group_size(config)
    while _flops(small, samples) > limit and positions > size:
        positions = max(1, positions // size // 2) * size
        small = config.replace(data=config.data.replace(context_length=positions))
    return Part(small, samples, whole / _flops(small, samples))


def measure_step(config: Config, micro_batch: int, say: Callable[[str], None]) -> float:
    """Seconds of forward and backward of one micro-batch on random data."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    part = part_of(config, micro_batch, float("inf") if on_gpu else MEASURED_FLOPS)
    positions = resolved.context_length(part.config)
    say(
        f"measuring a training step on this {'GPU' if on_gpu else 'CPU'}: {part.samples} of "
        f"{micro_batch} samples, {positions} of {config.data.context_length} positions"
    )
    model = WorldModel(part.config)
    model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    size = resolved.group_size(config)
    shape = (part.samples, positions + size)
    if config.state.kind == "vocabulary":
        states = torch.randint(resolved.vocabulary_size(config), shape, device=device)
    else:
        states = torch.randn(*shape, resolved.state_dimension(config), device=device)
    conditions = example_conditions(config.data.conditions, part.samples, positions // size)
    seconds = float("inf")
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        output = model(
            states[:, :-size],
            states[:, size:],
            conditions=conditions,
            sample_ids=torch.arange(part.samples),
            source=NoiseSource(0, 0),
        )
        output.loss.backward()
        model.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds > PATIENCE_S:
            break
    return seconds * part.factor


def _flops(config: Config, samples: int) -> float:
    return sum(step_flops(config, samples=samples).values())
