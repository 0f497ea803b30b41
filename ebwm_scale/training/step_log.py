"""What a training step is told to people and files: one row of metrics.jsonl and one line."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from ebwm_scale.config import resolved
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.planning.flops import model_flops, step_flops
from ebwm_scale.planning.hardware import peak_flops_per_s


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank.

    values (1 + N + N,): loss, loss_per_step, energy_per_step, means over this rank's part of the
    global batch; a baseline has no energies. samples: ids of this rank's part. norms: of all ranks,
    by part and kind (norms.py), where they were measured.
    """

    values: torch.Tensor
    num_steps: int
    gradient_norm: float
    learning_rate: float
    samples: list[int]
    norms: dict[str, dict[str, float]] | None = None

    @property
    def applied(self) -> bool:
        """Whether the weights were updated.

        A norm that is not finite keeps every rank from it (Engine.step).
        """
        return math.isfinite(self.gradient_norm)


class StepTimer:
    """Wall seconds per step since the last reading.

    Validation and saving are left out by restarting it.
    """

    def __init__(self, step: int):
        self.last = float("nan")  # the last reading
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step = step
        self.start = time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        if step > self.step:
            self.last = (time.perf_counter() - self.start) / (step - self.step)
        self.restart(step)
        return self.last


def metrics_row(
    config: Config,
    world: World,
    result: StepResult,
    *,
    step: int,
    unit: str,
    step_size: float | None,
    seconds: float,
) -> dict[str, Any]:
    """The row of a step. Every rank must call it.

    unit: tokens or frames. step_size: alpha of an energy model. seconds: per step.
    """
    values = (world.all_reduce(result.values) / world.size).tolist()
    num_steps = result.num_steps
    energies = values[1 + num_steps :] if config.model.kind == "energy" else None
    ramp = BatchRamp.of(config.train)
    samples = ramp.size(step - 1)
    positions = resolved.context_length(config)
    samples_left = ramp.samples_before(config.train.max_steps) - ramp.samples_before(step)
    per_step = samples * positions
    flops = step_flops(config, samples=samples, num_steps=num_steps)
    flops_per_process = model_flops(flops) / world.size
    peak = peak_flops_per_s(config.train.precision)
    return {
        "step": step,
        f"{unit}_seen": ramp.samples_before(step) * positions,
        "loss": values[0],
        "loss_per_step": values[1 : 1 + num_steps],
        "energy_per_step": energies,
        "grad_norm": result.gradient_norm,
        "learning_rate": result.learning_rate,
        "step_size": step_size,
        "step_time_s": seconds,
        f"{unit}_per_s": per_step / seconds,
        "model_tflops": flops_per_process / seconds / 1e12,
        "mfu": flops_per_process / seconds / peak if peak else None,
        "peak_memory_gib": _peak_memory_gib(on_gpu=world.device.type == "cuda"),
        "eta_s": seconds * (samples_left / samples),
        **({} if result.norms is None else {"norms": result.norms}),
    }


def step_line(row: dict[str, Any], *, max_steps: int, unit: str) -> str:
    """The row for a person."""
    step = f"{row['step']:>{len(str(max_steps))}}"
    line = f"step {step}/{max_steps}  loss {row['loss']:.4f}"
    if row["step_size"] is not None:
        steps = " -> ".join(f"{loss:.3f}" for loss in row["loss_per_step"])
        line += f" ({steps})  alpha {row['step_size']:.4g}"
    line += f"  grad {row['grad_norm']:.3g}  lr {row['learning_rate']:.2e}"
    line += f"  {row[f'{unit}_per_s']:,.0f} {unit}/s  ETA {format_duration(row['eta_s'])}"
    return line


def validation_line(row: dict[str, Any], step: int) -> str:
    """A row of validation for a person: losses after 0, 1 .. N steps, and what they compare to."""
    losses = row["loss_per_step"]
    if row["initial_loss"] is not None:
        losses = [row["initial_loss"], *losses]
    steps = " -> ".join(f"{loss:.4f}" for loss in losses)
    if "unigram_entropy" in row:
        measure = f"nats/token (unigram entropy {row['unigram_entropy']:.4f})"
    else:
        measure = (
            f"SmoothL1 (persistence {row['persistence_loss']:.4f}, "
            f"linear extrapolation {row['linear_extrapolation_loss']:.4f})"
        )
    return f"validation at step {step}: {steps} {measure}"


def further_lines(row: dict[str, Any]) -> list[str]:
    """What else a row of validation holds (training/downstream.py), for a person."""
    lines = []
    for kind in ("sets", "questions", "tasks"):
        for name, values in row.get(kind, {}).items():
            figures = [
                f"{key} {value:.4g}" for key, value in values.items() if isinstance(value, float)
            ]
            lines.append(f"  {kind}/{name}: {', '.join(figures)}")
    samples = [
        f"  sample: {sample['prompt'][-60:]!r} >> {sample['continuation']!r}"
        for sample in row.get("samples", ())
    ]
    return [*lines, *samples]


def format_duration(seconds: float) -> str:
    """3:07 or 2:03:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def _peak_memory_gib(*, on_gpu: bool) -> float:
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak *= 1024  # Linux counts KiB
    return peak / 2**30
