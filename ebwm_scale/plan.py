"""Plan a run on a cluster before there is one: memory per GPU at each ZeRO stage, communication,
time, cost, and what to use.

    ebwm plan --config configs/nlp/anchored.yaml --machine h100 --nodes 8 --tokens 100e9
              [--set model.size=xl ...]
    ebwm plan --machines                the table of machines

Sizes that a dataset would give have to be named where there is none: --set
model.vocabulary_size=32000 data.context_length=256. Figures are predictions: memory is compared
with measurements in the tests; times on GPUs rest on counted launches, bytes and FLOPs, on
assumed rates (ebwm_scale/planning/gpu_time.py) and on no overlap of communication with computation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, add_config, add_overrides, command
from ebwm_scale.core.errors import EXIT_FAILED, EXIT_FINISHED, ConfigError
from ebwm_scale.planning.flops import step_flops
from ebwm_scale.planning.hardware import MACHINES, Machine
from ebwm_scale.planning.planner import Plan, plan, recommended


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    add_config(parser)
    add_overrides(parser)
    parser.add_argument(
        "--machine",
        default="h100",
        choices=sorted(MACHINES),
        help="kind of node (default %(default)s)",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--gpus-per-node", type=int, default=None, metavar="N", help="default: all of the node"
    )
    parser.add_argument(
        "--tokens",
        type=float,
        default=None,
        metavar="N",
        help="observed positions to train on (default: those of train.max_steps)",
    )
    parser.add_argument("--machines", action="store_true", help="print the table of machines")
    options = parser.parse_args(arguments)
    if options.machines:
        print(machines())
        return EXIT_FINISHED
    if options.config is None:
        raise ConfigError("--config is missing: name a configuration, see configs/")
    if options.nodes < 1 or (options.gpus_per_node or 1) < 1 or (options.tokens or 1) <= 0:
        raise ConfigError("--nodes, --gpus-per-node and --tokens must be above 0")
    config = sized(load_config(options.config, options.overrides))
    machine = MACHINES[options.machine]
    plans = plan(config, machine, nodes=options.nodes, gpus_per_node=options.gpus_per_node)
    gpus = options.nodes * (options.gpus_per_node or machine.gpus)
    print(describe(config, machine, plans, gpus=gpus, nodes=options.nodes, tokens=options.tokens))
    return EXIT_FINISHED if recommended(plans) else EXIT_FAILED


def sized(config: Config) -> Config:
    """With the sizes of its dataset, where it names one that is there; ConfigError for sizes that
    are missing.
    """
    from ebwm_scale.data.format.manifest import load_manifest
    from ebwm_scale.training.preflight import fill_from_data

    path = config.data.manifest or (
        config.data.sources[0].manifest if config.data.sources else None
    )
    if path and Path(path).exists():
        return fill_from_data(config, load_manifest(path))
    missing = [] if config.data.context_length else ["data.context_length=256"]
    if config.state.kind == "vocabulary" and config.model.vocabulary_size is None:
        missing.append("model.vocabulary_size=32000")
    if config.state.kind == "embedding" and config.state.dimension is None:
        missing.append("state.dimension=256")
    if missing:
        raise ConfigError(
            "there is no dataset to take sizes from: name them, for example --set "
            f"{' '.join(missing)}"
        )
    return config


def positions_per_step(config: Config) -> int:
    """Observed positions of one step; the configuration is sized()."""
    assert config.data.context_length is not None
    return config.train.global_batch_size * config.data.context_length


def machines() -> str:
    rows = [("machine", "GPUs", "GiB", "bf16", "fp32", "within", "between", "")]
    rows += [
        (
            m.name,
            str(m.gpus),
            f"{m.memory:.0f}",
            f"{m.bf16:g}",
            f"{m.fp32:g}",
            f"{m.within:g}",
            f"{m.between:g}",
            m.source,
        )
        for m in MACHINES.values()
    ]
    return (
        _table(rows)
        + "\npeaks in TFLOP/s, bandwidths in GB/s per GPU and direction: vendors' figures"
    )


def describe(
    config: Config,
    machine: Machine,
    plans: list[Plan],
    *,
    gpus: int,
    nodes: int,
    tokens: float | None,
) -> str:
    """The plans as text."""
    unit = "tokens" if config.state.kind == "vocabulary" else "frames"
    per_step = positions_per_step(config)
    ramp = BatchRamp.of(config.train)
    positions = per_step // config.train.global_batch_size
    budget = tokens or ramp.samples_before(config.train.max_steps) * positions
    batch = f"{config.train.global_batch_size} samples of {config.data.context_length} {unit}"
    samples = math.ceil(budget / positions)
    num_steps = ramp.steps_for(samples)
    flops = sum(step_flops(config, samples=samples).values())
    lines = [
        f"{nodes} x {gpus // nodes} {machine.name}: {machine.source}",
        f"global batch {batch}, {config.train.precision}",
        *([f"ramp {ramp.describe()}: figures per step are of the last"] if ramp.pieces else []),
        "",
    ]
    rows = [
        (
            "ZeRO",
            "micro-batch",
            "GiB per GPU",
            "sent GB/step",
            "compute s",
            "communication s",
            "step s",
            "MFU",
            f"{unit}/day",
            "days",
            "GPU-hours",
        )
    ]
    for p in plans:
        days = budget / p.tokens_per_day
        if ramp.pieces:
            days = p.run_s(ramp, num_steps) / 86400
        rows.append(
            (
                str(p.stage),
                f"{p.micro_batch} x {p.accumulation}" if p.fits else "none fits",
                f"{p.memory['total']:.2f}",
                f"{p.gigabytes:.2f}",
                f"{p.compute_s:.3f}",
                f"{p.communication_s:.3f}",
                f"{p.step_s:.3f}",
                "" if p.mfu is None else f"{100 * p.mfu:.1f} %",
                f"{p.tokens_per_day:.3g}",
                f"{days:.2f}",
                f"{24 * days * gpus:,.0f}",
            )
        )
    lines.append(_table(rows))
    best = recommended(plans)
    if best is None:
        lines.append(
            f"\nnothing fits into {machine.memory:.0f} GiB: take more GPUs, "
            "refinement.recompute=block, deepspeed.offload=optimizer, or a smaller "
            "refinement.tile_rows"
        )
    else:
        lines += [
            "",
            f"recommended: deepspeed.zero_stage={best.stage} "
            f"train.micro_batch_size={best.micro_batch}"
            + (
                " refinement.recompute=block"
                if best.stage == 3 and config.model.kind == "energy"
                else ""
            ),
            "memory per GPU at that stage, GiB: "
            + ", ".join(f"{part} {value:.3f}" for part, value in best.memory.items()),
        ]
    lines.append(
        f"{budget:.3g} {unit} are {num_steps:,} steps and {flops:.3g} FLOPs. "
        + (
            "Times rest on counted launches, bytes and FLOPs, on assumed rates "
            "(ebwm_scale/planning/gpu_time.py), no CUDA graph and no overlap; "
            "measure with tools/gpu/session.py."
            if machine.assumed
            else "Rates are fitted to measured steps of that machine."
        )
    )
    return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
