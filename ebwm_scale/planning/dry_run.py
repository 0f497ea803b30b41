"""The text of --dry-run: parameters, batch, data, FLOPs, memory and speed of a run before it
starts.
"""

from __future__ import annotations

from torch import nn

from ebwm_scale.config import resolved
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.checks import batch_arithmetic
from ebwm_scale.config.schema import Config
from ebwm_scale.config.sequence_checks import num_readers
from ebwm_scale.planning.flops import model_flops, run_flops, step_flops
from ebwm_scale.planning.hardware import peak_flops_per_s
from ebwm_scale.planning.memory import memory_estimate
from ebwm_scale.planning.parameters import count_parameters


def describe(
    config: Config,
    model: nn.Module,
    *,
    world_size: int,
    data_summary: dict | None,
    seconds_per_step: float | None,
) -> str:
    """The text of --dry-run: parameters, batch, data, FLOPs, memory and, given the seconds of a
    training step, speed and time left. Of a batch ramp a training step is one of the last batches,
    and the run is what all of its steps hold.

    data_summary: manifest, fingerprint, train_samples, train_tokens (or frames),
    validation_samples, validation_tokens (or frames), vocabulary_size (or dimension),
    context_length; or None. Raises ConfigError when the batch does not divide over the processes.
    """
    train, positions = config.train, resolved.context_length(config)
    readers = num_readers(config, world_size)
    micro_batch, accumulation = batch_arithmetic(train, readers, paired=config.refinement.replay)
    sharing = config.parallel.sequence
    processes = f"{world_size} processes"
    if sharing > 1:
        processes = f"{readers} groups of {sharing} processes"
    ramp = BatchRamp.of(train)
    tokens = train.global_batch_size * positions
    all_samples = ramp.samples_before(train.max_steps)
    unit = resolved.unit(config)
    counts, flops = count_parameters(model), step_flops(config, samples=train.global_batch_size)
    memory = memory_estimate(config, world_size=world_size, micro_batch=micro_batch)
    total_flops = sum(flops.values())
    energy = config.model.kind == "energy"

    lines = _section(
        "parameters",
        [
            (part, f"{count:>15,} numbers", _percent(count, counts["total"]))
            for part, count in counts.items()
        ],
    )
    lines += _section(
        "batch",
        [
            (
                "global batch",
                f"{train.global_batch_size:>15,} samples",
                (f"= {processes} x {micro_batch} samples x {accumulation} accumulation steps"),
            ),
            ("sample", f"{positions:>15,} {unit}", ""),
            (
                "training step",
                f"{tokens:>15,} {unit}",
                f"{config.refinement.num_steps} refinement steps" if energy else "",
            ),
            ("run", f"{train.max_steps:>15,} steps", f"{all_samples * positions:,} {unit}"),
            *([("ramp", ramp.describe(), "samples per step")] if ramp.pieces else []),
        ],
    )
    if data_summary is not None:
        epochs = all_samples / data_summary["train_samples"]
        lines += _section(
            "data",
            [
                ("manifest", str(data_summary["manifest"]), ""),
                ("fingerprint", f"{data_summary['fingerprint']} (sha256)", ""),
                *(
                    (
                        split,
                        f"{data_summary[f'{split}_samples']:>15,} samples",
                        f"{data_summary[f'{split}_{unit}']:,} {unit}",
                    )
                    for split in ("train", "validation")
                ),
                ("vocabulary", f"{data_summary['vocabulary_size']:>15,} tokens", "")
                if unit == "tokens"
                else ("embedding", f"{data_summary['dimension']:>15,} numbers", ""),
                ("context", f"{data_summary['context_length']:>15,} {unit}", ""),
                ("run", f"{epochs:>15,.2f} epochs", "passes over the training samples"),
            ],
        )
    lines += _section(
        "FLOPs per training step, all processes",
        [
            (part, f"{value / 1e12:>15,.4f} TFLOP", _percent(value, total_flops))
            for part, value in [*flops.items(), ("total", total_flops)]
        ]
        + [("run", f"{run_flops(config) / 1e12:>15,.4f} TFLOP", "all training steps")],
    )
    lines += _section(
        "memory per process, estimated",
        [
            (part, f"{value:>15,.3f} GiB", _percent(value, memory["total"]))
            for part, value in memory.items()
        ],
    )
    if seconds_per_step is not None:
        rate = total_flops / seconds_per_step / world_size
        peak = peak_flops_per_s(train.precision)
        useful = model_flops(flops) / seconds_per_step / world_size
        utilisation = (
            "" if peak is None else f"{100 * useful / peak:.1f} % MFU, recomputation left out"
        )
        # a step of a ramp makes as many of a whole one's passes as it has of its samples
        left = seconds_per_step * all_samples / train.global_batch_size
        lines += _section(
            "speed, a guess from few steps",
            [
                ("training step", f"{seconds_per_step:>15,.3f} s", ""),
                ("throughput", f"{tokens / seconds_per_step:>15,.0f} {unit}/s", ""),
                ("per process", f"{rate / 1e12:>15,.3f} TFLOP/s", utilisation),
                (
                    "time left",
                    f"{left / 3600:>15,.2f} h",
                    f"for {train.max_steps:,} steps, without validation and checkpoints",
                ),
            ],
        )
    return "\n".join(lines)


def _section(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    return [title, *(f"  {name:<22} {value}  {note}".rstrip() for name, value, note in rows)]


def _percent(value: float, total: float) -> str:
    return f"{100 * value / total:5.1f} %"
