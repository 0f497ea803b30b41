"""Memory of a process at its peak in a training step, by part: an estimate, calibrated on measured
peaks.

memory_estimate(config, world_size=8, micro_batch=4)        GiB by part
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ebwm_kernels.attention.row_blocks import ROWS
from ebwm_kernels.vocabulary.softmax_cross_entropy import chunk_bytes
from ebwm_scale.config.reduce_bucket import reduce_bucket_size
from ebwm_scale.config.resolved import model_sizes, num_candidates, num_training_losses
from ebwm_scale.config.schema import Config
from ebwm_scale.planning.flops import StepSizes, starts_uniform
from ebwm_scale.planning.parameters import count_parameters
from ebwm_scale.refinement.step_plan import plan_steps

GIB = 2.0**30


# What autograd keeps per row and block, read off the operations and tested against the live tensors
# of a step.
OBSERVED_D = 7  # norm inputs 2, normed 3 (the first one for K, V and again for q), q, attended
OBSERVED_F = 3  # w1, w3, SwiGLU
LAST_OBSERVED_D = 2  # norm input, normed; then only K and V
PREDICTED_D = 16  # norm inputs 2, normed 2, q, k*, v*, attended; and as many cotangents
OWN_KEYS_D = 4  # of these k*, v* and their cotangents
PREDICTED_F = 6  # w1, w3, SwiGLU; and as many cotangents
STREAMS_D = 3  # recompute block, per block: p_l, c_l, and a_l in the backward
# a modulated norm keeps its input, a gate what it gates; and their cotangents
OBSERVED_ADALN_D, PREDICTED_ADALN_D = 5, 8
NORMED_HEADS = 2  # of qk_norm: q and k in front of their norms, and the cotangents behind them
CONTEXT_TERM_D = 4  # the last output, normed, the readout and its cotangent
# n and M n or A n, the candidate as it was, and their cotangents; of each term in n
CONTENT_D = 4
# per step: embedded state, final norm's input and its cotangent, g, -alpha g, its gradient
OUTSIDE_D = 6
# of what a step keeps of the predicted stream: its first order alone (refinement.level_weight)
FIRST_ORDER_SHARE = 0.4
# of a workspace, per step: w, dE/dw and its gradient; z and its change
WORKSPACE_D, WORKSPACE_Z = 3, 2
# score blocks alive at once in the double backward: P, tangent, centred, dP, Z, dS
ATTENTION_BLOCKS = 6
# of attention within reach, per row, key and head; of a block that is alone, with its backward
OBSERVED_SCORES, PREDICTED_SCORES, BLOCK_SCORES = 1, 5, 10
# (rows, V) tensors of a tile in kernels/ebwm_kernels/vocabulary/api.py
STATES = {"probabilities": 2, "mirror": 3, "logits": 3}
UNIFORM_MIRROR_STATES = 2  # what it moved by is added up in D numbers a row
# (R, V) tensors of plain autograd (graph full): per step, and once
FULL_STATES = {"probabilities": 1, "mirror": 1, "logits": 3}
FULL_TRANSIENT = 2
# bytes per row and candidate: ids and their order by token in int64; and numbers of a live step
CANDIDATE_ORDER, CANDIDATE_STEP = 40, 28
FRAME_STATES = 4  # per step: state, slope, alpha * slope, difference to the target


def memory_estimate(
    config: Config, *, world_size: int, micro_batch: int, device: str | None = None
) -> dict[str, float]:
    """GiB by part, "total" last, of one process at its peak in a training step of micro_batch
    samples: what tensors need.

    Activations and states are those of one tile (refinement/loop.py); device: "cpu" or "cuda",
    whose tiles differ; default: what is here.

    The runtime (libraries: about 0.1 GiB on a CPU; a CUDA context), the loader and the replay
    buffer come on top, and an allocator's waste: glibc's on a CPU holds as much again unless the
    environment has MALLOC_MMAP_THRESHOLD_=65536. "gradients" holds the fp32 copy that a bf16 update
    works on, "optimizer" AdamW's two moments, under bf16 or ZeRO a master copy of the weights, and
    the average of train.ema; neither is here where deepspeed.offload keeps it on the host.
    "workspace" is the largest of what lives for a moment: chunks of the vocabulary in the forward,
    or in the backward score blocks and, under checkpoint step, the recomputed step. Gradients count
    as there all the time. Needs what step_flops needs.
    """
    from ebwm_scale.world_model import WorldModel

    # No memory: the model says how large it is, so there is no second formula.
    with torch.device("meta"):
        num_parameters = count_parameters(WorldModel(config))["total"]
    sharing = config.parallel.sequence
    z = StepSizes.of(config)
    # Of a sample that processes share, each has its rows; of its attention, its heads.
    z = replace(
        z,
        positions=z.positions // sharing,
        observed_positions=z.observed_positions // sharing,
    )
    half, stage = config.train.precision == "bf16", config.deepspeed.zero_stage
    element = 2 if half else 4
    shards = world_size if stage else 1
    baseline = config.model.kind == "baseline"
    plan = plan_steps(config.refinement, range(z.steps), training=True)
    full = plan[-1].keep_graph  # the graphs of all steps that have one live at once
    # Steps that share a context which is encoded again are back-propagated together.
    live_steps = z.graph_steps if full else min(z.steps, config.refinement.reencode_every)
    update = config.refinement.update
    offloaded = config.deepspeed.offload != "none"
    by_block = config.refinement.recompute == "block" and not baseline
    D, F, K, V = z.width, z.feed_forward, z.keys, z.state
    levels = config.refinement.level_weight > 0
    parts = {
        "weights": element * num_parameters / (world_size if stage == 3 else 1),
        "gradients": num_parameters
        * (
            element / (world_size if stage >= 2 else 1)
            + (4 / shards if half and not offloaded else 0)
        ),
        "optimizer": 0 if offloaded else num_parameters * (12 if half or stage else 8) / shards,
    }
    if config.optimizer.name == "muon" and not offloaded:  # one momentum in place of two moments
        parts["optimizer"] -= 4 * z.layers * z.block_weights / shards
    if config.optimizer.name == "schedule_free" and not offloaded:  # z, x and the squares
        parts["optimizer"] += 4 * num_parameters / shards
    if config.train.ema is not None and not offloaded:
        parts["optimizer"] += 4 * num_parameters / shards
    bytes_of_sums = 0.0  # of each parameter
    if not baseline and (
        stage >= 2
        or (stage == 0 and config.train.global_batch_size > world_size // sharing * micro_batch)
    ):
        # A micro-batch's gradients are summed on their own, beside accumulated or partitioned ones.
        bytes_of_sums = 4.0
    elif not baseline and half:
        # Their sums are in float32 (refinement/deferred_backward.py) until they are handed out.
        bytes_of_sums = 4.0 - element
    workspace = bytes_of_sums * num_parameters
    if stage == 3:  # whole while they are used; the baseline gathers a block at a time too
        norms = 2 * D + 2 * model_sizes(config.model).head_dimension * config.model.qk_norm
        blocks = z.layers * (z.block_weights + norms)
        # gradients on their way to the others
        workspace += element * reduce_bucket_size(num_parameters)
        elsewhere = blocks * (z.layers - 1) // z.layers if by_block or baseline else 0
        workspace += element * (num_parameters - elsewhere)
    if config.deepspeed.offload == "parameters":
        parts["weights"] = 0
    observed_width = OBSERVED_D
    if config.model.conditioning in ("adaln", "adaln_zero"):
        observed_width += OBSERVED_ADALN_D
    normed_heads = (D + K) * config.model.qk_norm  # q and k in front of their norms
    observed_block = observed_width * D + OBSERVED_F * F + normed_heads
    if config.model.reach is not None:  # attention in plain PyTorch: autograd keeps its scores
        heads = model_sizes(config.model).num_heads
        observed_block += OBSERVED_SCORES * heads * z.observed_positions
    if baseline:
        rows = micro_batch * z.positions
        observed_rows = micro_batch * z.observed_positions
        loops = config.model.loops
        losses = num_training_losses(config.model)
        kept = loops * z.layers * (observed_block + 2 * K)
        parts["activations_observed"] = element * (observed_rows * kept + rows * losses * 2 * D)
    else:
        rows, samples, num_parts = _tile(config, z, micro_batch, device)
        kept = (
            (z.layers - 1) * (D if by_block else observed_block)
            + LAST_OBSERVED_D * D
            + z.layers * 2 * K
            + K * config.model.qk_norm
        )
        of_pass = z.layers * (D if by_block else observed_block + 2 * K)
        kept += (z.loops - 1) * of_pass
        if z.reads_output:
            kept += CONTEXT_TERM_D * D
            kept += 0 if by_block else observed_block - LAST_OBSERVED_D * D
        contexts = z.contexts.forward if full or num_parts > 1 else 1
        if full:  # what is encoded again lives with its step
            contexts += z.again.backward * (z.layers - z.first_reencoded) / z.layers
        parts["activations_observed"] = (
            element * samples * (z.observed_positions + z.offset) * contexts * kept
            + element * micro_batch * z.observed_positions * D
        )
        kept, recomputed = _predicted_kept(config, z, live_steps)
        if levels:  # where the last step ended
            kept += FIRST_ORDER_SHARE * _predicted_kept(config, z, 1)[0]
        if z.workspace:  # w, dE/dw and its gradient; z and its change, in float32
            kept += live_steps * WORKSPACE_D * D
            parts["refined_workspace"] = 4.0 * rows * z.workspace * WORKSPACE_Z * live_steps
        parts["activations_predicted"] = element * rows * kept
        scores = (
            samples
            * (model_sizes(config.model).num_heads // sharing)
            * min(ROWS, sharing * z.positions)
            * (sharing * z.observed_positions + z.offset + z.own_keys)
        )
        workspace += 4 * ATTENTION_BLOCKS * scores + element * rows * recomputed
    if config.state.kind == "embedding":
        states = FRAME_STATES * (z.graph_steps if full else 1) + levels
        parts["states"] = 4.0 * rows * V * states
    elif baseline:  # W's gradient exists from the forward on
        parts["vocabulary"] = element * V * D * num_training_losses(config.model)
        of_chunk = _chunk_logits(4.0 * rows * V, half, device)
        workspace = max(workspace, of_chunk + (4 + element) * V * D * half)
    else:
        state = 4.0 * rows * V
        scores = sum(step.loss_weight > 0 for step in plan)
        clamps = (config.refinement.change_clamp is not None) + (
            config.refinement.state_clamp is not None
        )
        soft = config.model.logit_softcap is not None
        clamps += soft
        scored_alone = clamps + (config.train.z_loss > 0) + levels
        candidates = num_candidates(config) if z.steps > 1 else None
        if candidates is not None:  # further steps keep nothing of the state's size
            states = 1 if starts_uniform(config) else STATES[update]
            states += 0.25 * (clamps > 0) + soft + (config.refinement.noise > 0)
            states += config.refinement.replay
        elif full:  # autograd keeps what each clamp was given
            states = (FULL_STATES[update] + clamps) * z.graph_steps + scores + FULL_TRANSIENT
            states += levels  # that the last step ended in, inside the predicted stream
        else:  # a byte per number says where a clamp binds
            states = STATES[update]
            if update == "mirror" and starts_uniform(config) and scored_alone == 0:
                states = UNIFORM_MIRROR_STATES
            if z.steps == 1 and starts_uniform(config) and scored_alone == 0:
                # The only state is gone before the first gradient of a weight but the map's.
                workspace = max(workspace, state)
                states = 0
            states += 0.25 * (clamps > 0) + soft + (config.refinement.noise > 0)
            states += live_steps - 1
        parts["vocabulary"] = state * (states + half / 2) + V * D * element * (
            2 * (config.state.map_scale != 1) + half
        )
        if candidates is not None:
            per_candidate = CANDIDATE_ORDER + CANDIDATE_STEP * (z.steps - 1 if full else 1)
            of_candidates = rows * candidates * per_candidate
            # rows of the map's gradient, of the tokens that are candidates anywhere
            of_candidates += 4.0 * min(V, rows * candidates) * D
            if full:  # what the first step's backward reads of its two ends
                of_candidates += state * (1 if starts_uniform(config) else 2)
            # Otherwise that is back-propagated before the others begin.
            parts["vocabulary"] = max(parts["vocabulary"], of_candidates)
            if not config.state.tie_embedding:
                # The token embedding's gradient is summed when the only state is gone.
                workspace -= min(bytes_of_sums * V * D, parts["vocabulary"])
    gib = {part: value / GIB for part, value in (parts | {"workspace": workspace}).items()}
    return gib | {"total": sum(gib.values())}


def _chunk_logits(all_logits: float, half: bool, device: str | None) -> float:
    """Bytes of a chunk of the baseline's logits and their gradients; all_logits: in float32."""
    where = torch.device(_device(device))
    chunk = min(all_logits, chunk_bytes(where))
    if where.type == "cuda":  # fused: the gradients take the logits' memory, in the weights' dtype
        return chunk / 2 if half else chunk
    return 1.5 * chunk if half else chunk


def _device(device: str | None) -> str:
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tile(
    config: Config, z: StepSizes, micro_batch: int, device: str | None
) -> tuple[int, int, int]:
    """The largest tile of refinement/loop.py: its rows, its samples, and into how many parts a
    sample's positions are cut.
    """
    from ebwm_scale.refinement.tiling import tile_rows, tiles_of

    where = torch.device(_device(device))
    rows = tile_rows(config.refinement, z.state, z.positions, where, z.group)
    tiles = list(tiles_of(micro_batch, z.positions, rows, z.group))
    samples = max(group.stop - group.start for group, _ in tiles)
    positions = max(part.stop - part.start for part in tiles[0][1])
    return samples * positions, samples, len(tiles[0][1])


def _predicted_kept(config: Config, z: StepSizes, live_steps: int) -> tuple[int, int]:
    """Numbers per row of the predicted stream: (kept of the steps whose graph lives at a time, of
    one step when recomputed).
    """
    adaptive = PREDICTED_ADALN_D * z.width if z.modulation_weights else 0
    block = PREDICTED_D * z.width + PREDICTED_F * z.feed_forward + adaptive
    normed = z.width + z.keys
    if not z.has_own_keys:
        block -= OWN_KEYS_D * z.width
        normed = z.width
    block += NORMED_HEADS * normed * config.model.qk_norm
    if config.model.reach is not None:
        heads = model_sizes(config.model).num_heads
        scores = BLOCK_SCORES if config.refinement.recompute == "block" else PREDICTED_SCORES
        block += scores * heads * (z.observed_positions + z.own_keys)
    blocks = z.predicted_layers * block
    outside = (OUTSIDE_D * z.width + CONTENT_D * z.content_weights // z.width) * live_steps
    if config.refinement.recompute == "step":
        return outside, blocks
    if config.refinement.recompute == "block":  # streams and slopes of all blocks, the graph of one
        streams = (z.predicted_layers + 1) * STREAMS_D * z.width
        return streams * live_steps + outside, block
    return blocks * live_steps + outside, 0
