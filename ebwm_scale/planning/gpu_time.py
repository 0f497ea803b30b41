"""Seconds of a training step on a GPU, from what it asks of one: launches, bytes and FLOPs.

    device   FLOPs of products / (peak x PRODUCTS_SHARE)
             + FLOPs of attention / (peak x ATTENTION_SHARE)
             + bytes of everything else / (memory's bandwidth x TRAFFIC_SHARE)
    host     launches x LAUNCH_SECONDS
    step     the longer of the two: the host launches ahead of the device

Launches and bytes are closed forms, fitted to what step_count.py counts on the meta device in
bfloat16; tests hold them against it. They are those of the default recipe: momentum, candidates and
the like add to them. Peaks and bandwidths are vendors' (hardware.py).

**The four rates are assumed.** No GPU has been measured. Each says where it comes from, and which
part of tools/gpu/session.py would measure it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ebwm_kernels.vocabulary import softmax_cross_entropy
from ebwm_scale.config import resolved
from ebwm_scale.config.resolved import context_length
from ebwm_scale.config.schema import Config
from ebwm_scale.planning.flops import step_flops
from ebwm_scale.planning.hardware import Machine
from ebwm_scale.refinement.noise import DEVICE_POSITIONS
from ebwm_scale.refinement.tiling import GPU_SHARE, TILE_BYTES

# Estimated by a review of the code: products of 8192 x 1024 x 1024 at 550 of an H100's 989 TFLOP/s.
# To measure: part `yardsticks` (a large matrix product), part `steps` (the trace's products).
PRODUCTS_SHARE = 0.55
# Estimated from the kernels' instructions: 10.2 TFLOP of both streams in 48 ms on an H100.
# To measure: part `kernels`.
ATTENTION_SHARE = 0.21
# Estimated: 2.7 of an H100's 3.35 TB/s. To measure: part `yardsticks` (a copy of memory).
TRAFFIC_SHARE = 0.8
# Estimated: about 10 microseconds of Python and PyTorch for an eager launch. To measure: part
# `steps`, host time of a step over its launches. With a graph (part `graphs`) nearly all are saved.
LAUNCH_SECONDS = 10e-6

GIB = 2**30


class Asked(NamedTuple):
    """Of one micro-batch, its optimizer and communication left out."""

    launches: float
    pointwise_bytes: float


class Coefficients(NamedTuple):
    """Of L layers of width D, N refinement steps, R rows, V numbers of a state, P parameters.

    launches = launches[0] + launches[1] N + L (launches[2] + launches[3] N), and those of noise
    bytes    = R D (L traffic[0] + L N traffic[1] + N traffic[2])
               + R V (traffic[3] + N traffic[4]) + P (traffic[5] + N traffic[6])
    """

    launches: tuple[float, float, float, float]
    traffic: tuple[float, float, float, float, float, float, float]


# By refinement.recompute.
ENERGY = {
    "none": Coefficients(
        (9.6, 69.0, 60.2, 91.2), (100.15, 243.5, 108.76, 13.0, 22.81, 10.71, 13.07)
    ),
    "step": Coefficients(
        (9.6, 76.0, 60.2, 124.2), (107.04, 354.31, 129.69, 12.38, 22.68, 10.78, 14.4)
    ),
    "block": Coefficients(
        (3.1, 75.2, 69.7, 180.7), (144.7, 526.18, 113.04, 10.33, 22.18, 11.1, 19.66)
    ),
}
# Transformer++: its loss goes over the vocabulary in chunks of logits, and each adds to the map's
# gradient.
BASELINE_LAUNCHES = (36, 29, 15)  # of all, of a layer, of a chunk
BASELINE_TRAFFIC = (76.2, 5.84, 3.99, 17.4)  # of R D L, R V, P, and of a chunk's V D


def gpu_seconds(config: Config, machine: Machine, *, samples: int, micro_batch: int) -> float:
    """Of one training step of `samples` samples on one GPU, micro_batch at a time."""
    found = asked(config, machine, micro_batch)
    batches = math.ceil(samples / micro_batch)
    device = _device(config, machine, samples, batches * found.pointwise_bytes)
    return max(device, batches * found.launches * LAUNCH_SECONDS)


def device_seconds(config: Config, machine: Machine, *, samples: int, micro_batch: int) -> float:
    """What the GPU is busy for."""
    moved = math.ceil(samples / micro_batch) * asked(config, machine, micro_batch).pointwise_bytes
    return _device(config, machine, samples, moved)


def _device(config: Config, machine: Machine, samples: int, moved: float) -> float:
    peak = machine.peak(config.train.precision)
    seconds = moved / (1e9 * machine.memory_bandwidth * TRAFFIC_SHARE)
    for part, flops in step_flops(config, samples=samples).items():
        share = ATTENTION_SHARE if part.startswith("attention") else PRODUCTS_SHARE
        seconds += flops / (peak * share)
    return seconds


def host_seconds(config: Config, machine: Machine, *, samples: int, micro_batch: int) -> float:
    """What the host launches for, without a CUDA graph."""
    launches = asked(config, machine, micro_batch).launches
    return math.ceil(samples / micro_batch) * launches * LAUNCH_SECONDS


def asked(config: Config, machine: Machine, samples: int) -> Asked:
    """Launches and bytes of a micro-batch of `samples` samples."""
    sizes = resolved.model_sizes(config.model)
    layers, width = sizes.num_layers, sizes.width
    positions = samples * context_length(config)
    state = resolved.state_size(config)
    in_half = config.train.precision == "bf16"
    parameters = _parameters(config)
    if config.model.kind == "baseline":
        chunk = min(
            softmax_cross_entropy.GPU_CHUNK_BYTES,
            machine.memory * GIB / softmax_cross_entropy.GPU_SHARE,
        )
        chunks = math.ceil(positions / max(1, int(chunk / (4 * state))))
        first, of_layer, of_chunk = BASELINE_LAUNCHES
        a, b, c, d = BASELINE_TRAFFIC
        moved = positions * (a * layers * width + b * state) + c * parameters
        moved += d * chunks * state * width
        launches = first + of_layer * layers + of_chunk * chunks
        return Asked(launches, moved if in_half else 2 * moved)
    steps = config.refinement.num_steps
    found = ENERGY[config.refinement.recompute]
    start, of_step, of_layer, of_both = found.launches
    launches = start + of_step * steps + layers * (of_layer + of_both * steps)
    a, b, c, d, e, f, g = found.traffic
    of_width = positions * width * (layers * (a + b * steps) + c * steps)
    of_states = positions * state * (d + e * steps)
    of_parameters = parameters * (f + g * steps)
    if not in_half:  # states are float32 in any case
        of_width, of_parameters = 2 * of_width, 2 * of_parameters
    tiles = math.ceil(positions / _tile_rows(config, machine, state))
    noise = positions / DEVICE_POSITIONS if config.state.initial == "random_noise" else 0
    return Asked(tiles * launches + noise, of_width + of_states + of_parameters)


def _tile_rows(config: Config, machine: Machine, state: int) -> int:
    if config.refinement.tile_rows is not None:
        return config.refinement.tile_rows
    tile = min(TILE_BYTES["cuda"], machine.memory * GIB / GPU_SHARE)
    return max(1, int(tile / (4 * state)))


def _parameters(config: Config) -> int:
    import torch

    from ebwm_scale.planning.parameters import count_parameters
    from ebwm_scale.world_model import WorldModel

    with torch.device("meta"):
        return count_parameters(WorldModel(config))["total"]
