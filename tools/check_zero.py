"""Whether every ZeRO stage trains the model that one process in float64 would: differences after 5
steps, for the table in docs/distributed.md.

    python tools/check_zero.py --processes 2 4 [--output results/zero_exactness.json]
        [--stages 0 1 2 3] [--checkpoint none step block] [--precision fp32 bf16]
        [--recipe S1 S2 algorithm_1 baseline looped shallow groups workspace candidates exits world
                  stable read_twice reach]
        [--accumulation 2] [--sequence 2] [--fused] [--break partition]
    python tools/check_zero.py --memory --processes 2 [--output results/zero_memory.json]

Prints a JSON line per combination: the largest difference of any parameter and of any first moment
of AdamW (a mean of the clipped gradients of the steps), each relative to the largest entry of its
tensor, from plain double backward in float64 in one process. Exit code 1 if one is beyond its
limit: in fp32 1e-5 for moments, 3e-5 for parameters, whose rounding AdamW's division magnifies
differently on every kind of machine; in bf16 0.05 for parameters (rounded gradients through AdamW's
division), 0.1 for moments. With candidates 0.2 in bf16: rounded weights change which tokens some
rows choose, at every stage alike (tests/refinement/test_candidates.py). Looped blocks and the
stable recipe have wider limits in fp32 (WIDER_LIMITS says why).
--memory: peak resident memory per process over that of an idle one, by stage, checkpoint and number
  of refinement steps, at another size.
--sequence: so many processes share each sample (parallel.sequence), in the same steps.
--fused: the pointwise operations by their Triton kernels, in Triton's interpreter; attention stays
  PyTorch's reference.
--break partition: give every process its part of a gathered parameter in place of the whole, to see
  that the check fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance

SAMPLES, POSITIONS, STEPS = 4, 12, 5
RECIPES = {
    "S1": {},
    "algorithm_1": {"graph": "full", "loss": "last"},
    "S2": {
        "graph": "truncate",
        "loss": "last",
        "num_steps": 3,
        "landscapes": "one",
        "noise": 1.0,
        "step_size_random_factor": 2.0,
    },
    "shallow": {"update": "mirror", "loss_weights": "rising", "reencode": 2},
    "groups": {"graph": "full", "loss": "last"},
    "workspace": {"graph": "full", "loss": "last", "level_weight": 0.2},
    "candidates": {"graph": "full", "update": "mirror", "candidates": 9, "num_steps": 3},
    "exits": {
        "graph": "full",
        "update": "mirror",
        "loss_weights": "exits",
        "momentum": 0.5,
        "spectral_penalty": 0.5,
        "num_steps": 3,
    },
    "world": {"graph": "full", "step_size": 0.5},
    "stable": {"update": "mirror", "num_steps": 3},
    "reach": {"graph": "full", "loss": "last", "reencode": "all"},
}
# What a recipe asks of the model and its states.
MODELS = {
    "shallow": {
        "predicted_layers": 2,
        "energy_head": ["linear", "quadratic", "bilinear", "context"],
    },
    "workspace": {"energy_head": ["bilinear"]},
    "candidates": {"energy_head": ["bilinear", "direct"], "own_keys": False},
    "exits": {"energy_head": ["bilinear"]},
    "baseline": {"kind": "baseline"},
    "looped": {"kind": "baseline", "loops": 3, "loop_loss": "every"},
    "read_twice": {"loops": 2, "predicted_layers": 1, "energy_head": ["direct"]},
    "world": {"vocabulary_size": None},
    "stable": {"qk_norm": True, "num_kv_heads": 2, "logit_softcap": 6.0},
    "reach": {"reach": 0},
}
Z_LOSSES = {"stable": 0.01}
STATES = {
    "shallow": {"initial": "zeros"},
    "workspace": {"workspace": 8},
    "candidates": {"initial": "zeros", "map_scale": 3.0},
    "exits": {"initial": "zeros", "workspace": 8},
    "world": {"kind": "embedding", "dimension": 7, "initial": "most_recent"},
}
# world: frames of patches, an action of numbers and one of buttons behind each
CONDITIONS = [
    {"name": "action", "kind": "continuous", "width": 3},
    {"name": "button", "kind": "discrete", "num_values": 4},
]
DATA = {
    "groups": {"group_size": 4},
    "world": {"group_size": 4, "grid": [2, 2], "conditions": CONDITIONS},
    "reach": {"group_size": 4, "grid": [2, 2]},
}
LIMITS = {
    "fp32": {"parameters": 3e-5, "gradients": 1e-5},
    "bf16": {"parameters": 0.05, "gradients": 0.1},
}
# In fp32. Of blocks that are passed several times the rounding adds up. Of the stable recipe an
# entry of a weight has a gradient near 0 in the first step, which AdamW divides by its own size:
# 1.4e-4 in one process too.
WIDER_LIMITS = {
    "looped": {"parameters": 6e-5, "gradients": 3e-5},
    "read_twice": {"parameters": 6e-5, "gradients": 3e-5},
    "stable": {"parameters": 5e-4, "gradients": 4e-4},
}
CHOOSING_LIMITS = {"bf16": {"parameters": 0.05, "gradients": 0.2}}  # of recipes with candidates


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--checkpoint", nargs="+", default=["none", "step", "block"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--recipe", nargs="+", default=["S1", "S2", "algorithm_1", "baseline"])
    parser.add_argument("--offload", default="none", choices=["none", "optimizer", "parameters"])
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--sequence", type=int, default=1, help="processes that share each sample")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--break", dest="broken", choices=["partition"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--num-refinement-steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.fused:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are decorated
    if "RANK" in os.environ:
        return measure_memory(arguments) if arguments.memory else check(arguments)
    rows, failed = [], False
    for processes in arguments.processes:
        if arguments.memory:
            combinations = itertools.product(
                arguments.stages,
                arguments.checkpoint,
                arguments.precision,
                arguments.num_refinement_steps,
            )
            calls = [
                [
                    "--memory",
                    "--stages",
                    str(stage),
                    "--checkpoint",
                    mode,
                    "--num-refinement-steps",
                    str(steps),
                    "--precision",
                    precision,
                ]
                for stage, mode, precision, steps in combinations
            ]
        else:
            calls = [sys.argv[1:]]
        for call in calls:
            process = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={processes}",
                    __file__,
                    *call,
                ],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
                timeout=3000,
            )
            found = [
                json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")
            ]
            print("\n".join(map(json.dumps, found)), flush=True)
            rows, failed = rows + found, failed or process.returncode != 0
    if arguments.output:
        arguments.output.write_text(
            json.dumps(provenance("deepspeed") | {"limits": LIMITS, "rows": rows}, indent=1)
        )
    return int(failed)


def configuration(
    *,
    stage: int,
    checkpoint: str,
    precision: str,
    recipe: str,
    processes: int,
    offload: str = "none",
    sequence: int = 1,
    size: dict | None = None,
    refinement: dict | None = None,
):
    from ebwm_scale.config.load import config_from_dict

    return config_from_dict(
        {
            "model": {
                "num_layers": 3,
                "width": 32,
                "num_heads": 4,
                "vocabulary_size": 61,
                "predicted_input": "anchored",
                **MODELS.get(recipe, {}),
                **(size or {}).get("model", {}),
            },
            "state": STATES.get(recipe, {}),
            "refinement": {
                "step_size": 5.0,
                "learning_rate_multiplier": 1.0,
                **RECIPES.get(recipe, {}),
                "recompute": checkpoint,
                **(refinement or {}),
            },
            "optimizer": {"learning_rate": 0.003},
            "schedule": {"warmup_steps": 0},
            "data": {
                "context_length": (size or {}).get("positions", POSITIONS),
                **DATA.get(recipe, {}),
            },
            "train": {
                "global_batch_size": (size or {}).get("samples", SAMPLES),
                "precision": precision,
                "max_steps": 1000,
                "z_loss": Z_LOSSES.get(recipe, 0.0),
            },
            "parallel": {"sequence": sequence},
            "deepspeed": {
                "zero_stage": stage,
                "offload": offload,
                "raw": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
                if stage == 3
                else {},
            },
        }
    )


def batch_of(config, step: int):
    """(sequences, conditions or None) of a step's global batch."""
    import torch

    from ebwm_scale.model.conditions import example_conditions

    generator = torch.Generator().manual_seed(100 + step)
    samples, positions = config.train.global_batch_size, config.data.context_length
    shape = (samples, positions + group_of(config))
    if config.state.kind == "vocabulary":
        sequences = torch.randint(config.model.vocabulary_size, shape, generator=generator)
    else:
        sequences = torch.randn(*shape, config.state.dimension, generator=generator)
    num_groups = positions // group_of(config)
    return sequences, example_conditions(config.data.conditions, samples, num_groups, generator)


def group_of(config) -> int:
    """Positions that are predicted together, and so the targets' distance."""
    return config.data.group_size or 1


def new_model(config):
    import torch

    from ebwm_scale.world_model import WorldModel

    torch.manual_seed(0)
    return WorldModel(config)


def reference(config) -> dict[str, dict]:
    """Parameters and first moments after 5 steps of plain double backward in one process, in
    float64, with float32's noise.
    """
    from unittest import mock

    import torch

    from ebwm_scale.refinement.noise import NoiseSource
    from ebwm_scale.refinement.sampling import TrainingNoise
    from ebwm_scale.training.optimizer import parameter_groups

    config = config.replace(refinement=config.refinement.replace(recompute="none"))
    model = new_model(config).double()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.optimizer.learning_rate,
        betas=(0.9, 0.999),
        eps=config.optimizer.epsilon,
    )
    plain = TrainingNoise._normal

    def as_float32(draws, purpose):
        draws.dtype = torch.float32
        try:
            return plain(draws, purpose).double()
        finally:
            draws.dtype = torch.float64

    with mock.patch.object(TrainingNoise, "_normal", as_float32):
        for step in range(STEPS):
            sequences, conditions = batch_of(config, step)
            optimizer.zero_grad()
            model(
                sequences[:, : -group_of(config)],
                sequences[:, group_of(config) :],
                conditions=conditions,
                sample_ids=torch.arange(len(sequences)),
                source=NoiseSource(0, step),
            ).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
            optimizer.step()
    named = dict(model.named_parameters())
    return {
        "parameters": {name: p.detach().view(-1) for name, p in named.items()},
        "gradients": {
            name: optimizer.state[p]["exp_avg"].view(-1)
            for name, p in named.items()
            if p in optimizer.state
        },
    }


def trained(config, world, steps: int = STEPS, accumulation: int = 1):
    """The engine after its steps on this rank's part of each batch, in `accumulation`
    micro-batches.
    """
    import torch

    from ebwm_scale.refinement.noise import NoiseSource
    from ebwm_scale.training.deepspeed.engine import Engine
    from ebwm_scale.training.sequence_groups import sequence_group

    world = replace(world, sequence=config.parallel.sequence)
    size = config.train.global_batch_size // world.num_readers
    model = new_model(config)
    model.sequence = sequence_group(world)
    engine = Engine(
        config,
        model,
        world,
        micro_batch=size // accumulation,
        accumulation=accumulation,
    )
    mine = torch.arange(world.reader * size, (world.reader + 1) * size)
    for step in range(steps):
        sequences, conditions = batch_of(config, step)
        for ids in mine.chunk(accumulation):
            mine_of = {name: values[ids] for name, values in (conditions or {}).items()}
            output = engine.forward(
                sequences[ids, : -group_of(config)],
                sequences[ids, group_of(config) :],
                conditions=mine_of,
                sample_ids=ids,
                source=NoiseSource(0, step),
            )
            engine.backward(output.loss)
            engine.step()
    return engine


def check(arguments) -> int:
    """All combinations in one group of processes."""
    import torch

    from ebwm_scale.training.distributed import init_distributed

    world = init_distributed()
    if arguments.broken:
        break_partition()
    failed = False
    references: dict[str, dict] = {}
    for recipe, precision, stage, mode in itertools.product(
        arguments.recipe, arguments.precision, arguments.stages, arguments.checkpoint
    ):
        if recipe in ("baseline", "looped") and mode != "none":
            continue
        config = configuration(
            stage=stage,
            checkpoint=mode,
            precision=precision,
            recipe=recipe,
            processes=world.size,
            offload=arguments.offload if stage else "none",
            sequence=arguments.sequence,
        )
        if recipe not in references:
            references[recipe] = reference(config)
        with contextlib.ExitStack() as stack:
            if arguments.fused:
                from check_fused_step import plain_attention

                stack.enter_context(plain_attention())
                config = config.replace(model=config.model.replace(attention_backend="triton"))
            engine = trained(config, world, accumulation=arguments.accumulation)
        ours = [
            {
                (piece.name, kind): (piece.start, values.double().cpu())
                for piece in engine.state.shards()
                for kind, values in piece.values.items()
            }
        ]
        everyone = [None] * world.size
        torch.distributed.all_gather_object(everyone, ours[0])
        partitioned = sum(p.numel() for p in engine.module.parameters())
        row = {
            "recipe": recipe,
            "precision": precision,
            "stage": stage,
            "checkpoint": mode,
            "processes": world.size,
            "offload": arguments.offload,
            "accumulation": arguments.accumulation,
            "numbers_resident_between_steps": partitioned,
            **({"sequence": arguments.sequence} if arguments.sequence > 1 else {}),
            **({"fused": True} if arguments.fused else {}),
        }
        for what, kind in (("parameters", "weight"), ("gradients", "exp_avg")):
            worst = 0.0
            for name, expected in references[recipe][what].items():
                found = torch.full_like(expected, float("nan"))
                for pieces in everyone:
                    if (name, kind) in pieces:
                        start, values = pieces[name, kind]
                        found[start : start + len(values)] = values
                worst = max(
                    worst,
                    ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
                    .nan_to_num(float("inf"))
                    .item(),
                )
            row[what] = worst
        limits = LIMITS[precision]
        if config.refinement.candidates is not None:
            limits = CHOOSING_LIMITS.get(precision, limits)
        if precision == "fp32":
            limits = WIDER_LIMITS.get(recipe, limits)
        row["ok"] = all(row[what] <= limit for what, limit in limits.items()) and (
            stage < 3 or partitioned == 0
        )
        failed = failed or not row["ok"]
        if world.is_main:
            print(json.dumps(row), flush=True)
        engine.deepspeed.destroy()
    return int(failed)


def break_partition() -> None:
    """A gathered leaf holds this process's part, and zeros in place of the others'."""
    import contextlib

    from ebwm_scale.refinement import block_recompute
    from ebwm_scale.refinement.deferred_backward import leaf_of

    right = block_recompute._gathered

    @contextlib.contextmanager
    def wrong(parameters):
        with right(parameters):
            for p in parameters:
                info = leaf_of(p)
                if info is not None and info.parameter is not None:
                    part = info.parameter.ds_tensor.numel()
                    p.data = p.data.clone()
                    p.data.view(-1)[part:].zero_()
            yield

    block_recompute._gathered = wrong


def measure_memory(arguments) -> int:
    """Peak of resident memory in a training step, over what the process holds after one of a tiny
    model, beside accounting.memory_estimate.
    """
    import gc

    from ebwm_scale.planning.memory import memory_estimate
    from ebwm_scale.training.distributed import init_distributed

    world = init_distributed()
    options = {
        "stage": arguments.stages[0],
        "checkpoint": arguments.checkpoint[0],
        "precision": arguments.precision[0],
        "recipe": "S1",
        "processes": world.size,
        "refinement": {"num_steps": arguments.num_refinement_steps[0]},
    }
    tiny = trained(
        configuration(**options, size={"samples": 2 * world.size}), world, steps=2
    )  # libraries, threads and sockets are there from here on
    gc.collect()
    before = resident("VmRSS")
    config = configuration(
        **options,
        size={
            "model": {"num_layers": 8, "width": 256, "vocabulary_size": 8192},
            "positions": 256,
            "samples": 2 * world.size,
        },
    )
    trained(config, world, steps=2)
    peak = (resident("VmHWM") - before) / 2**30
    if world.is_main:
        print(
            json.dumps(
                {
                    "stage": options["stage"],
                    "checkpoint": options["checkpoint"],
                    "precision": options["precision"],
                    "num_refinement_steps": arguments.num_refinement_steps[0],
                    "processes": world.size,
                    "peak_gib_per_process": round(peak, 3),
                    "estimated_gib": round(
                        memory_estimate(config, world_size=world.size, micro_batch=2)["total"], 3
                    ),
                }
            ),
            flush=True,
        )
    del tiny
    return 0


def resident(key: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS) or at most so far (VmHWM)."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )


if __name__ == "__main__":
    sys.exit(main())
