"""What a run costs before it starts: parameters, FLOPs of a training step, memory of a process, and the text of --dry-run.

    step_flops(config, samples=128)["observed"]                 closed forms from the configuration, tested against counted products
    memory_estimate(config, world_size=8, micro_batch=4)        GiB by part; an estimate, calibrated on measured peaks

Legend: B samples, S positions, D width, K = H_kv d width of keys, F feed-forward width, L blocks, V size of a state, N refinement steps,
G of them with a graph, R = B S rows. A FLOP is half a multiply-add. This file knows nothing of speed but the vendors' peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ebwm_kernels.attention_ops import PRODUCTS, visible_pairs
from ebwm_kernels.attention_reference import ROWS
from ebwm_kernels.vocabulary import CHUNK_BYTES

from .config import Config, batch_arithmetic
from .model.energy_transformer import one_context_serves_all
from .refinement.step_plan import num_graph_steps, num_landscapes

GIB = 2.0**30

# ------------------------------------------------------------------------------------------------------------- parameters

PARAMETER_PARTS = {  # first parts of a parameter's name -> the part it counts for, in the order of the report
    "token_embedding": "token_embedding",
    "frame_projection": "frame_projection",
    "state_map": "state_map",
    "network.layers": "blocks",
    "network.landscape_embedding": "conditioning",
    "network.modulations": "conditioning",
    "network.final_modulation": "conditioning",
    "network.norm": "norm_and_head",
    "network.head": "norm_and_head",
    "output": "output",
    "step_size": "step_size",
}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers in the model's parameters by part, learned or not, "total" last; a shared parameter counts once.

    model: a WorldModel (not an engine around one). Raises KeyError for a parameter that belongs to no known part.
    """
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        part = PARAMETER_PARTS[".".join(path[:2]) if path[0] == "network" else path[0]]
        counts[part] = counts.get(part, 0) + parameter.numel()
    ordered = {
        part: counts[part] for part in dict.fromkeys(PARAMETER_PARTS.values()) if part in counts
    }
    return ordered | {"total": sum(counts.values())}


# ------------------------------------------------------------------------------------------------------------------ FLOPs

# Products of (queries, keys, d) that each level of the predicted stream's attention needs at least. The Triton kernels make more of them, to
# keep less (attention_ops.PRODUCTS): their way of computing, not the model's work.
ATTENTION_FORWARD = PRODUCTS["reference"]["forward"]
ATTENTION_INNER, ATTENTION_FIRST_ORDER = PRODUCTS["reference"]["gradient"]
ATTENTION_SECOND_ORDER = PRODUCTS["reference"]["double_backward"][0]
# Products of scaled_dot_product_attention as PyTorch counts them: over the whole square, causal or not; scores again in the backward.
SDPA_FORWARD, SDPA_BACKWARD = 2, 5


@dataclass(frozen=True)
class _Sizes:
    """The numbers that all closed forms are made of; weights are multiply-adds per row."""

    width: int
    keys: int
    feed_forward: int
    layers: int
    state: int  # V: vocabulary size, or dimension of a frame embedding
    positions: int
    offset: int  # rows in front of the observed ones
    steps: int
    graph_steps: int
    contexts: int  # times the observed stream is encoded
    graph_contexts: int  # of them back-propagated
    attention_weights: int  # D D + 2 D K + D D
    block_weights: int  # the same + 3 D F
    modulation_weights: (
        int  # adaLN of one stream's blocks, D x 6 D each, computed once per call whatever the rows
    )
    final_modulation: int  # D x 2 D

    @classmethod
    def of(cls, config: Config, num_steps: int | None = None) -> "_Sizes":
        model, refinement = config.model, config.refinement
        steps = num_steps or refinement.num_steps
        graph_steps = num_graph_steps(refinement, steps)
        shared = one_context_serves_all(model.conditioning, num_landscapes(refinement))
        keys = model.width // model.num_heads * model.num_kv_heads
        attention = 2 * model.width**2 + 2 * model.width * keys
        adaptive = model.conditioning in ("adaln", "adaln_zero", "predicted_only")
        return cls(
            width=model.width,
            keys=keys,
            feed_forward=model.feed_forward_width,
            layers=model.num_layers,
            state=model.vocabulary_size
            if config.state.kind == "vocabulary"
            else config.state.dimension,
            positions=config.data.context_length,
            offset=int(model.conditioning == "time_embed"),
            steps=steps,
            graph_steps=graph_steps,
            contexts=1 if shared else steps,
            graph_contexts=1 if shared else graph_steps,
            attention_weights=attention,
            block_weights=attention + 3 * model.width * model.feed_forward_width,
            modulation_weights=6 * model.width**2 * model.num_layers if adaptive else 0,
            final_modulation=2 * model.width**2 if adaptive else 0,
        )

    def causal_pairs(self) -> int:
        """(query, key) pairs of one head of the predicted stream, own keys aside."""
        return visible_pairs(self.positions, self.positions + self.offset, self.offset)


def step_flops(config: Config, *, samples: int, num_steps: int | None = None) -> dict[str, float]:
    """FLOPs of one training step (forward and backward, all refinement steps) of `samples` samples, by part; the sum is the step.

    Counted: matrix products and attention, 2 per multiply-add: attention of the predicted stream over the (query, key) pairs that exist, of
    the observed stream over the whole square (PyTorch's count; a causal kernel may do half). Not counted: elementwise work,
    softmax, row-wise dot products, optimizer. "recomputation" is what activation checkpointing adds; leave it out for an MFU.
    num_steps: refinement steps of this training step where they vary; default refinement.num_steps.
    Needs a resolved config with data.context_length and model.vocabulary_size or state.dimension.
    """
    z = _Sizes.of(config, num_steps)
    rows = samples * z.positions
    blocks, state_product = z.layers * z.block_weights, 2.0 * rows * z.state * z.width
    square = 2.0 * samples * z.width * (z.positions + z.offset) ** 2
    frames = (
        {} if config.state.kind == "vocabulary" else {"state_projection": 2 * state_product}
    )  # observed: forward, dW
    if config.model.kind == "baseline":
        two = config.model.output == "two_linear"
        hidden_product = 2.0 * rows * z.width**2 if two else 0.0
        return {
            "blocks_forward": 2.0 * rows * blocks,
            "blocks_backward": 4.0 * rows * blocks,
            "attention": square * z.layers * (SDPA_FORWARD + SDPA_BACKWARD),
            **frames,
            # forward, dx, dW
            "output" if frames else "vocabulary": 3 * (state_product + hidden_product),
        }
    N, G = z.steps, z.graph_steps
    # Of the last block only keys and values of the observed stream exist; adaLN of its final norm is computed but not used.
    observed_rows, observed_blocks = (
        samples * (z.positions + z.offset),
        blocks - z.block_weights + 2 * z.width * z.keys,
    )
    observed_modulation = (
        0 if config.model.conditioning == "predicted_only" else z.modulation_weights
    )
    observed_final = 0 if config.model.conditioning == "predicted_only" else z.final_modulation
    modulation, head = z.modulation_weights + z.final_modulation, z.width
    attention = 2.0 * samples * z.width * z.causal_pairs() * z.layers
    parts = {
        "observed": 2.0
        * z.contexts
        * (observed_rows * observed_blocks + observed_modulation + observed_final)
        + 4.0 * z.graph_contexts * (observed_rows * observed_blocks + observed_modulation),
        "predicted_forward": 2.0 * N * (rows * (blocks + head) + modulation),
        "inner_gradient": 2.0 * N * rows * (blocks + head),
        # Per weight: two products for the double backward of dx = dy W, two for x W; the energy itself is not in the loss.
        "outer_backward": G * (8.0 * rows * blocks + 4.0 * modulation + 2.0 * rows * head),
        "recomputation": G * _recomputation(config, z, rows, attention)
        + (config.refinement.recompute == "block")
        * z.graph_contexts
        * (2.0 * observed_rows * observed_blocks + square * (z.layers - 1) * SDPA_FORWARD),
        "attention_observed": square
        * (z.layers - 1)
        * (z.contexts * SDPA_FORWARD + z.graph_contexts * SDPA_BACKWARD),
        "attention_predicted": attention
        * (
            N * (ATTENTION_FORWARD + ATTENTION_INNER)
            + G * (ATTENTION_SECOND_ORDER + ATTENTION_FIRST_ORDER)
        ),
    }
    parts |= (
        {
            "state_projection": frames["state_projection"]
            + state_product * _state_products(config, z)
        }
        if frames
        else {"vocabulary": state_product * _state_products(config, z)}
    )
    return {part: value for part, value in parts.items() if value}


def model_flops(flops: dict[str, float]) -> float:
    """The sum that an MFU is made of: everything but recomputation."""
    return sum(value for part, value in flops.items() if part != "recomputation")


def _state_products(config: Config, z: _Sizes) -> int:
    """Products of size rows * V * D of all refinement steps, see kernels/vocabulary.py and model/states.py."""
    refinement, N, G = config.refinement, z.steps, z.graph_steps
    if config.state.kind == "embedding" or refinement.graph == "full":
        # Plain autograd: into a step and out of it, W's gradient from both, and the way back through the latter; full: through both.
        return 2 * N + 3 * G + (G - 1 if refinement.graph == "full" else 0)
    if refinement.update == "probabilities" and refinement.noise == 0:
        return (
            2 * N + 2 + G
        )  # a step's loss and the next step's entry share one W gradient; only the last loss needs two of its own
    scored = min(
        G + 1, N
    )  # losses computed with their two gradients: those with a graph, and the one before, unread
    return 2 * N + G + 2 * scored


def _recomputation(config: Config, z: _Sizes, rows: int, attention: float) -> float:
    """FLOPs that refinement.recompute adds per step with a graph.

    step: the step is computed again in the backward. block: the four lines of refinement/block_recompute.py; per weight 4 forwards in place of 1, 2 inner
    gradients in place of 1, and the way back through the forward twice, which w2 (whose output nothing bends) is spared once.
    """
    blocks, modulation = z.layers * z.block_weights, z.modulation_weights + z.final_modulation
    if config.refinement.recompute == "step":
        return (
            (2 * 2 + 2) * rows * blocks
            + 2 * 2 * (rows * z.width + modulation)
            + attention * (2 * ATTENTION_FORWARD + ATTENTION_INNER)
        )
    if config.refinement.recompute == "block":
        spared = 2 * z.layers * z.width * z.feed_forward
        return 2.0 * rows * (6 * blocks - spared + 2 * z.width) + attention * (
            3 * ATTENTION_FORWARD + ATTENTION_INNER + ATTENTION_FIRST_ORDER
        )
    return 0.0


# Dense peaks in TFLOP/s as NVIDIA publishes them (product datasheets and architecture papers): bf16 on tensor cores with fp32 accumulation,
# fp32 on CUDA cores (TF32 is off). First match in the device's name counts; None: the device has no such units.
PEAK_TFLOPS: tuple[tuple[str, float | None, float], ...] = (
    ("B200", 2250, 75),  # HGX B200 datasheet (a GB200's is higher: 2500, 80)
    ("H200 NVL", 835.5, 60),
    ("H200", 989.4, 66.9),  # H200 datasheet; SXM as H100 SXM
    ("GH200", 989.4, 66.9),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835.5, 60),
    ("H100", 989.4, 66.9),  # H100 datasheet and Hopper architecture paper
    ("A100", 312, 19.5),  # A100 datasheet
    ("L40S", 362.05, 91.6),  # L40S datasheet
    ("RTX 4090", 165.2, 82.6),  # Ada architecture paper
    ("V100-PCIE", None, 14),
    ("V100", None, 15.7),  # V100 datasheet; no bf16
)


def peak_flops_per_s(precision: str) -> float | None:
    """Dense peak in FLOP/s of the CUDA device in use for "fp32" or "bf16"; None on a CPU or for a device that is not in the table."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}: must be fp32 or bf16")
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    for pattern, bf16, fp32 in PEAK_TFLOPS:
        if pattern in name:
            tera = bf16 if precision == "bf16" else fp32
            return None if tera is None else tera * 1e12
    return None


# ----------------------------------------------------------------------------------------------------------------- memory

# What autograd keeps per row and block, read off the operations and tested against the live tensors of a step.
OBSERVED_D, OBSERVED_F = (
    7,
    3,
)  # norm inputs 2, normed 3 (the first one for K, V and again for q), q, attended; w1, w3, SwiGLU
LAST_OBSERVED_D = 2  # norm input, normed; then only K and V
PREDICTED_D, PREDICTED_F = (
    16,
    6,
)  # norm inputs 2, normed 2, q, k*, v*, attended; w1, w3, SwiGLU; and as many cotangents
STREAMS_D = 3  # checkpoint block, per block: p_l, c_l, and a_l in the backward
OBSERVED_ADALN_D, PREDICTED_ADALN_D = (
    5,
    8,
)  # a modulated norm keeps its input, a gate what it gates; and their cotangents
OUTSIDE_D = (
    6  # per step: embedded state, final norm's input and its cotangent, g, -alpha g, its gradient
)
REDUCE_BUCKET = (
    500_000_000  # numbers of gradients that DeepSpeed sends together at most: its default
)
ATTENTION_BLOCKS = (
    6  # score blocks alive at once in the double backward: P, tangent, centred, slope, Z, dS
)
STATES = {
    "probabilities": 2,
    "mirror": 3,
    "logits": 3,
}  # (rows, V) tensors of a tile in kernels/vocabulary.py
FULL_STATES = {
    "probabilities": 1,
    "mirror": 1,
    "logits": 3,
}  # (R, V) tensors of plain autograd (graph full): per step,
FULL_TRANSIENT = 2  # and once
FRAME_STATES = 4  # per step: state, slope, alpha * slope, difference to the target


def memory_estimate(
    config: Config, *, world_size: int, micro_batch: int, device: str | None = None
) -> dict[str, float]:
    """GiB by part, "total" last, of one process at its peak in a training step of micro_batch samples: what tensors need.

    Activations and states are those of one tile (refinement.py); device: "cpu" or "cuda", whose tiles differ; default: what is here.

    The runtime (libraries: about 0.1 GiB on a CPU; a CUDA context), the loader and the replay buffer come on top, and an allocator's
    waste: glibc's on a CPU holds as much again unless the environment has MALLOC_MMAP_THRESHOLD_=65536. "gradients" holds the fp32 copy
    that a bf16 update works on, "optimizer" AdamW's two moments and, under bf16 or ZeRO, a master copy of the weights; neither is here
    where deepspeed.offload keeps it on the host. "workspace" is the largest of what lives for a moment: chunks of the vocabulary in the
    forward, or in the backward score blocks and, under checkpoint step, the recomputed step. Gradients count as there all the time.
    Needs what step_flops needs.
    """
    from .world_model import WorldModel

    with torch.device(
        "meta"
    ):  # no memory: the model says how large it is, so there is no second formula
        num_parameters = count_parameters(WorldModel(config))["total"]
    z, half, stage = (
        _Sizes.of(config),
        config.train.precision == "bf16",
        config.deepspeed.zero_stage,
    )
    element, shards = 2 if half else 4, world_size if stage else 1
    baseline, full, update = (
        config.model.kind == "baseline",
        config.refinement.graph == "full",
        config.refinement.update,
    )
    offloaded = config.deepspeed.offload != "none"
    by_block = config.refinement.recompute == "block" and not baseline
    D, F, K, V = z.width, z.feed_forward, z.keys, z.state
    parts = {
        "weights": element * num_parameters / (world_size if stage == 3 else 1),
        "gradients": num_parameters
        * (
            element / (world_size if stage >= 2 else 1)
            + (4 / shards if half and not offloaded else 0)
        ),
        "optimizer": 0 if offloaded else num_parameters * (12 if half or stage else 8) / shards,
    }
    workspace = 0.0
    if not baseline and (
        stage >= 2 or (stage == 0 and config.train.global_batch_size > world_size * micro_batch)
    ):
        workspace += (
            element * num_parameters
        )  # a micro-batch's gradients are summed on their own, beside those accumulated or partitioned
    if stage == 3:  # whole while they are used; the baseline gathers a block at a time too
        blocks = z.layers * (z.block_weights + 2 * D)
        workspace += element * min(
            num_parameters, REDUCE_BUCKET
        )  # gradients on their way to the others
        workspace += element * (
            num_parameters - (blocks * (z.layers - 1) // z.layers if by_block or baseline else 0)
        )
    if config.deepspeed.offload == "parameters":
        parts["weights"] = 0
    observed_block = (
        OBSERVED_D
        + (OBSERVED_ADALN_D if config.model.conditioning in ("adaln", "adaln_zero") else 0)
    ) * D + OBSERVED_F * F
    if baseline:
        rows = micro_batch * z.positions
        parts["activations_observed"] = (
            element * rows * (z.layers * (observed_block + 2 * K) + 2 * D)
        )
    else:
        rows, samples, num_parts = _tile(config, z, micro_batch, device)
        kept = (
            (z.layers - 1) * (D if by_block else observed_block)
            + LAST_OBSERVED_D * D
            + z.layers * 2 * K
        )
        contexts = z.contexts if full or num_parts > 1 else 1
        parts["activations_observed"] = (
            element * samples * (z.positions + z.offset) * contexts * kept
            + element * micro_batch * z.positions * D
        )
        kept, recomputed = _predicted_kept(config, z, z.steps if full else 1)
        parts["activations_predicted"] = element * rows * kept
        scores = (
            samples * config.model.num_heads * min(ROWS, z.positions) * (z.positions + z.offset)
        )
        workspace += 4 * ATTENTION_BLOCKS * scores + element * rows * recomputed
    if config.state.kind == "embedding":
        parts["states"] = 4.0 * rows * V * FRAME_STATES * (z.steps if full else 1)
    elif baseline:  # W's gradient exists from the forward on
        parts["vocabulary"] = element * V * D
        workspace = max(
            workspace,
            min(4.0 * rows * V, CHUNK_BYTES) * (1.5 if half else 1) + (4 + element) * V * D * half,
        )
    else:
        state, scores = 4.0 * rows * V, z.steps if config.refinement.loss == "every" else 1
        clamps = (config.refinement.change_clamp is not None) + (
            config.refinement.state_clamp is not None
        )
        if full:  # autograd keeps what each clamp was given
            states = (FULL_STATES[update] + clamps) * z.steps + scores + FULL_TRANSIENT
        else:  # a byte per number says where a clamp binds
            states = STATES[update] + 0.25 * (clamps > 0) + (config.refinement.noise > 0)
        parts["vocabulary"] = state * (states + half / 2) + V * D * (
            2 * element * (config.state.map_scale != 1) + (4 + element) * half
        )
    gib = {part: value / GIB for part, value in (parts | {"workspace": workspace}).items()}
    return gib | {"total": sum(gib.values())}


def _tile(config: Config, z: _Sizes, micro_batch: int, device: str | None) -> tuple[int, int, int]:
    """The largest tile of refinement.py: its rows, its samples, and into how many parts a sample's positions are cut."""
    from .refinement.tiling import tiles_of
    from .refinement.tiling import tile_rows

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tiles = list(tiles_of(micro_batch, z.positions, tile_rows(config.refinement, z.state, device)))
    samples = max(group.stop - group.start for group, _ in tiles)
    positions = max(part.stop - part.start for part in tiles[0][1])
    return samples * positions, samples, len(tiles[0][1])


def _predicted_kept(config: Config, z: _Sizes, live_steps: int) -> tuple[int, int]:
    """Numbers per row of the predicted stream: (kept of the steps whose graph lives at a time, of one step when recomputed)."""
    adaptive = PREDICTED_ADALN_D * z.width if z.modulation_weights else 0
    blocks = z.layers * (PREDICTED_D * z.width + PREDICTED_F * z.feed_forward + adaptive)
    outside = OUTSIDE_D * z.width * live_steps
    if config.refinement.recompute == "step":
        return outside, blocks
    if config.refinement.recompute == "block":  # streams and slopes of all blocks, the graph of one
        return (z.layers + 1) * STREAMS_D * z.width * live_steps + outside, blocks // z.layers
    return blocks * live_steps + outside, 0


# ---------------------------------------------------------------------------------------------------------------- dry run


def describe(
    config: Config,
    model: nn.Module,
    *,
    world_size: int,
    data_summary: dict | None,
    seconds_per_step: float | None,
) -> str:
    """The text of --dry-run: parameters, batch, data, FLOPs, memory and, given the seconds of a training step, speed and time left.

    data_summary: manifest, fingerprint, train_samples, train_tokens (or frames), validation_samples, validation_tokens (or frames),
    vocabulary_size (or dimension), context_length; or None. Raises ConfigError when the batch does not divide over the processes.
    """
    train, positions = config.train, config.data.context_length
    micro_batch, accumulation = batch_arithmetic(train, world_size, paired=config.refinement.replay)
    tokens = train.global_batch_size * positions
    unit = "tokens" if config.state.kind == "vocabulary" else "frames"
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
                f"= {world_size} processes x {micro_batch} samples x {accumulation} accumulation steps",
            ),
            ("sample", f"{positions:>15,} {unit}", ""),
            (
                "training step",
                f"{tokens:>15,} {unit}",
                f"{config.refinement.num_steps} refinement steps" if energy else "",
            ),
            ("run", f"{train.max_steps:>15,} steps", f"{train.max_steps * tokens:,} {unit}"),
        ],
    )
    if data_summary is not None:
        epochs = train.max_steps * train.global_batch_size / data_summary["train_samples"]
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
        ],
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
        left = seconds_per_step * train.max_steps
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
