"""FLOPs of a training step, in closed forms from the configuration, tested against counted
products.

    step_flops(config, samples=128)["observed"]

Legend: B samples, S positions (of states; conditions are further rows of the observed stream), D
width, K = H_kv d width of keys, F feed-forward width, L blocks, k of them passed by the predicted
stream, V size of a state, N refinement steps, G of them with a graph, C candidates of further
steps, R = B S rows. A FLOP is half a multiply-add.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ebwm_kernels.attention.ops import PRODUCTS
from ebwm_kernels.attention.visibility import visible_pairs
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.resolved import (
    context_group,
    context_length,
    group_size,
    model_sizes,
    num_candidates,
    num_groups,
    num_training_losses,
    reencoded_blocks,
    state_size,
)
from ebwm_scale.config.schema import Config
from ebwm_scale.model.energy_transformer import one_context_serves_all
from ebwm_scale.refinement.energy_level import EnergyLevel
from ebwm_scale.refinement.step_plan import (
    StepPlan,
    graph_spans_steps,
    num_graph_steps,
    num_landscapes,
    plan_steps,
)

# Products of (queries, keys, d) that each level of the predicted stream's attention needs at least.
# The Triton kernels make more of them, to keep less (attention_ops.PRODUCTS): their way of
# computing, not the model's work.
ATTENTION_FORWARD = PRODUCTS["reference"]["forward"]
ATTENTION_INNER, ATTENTION_FIRST_ORDER = PRODUCTS["reference"]["gradient"]
ATTENTION_SECOND_ORDER = PRODUCTS["reference"]["double_backward"][0]
# The same with a group's own keys. They are the candidates', so every level has their gradients.
OWN_INNER = PRODUCTS["reference"]["gradient"][1]
OWN_SECOND_ORDER = PRODUCTS["reference"]["double_backward"][1]
# Products of scaled_dot_product_attention as PyTorch counts them: over the whole square, causal or
# not; scores again in the backward.
SDPA_FORWARD, SDPA_BACKWARD = 2, 5


@dataclass(frozen=True)
class Passes:
    """How often the observed stream passes some blocks, and how many of these times are
    back-propagated.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class StepSizes:
    """The numbers that all closed forms are made of; weights are multiply-adds per row."""

    width: int
    keys: int
    feed_forward: int
    layers: int
    loops: int  # passes of the observed stream
    predicted_layers: int  # blocks of the predicted stream
    state: int  # V: vocabulary size, or dimension of a frame embedding
    positions: int
    observed_positions: int  # with the conditions between them
    offset: int  # rows in front of the observed ones
    group: int  # positions that are predicted together
    context_group: int  # with their conditions
    condition_weights: int  # of the maps of conditions, per group and sample
    steps: int
    graph_steps: int
    first_reencoded: int  # the block where the observed stream is encoded again from, or 0
    fronts: Passes  # of the observed stream through the blocks in front of that one
    contexts: Passes  # of the first encoding through that one and those behind it
    again: Passes  # of what is encoded again through them
    graph_predictions: int  # times that what is encoded again passes a gradient to its predictions
    block_weights: int  # the same + 3 D F
    has_own_keys: bool  # whether a candidate attends to itself
    # adaLN of each stream's blocks, D x 6 D each, computed once per call whatever the rows
    observed_modulation: int
    modulation_weights: int  # of the predicted stream
    final_modulation: int  # D x 2 D
    reads_output: bool  # the head reads the observed stream's last output
    content_weights: int  # of the head's terms in n, D x D each
    linear: bool  # whether the head has a linear term
    workspace: int  # numbers of a workspace, or 0
    workspace_term: bool  # whether the head has a term in it

    @classmethod
    def of(cls, config: Config, num_steps: int | None = None) -> StepSizes:
        model, refinement = config.model, config.refinement
        steps = num_steps or refinement.num_steps
        plan = plan_steps(refinement, range(steps), training=True)
        first = [step for step in plan if step.encoded_before == 0]
        again = [step for step in plan if step.encodes_again]
        shared = one_context_serves_all(model.conditioning, num_landscapes(refinement))
        sizes = model_sizes(model)
        width, keys = sizes.width, sizes.kv_width
        attention = 2 * width**2 + 2 * width * keys
        adaptive = model.conditioning in ("adaln", "adaln_zero", "predicted_only")
        return cls(
            width=width,
            keys=keys,
            feed_forward=sizes.feed_forward_width,
            layers=sizes.num_layers,
            loops=model.loops,
            predicted_layers=sizes.predicted_layers,
            state=state_size(config),
            positions=context_length(config),
            observed_positions=num_groups(config) * context_group(config),
            offset=int(model.conditioning == "time_embed"),
            group=group_size(config),
            context_group=context_group(config),
            condition_weights=width
            * sum(c.width for c in config.data.conditions if c.kind == "continuous"),
            steps=steps,
            graph_steps=num_graph_steps(refinement, steps),
            first_reencoded=(sizes.num_layers - reencoded_blocks(config)) * (len(again) > 0),
            fronts=_once_per_landscape(plan, shared),
            contexts=_once_per_landscape(first, shared),
            again=Passes(len(again), sum(step.encodes_with_graph for step in again)),
            graph_predictions=sum(step.needs_graph for step in again),
            block_weights=attention + 3 * width * sizes.feed_forward_width,
            has_own_keys=model.own_keys,
            observed_modulation=(
                6 * width**2 * sizes.num_layers
                if model.conditioning in ("adaln", "adaln_zero")
                else 0
            ),
            modulation_weights=6 * width**2 * sizes.predicted_layers if adaptive else 0,
            final_modulation=2 * width**2 if adaptive else 0,
            reads_output="context" in model.energy_head,
            content_weights=width**2
            * sum(term in ("quadratic", "bilinear") for term in model.energy_head),
            linear="linear" in model.energy_head,
            workspace=config.state.workspace or 0,
            workspace_term=config.state.workspace is not None and "bilinear" in model.energy_head,
        )

    def causal_pairs(self) -> int:
        """(query, key) pairs of one head of the predicted stream, own keys aside."""
        return visible_pairs(
            self.positions,
            self.observed_positions + self.offset,
            self.offset,
            group_size=self.group,
            context_group=self.context_group,
        )

    @property
    def predicted_block_weights(self) -> int:
        """Of a block of the predicted stream: without own keys it makes no keys and values."""
        return self.block_weights - 2 * self.width * self.keys * (not self.has_own_keys)

    @property
    def own_keys(self) -> int:
        """Own keys of a row that need products: a group's; a single one needs none."""
        return self.group if self.group > 1 and self.has_own_keys else 0

    def attention(
        self, samples: int, *, forward: int, inner: int, first_order: int = 0, second_order: int = 0
    ) -> float:
        """FLOPs of the predicted stream's attention, each level so many times in every block."""
        of_context = (
            forward * ATTENTION_FORWARD
            + inner * ATTENTION_INNER
            + first_order * ATTENTION_FIRST_ORDER
            + second_order * ATTENTION_SECOND_ORDER
        )
        of_own = (
            forward * ATTENTION_FORWARD
            + inner * OWN_INNER
            + first_order * ATTENTION_FIRST_ORDER
            + second_order * OWN_SECOND_ORDER
        )
        pairs = self.causal_pairs() * of_context + self.positions * self.own_keys * of_own
        return 2.0 * samples * self.width * self.predicted_layers * pairs


def _once_per_landscape(readers: Sequence[StepPlan], shared: bool) -> Passes:
    """Of what is encoded once for all the steps that read it and share it."""
    differentiated = sum(step.needs_graph for step in readers)
    if shared:
        return Passes(min(1, len(readers)), min(1, differentiated))
    return Passes(len(readers), differentiated)


def step_flops(config: Config, *, samples: int, num_steps: int | None = None) -> dict[str, float]:
    """FLOPs of one training step (forward and backward, all refinement steps) of `samples` samples,
    by part; the sum is the step.

    Counted: matrix products and attention, 2 per multiply-add: attention of the predicted stream
    over the (query, key) pairs that exist, of the observed stream over the whole square (PyTorch's
    count; a causal kernel may do half). Not counted: elementwise work, softmax, row-wise dot
    products, optimizer. "recomputation" is what activation checkpointing adds; leave it out for an
    MFU. num_steps: refinement steps of this training step where they vary; default
    refinement.num_steps. Needs a resolved config with data.context_length and model.vocabulary_size
    or state.dimension.
    """
    z = StepSizes.of(config, num_steps)
    rows = samples * z.positions
    blocks, state_product = z.layers * z.block_weights, 2.0 * rows * z.state * z.width
    square = 2.0 * samples * z.width * (z.observed_positions + z.offset) ** 2
    frames = {}
    if config.state.kind == "embedding":
        frames = {"state_projection": 2 * state_product}  # observed: forward, dW
    conditions = 4.0 * samples * (z.positions // z.group) * z.condition_weights  # forward, dW
    if config.model.kind == "baseline":
        two = config.model.output == "two_linear"
        hidden_product = 2.0 * rows * z.width**2 if two else 0.0
        loops = config.model.loops
        outputs = num_training_losses(config.model)
        observed_rows = samples * z.observed_positions
        parts = {
            "blocks_forward": 2.0 * observed_rows * loops * blocks,
            "blocks_backward": 4.0 * observed_rows * loops * blocks,
            "attention": square * loops * z.layers * (SDPA_FORWARD + SDPA_BACKWARD),
            "conditions": conditions,
            **frames,
            # forward, dx, dW
            "output" if frames else "vocabulary": 3 * outputs * (state_product + hidden_product),
        }
        return {part: value for part, value in parts.items() if value}
    N, G = z.steps, z.graph_steps
    observed = _observed_flops(z, samples)
    predicted = z.predicted_layers * z.predicted_block_weights + z.content_weights
    modulation = z.modulation_weights + z.final_modulation
    head = z.width if z.linear else 0
    accepts = config.refinement.accept == "lower"
    by_block = config.refinement.recompute == "block"
    energies_alone = N * (accepts and not by_block)
    measures_end = config.refinement.level_weight > 0
    parts = {
        "observed": observed["products"],
        "conditions": conditions,
        "predicted_forward": 2.0 * N * (rows * (predicted + head) + modulation),
        "inner_gradient": 2.0 * N * rows * (predicted + head),
        # Per weight: two products for the double backward of dx = dy W, two for x W; the energy
        # itself is in the loss only where its level is.
        "outer_backward": G * (8.0 * rows * predicted + 4.0 * modulation + 2.0 * rows * head)
        + 4.0 * rows * head * _num_measured(config, N),
        "level": _level_flops(config, z, samples),
        "workspace": _workspace_flops(config, z, rows),
        "acceptance": _acceptance_flops(config, z, samples),
        "recomputation": (G + measures_end * by_block) * _recomputation(config, z, samples)
        + by_block * (observed["recomputation"] + (N - G) * _forward_again(z, samples)),
        "attention_observed": observed["attention"],
        "attention_predicted": z.attention(
            samples,
            forward=N + energies_alone + measures_end,
            inner=N + measures_end * by_block,
            first_order=G + measures_end,
            second_order=G + measures_end * by_block,
        ),
    }
    of_states = state_product * _state_products(config, z)
    if frames:
        parts["state_projection"] = frames["state_projection"] + of_states
    else:
        parts["vocabulary"] = of_states + _candidate_flops(config, z, rows)
    return {part: value for part, value in parts.items() if value}


def _num_measured(config: Config, num_steps: int) -> int:
    """Steps whose own energy is in the loss, by `refinement.level_weight`."""
    if config.refinement.level_weight == 0:
        return 0
    plan = plan_steps(config.refinement, range(num_steps), training=True)
    return sum(EnergyLevel.at_start(step) for step in plan)


def _level_flops(config: Config, z: StepSizes, samples: int) -> float:
    """Of `refinement.level_weight` where the last step ended: the state and its workspace into the
    predicted stream, forward and back. Under full graphs the way back goes on through the steps.
    """
    if config.refinement.level_weight == 0:
        return 0.0
    rows = samples * z.positions
    is_full = graph_spans_steps(config.refinement, z.steps)
    head = z.width if z.linear else 0
    predicted = z.predicted_layers * z.predicted_block_weights + z.content_weights
    flops = 6.0 * (rows * (predicted + head) + z.modulation_weights + z.final_modulation)
    if config.refinement.recompute == "block":  # a step whose slopes nobody reads
        flops += rows * (6.0 * predicted + 4.0 * head)
    flops += 2.0 * rows * z.state * z.width * (2 + is_full)
    if z.workspace:
        flops += 2.0 * rows * z.width * z.workspace * (2 + is_full)
    if z.workspace_term:
        flops += 6.0 * rows * z.width**2
    return flops


def _observed_flops(z: StepSizes, samples: int) -> dict[str, float]:
    """Of encoding the observed stream, again before further steps too; by kind.

    Of the last pass's last block only keys and values exist, unless the head reads more; adaLN of
    the final norm is computed but not used. A pass through some blocks computes the adaLN of all of
    them.
    """
    rows = samples * z.positions
    observed_rows = samples * (z.observed_positions + z.offset)
    square = 2.0 * samples * z.width * (z.observed_positions + z.offset) ** 2
    final = z.final_modulation if z.observed_modulation else 0
    behind = z.layers - z.first_reencoded
    weights = behind * z.block_weights
    whole_blocks = behind  # with attention
    context_term = rows * z.width**2
    if not z.reads_output:
        weights += 2 * z.width * z.keys - z.block_weights
        whole_blocks -= 1
        context_term = 0
    parts = [(z.contexts, weights, context_term, behind, whole_blocks)]
    parts.append((z.again, weights, context_term, behind, whole_blocks))
    if z.first_reencoded:
        in_front = z.first_reencoded
        parts.append((z.fronts, in_front * z.block_weights, 0, in_front, in_front))
    earlier = Passes(z.fronts.forward * (z.loops - 1), z.fronts.backward * (z.loops - 1))
    parts.append((earlier, z.layers * z.block_weights, 0, z.layers, z.layers))
    feedback = z.again.forward + z.again.backward + z.graph_predictions
    if z.workspace:  # a workspace has a matrix of its own; what starts it has no gradient
        feedback *= 2
    flops = {"products": 2.0 * rows * z.width**2 * feedback, "attention": 0.0, "recomputation": 0.0}
    for passes, weights, beside, blocks, attentions in parts:
        forward = observed_rows * weights + beside
        modulation = z.observed_modulation * blocks / z.layers
        flops["products"] += 2.0 * passes.forward * (forward + z.observed_modulation + final)
        flops["products"] += 4.0 * passes.backward * (forward + modulation)
        attention = passes.forward * SDPA_FORWARD + passes.backward * SDPA_BACKWARD
        flops["attention"] += square * attentions * attention
        once_more = 2.0 * observed_rows * weights + square * attentions * SDPA_FORWARD
        flops["recomputation"] += passes.backward * once_more
    return flops


def _workspace_flops(config: Config, z: StepSizes, rows: int) -> float:
    """Of its map, its steps and the head's term in it; the last step's z is computed only where a
    penalty reads how it moved, or a level where it ended.
    """
    if not z.workspace:
        return 0.0
    N, G = z.steps, z.graph_steps
    is_full = graph_spans_steps(config.refinement, N)
    moves_with_graph = G - 1 if is_full else 0
    # Into each step, and Z's gradient; under full that of z too, but for the first one.
    products = N + G + moves_with_graph
    moves = N - 1
    if config.refinement.level_weight:
        moves = N
        moves_with_graph = G if is_full else 0
    if config.refinement.spectral_penalty:
        moves = N
        pairs = sum(
            step.needs_graph for step in plan_steps(config.refinement, range(N), training=True)[1:]
        )
        moves_with_graph = G if is_full and pairs else pairs
    # Each step of z, and both gradients of its product where the loss reads it.
    products += moves + 2 * moves_with_graph
    flops = 2.0 * rows * z.width * z.workspace * products
    if z.workspace_term:
        # M2 n and its way back; two products of the latter's gradient, and under full two of
        # dE/dw's, which later steps read.
        term = 2 * N + 2 * G + 2 * moves_with_graph
        # The energy itself is in the loss where dE/dw is not.
        if not config.refinement.spectral_penalty and not is_full:
            term += 2 * _num_measured(config, N)
        flops += 2.0 * rows * z.width**2 * term
    return flops


def _acceptance_flops(config: Config, z: StepSizes, samples: int) -> float:
    """Of `refinement.accept: lower`: each step once more without a graph, and the energy where it
    leads. Recomputing blocks, that energy comes with its slopes (inner_gradient.energy_of).
    """
    if config.refinement.accept == "always":
        return 0.0
    N, rows = z.steps, samples * z.positions
    by_block = config.refinement.recompute == "block"
    head = z.width if z.linear else 0
    predicted = z.predicted_layers * z.predicted_block_weights + z.content_weights + head
    flops = 2.0 * rows * predicted * (1 + by_block)
    flops += 2.0 * (z.modulation_weights + z.final_modulation)
    flops += 2 * 2.0 * rows * z.state * z.width  # out of the step, and into the energy
    if z.workspace:
        flops += 2 * 2.0 * rows * z.workspace * z.width
    if z.workspace_term:
        flops += 2.0 * rows * z.width**2 * (1 + by_block)
    if by_block:  # otherwise its attention is counted with the steps'
        flops += z.attention(samples, forward=1, inner=1) + _forward_again(z, samples)
    return N * flops


def run_flops(config: Config) -> float:
    """FLOPs of all of train.max_steps together, each of the samples that it has in a batch ramp and
    of refinement.num_steps steps; with recomputation.
    """
    samples = BatchRamp.of(config.train).samples_before(config.train.max_steps)
    return sum(step_flops(config, samples=samples).values())


def model_flops(flops: dict[str, float]) -> float:
    """The sum that an MFU is made of: everything but recomputation."""
    return sum(value for part, value in flops.items() if part != "recomputation")


def starts_uniform(config: Config) -> bool:
    """Whether all rows start a training step from zeros, whose embedding needs no product."""
    refinement = config.refinement
    return config.state.initial == "zeros" and refinement.noise == 0 and not refinement.replay


def _state_products(config: Config, z: StepSizes) -> int:
    """Products of size rows * V * D of all refinement steps, see
    kernels/ebwm_kernels/vocabulary/api.py and model/states.py.
    """
    refinement, N, G = config.refinement, z.steps, z.graph_steps
    uniform = starts_uniform(config) and config.state.kind == "vocabulary"
    if _further_plan(config, z):
        first = plan_steps(refinement, range(N), training=True)[0]
        products = 1 + 2 * first.needs_graph
        return products if uniform else products + 1 + first.needs_graph
    is_full = graph_spans_steps(refinement, N)
    if config.state.kind == "embedding" or is_full:
        # Plain autograd: into a step and out of it, W's gradient from both, and the way back
        # through the latter; full: through both.
        back = G - 1 if is_full else 0
        from_zeros = uniform * (1 + (G == N))  # no product into the first step, none back
        products = 2 * N + 3 * G + back - from_zeros
        if refinement.momentum and config.state.kind == "embedding":
            products += _carried_products(config, N)
        return products
    clamps = refinement.change_clamp is not None or refinement.state_clamp is not None
    # So do a soft cap and a z-loss: such steps are scored, and embedded on their own.
    clamps = clamps or config.model.logit_softcap is not None or config.train.z_loss > 0
    adds_up = refinement.update == "mirror" and uniform
    products = 0
    for step in plan_steps(refinement, range(N), training=True):
        # A step's loss and the next step's entry share one gradient of W, and the loss's gradient
        # of h costs nothing.
        fused = (
            (refinement.update == "probabilities" or adds_up)
            and not (clamps or step.is_last or step.keep_state)
            and (step.loss_weight == 0 or step.next_needs_graph)
        )
        adds_up = adds_up and fused
        if step.index > 0 or not uniform:
            products += 1 + step.needs_graph  # into the step, and W's gradient from there
        products += 1  # out of it
        if step.needs_graph and not fused:
            products += 2
    return products


def _carried_products(config: Config, num_steps: int) -> int:
    """Out of a frame's momentum, W's gradient from there, and the way back under full."""
    products = 0
    plan = plan_steps(config.refinement, range(num_steps), training=True)
    for previous, step in itertools.pairwise(plan):
        products += 1 + step.needs_graph + (step.needs_graph and previous.keep_graph)
    return products


def _forward_again(z: StepSizes, samples: int) -> float:
    """FLOPs that refinement.recompute block adds to a step without a graph.

    Its inner gradient passes each block once more, as it keeps none.
    """
    weights = z.predicted_layers * z.predicted_block_weights
    return 2.0 * samples * z.positions * weights + z.attention(samples, forward=1, inner=0)


def _further_plan(config: Config, z: StepSizes) -> tuple[StepPlan, ...]:
    """The steps that move candidates alone; none where all tokens move."""
    if config.state.kind == "embedding" or num_candidates(config) is None:
        return ()
    return plan_steps(config.refinement, range(z.steps), training=True)[1:]


def _candidate_flops(config: Config, z: StepSizes, rows: int) -> float:
    """Of the steps that move candidates alone, see ebwm_kernels/vocabulary/candidates.py."""
    further = _further_plan(config, z)
    if not further:
        return 0.0
    products = 0
    before = plan_steps(config.refinement, range(z.steps), training=True)
    for previous, step in zip(before, further):
        products += 2  # into the step and out of it
        if step.needs_graph:
            products += 3  # W's gradient from both, and h's
        if previous.keep_graph:
            products += 1  # q's, which the steps before it have a part in
    return 2.0 * rows * (num_candidates(config) or 0) * z.width * products


def _recomputation(config: Config, z: StepSizes, samples: int) -> float:
    """FLOPs that refinement.recompute adds per step with a graph.

    step: the step is computed again in the backward. block: the four lines of
    refinement/block_recompute.py; per weight 4 forwards in place of 1, 2 inner gradients in place
    of 1, and the way back through the forward twice, which w2 (whose output nothing bends) is
    spared once.
    """
    rows = samples * z.positions
    blocks = z.predicted_layers * z.predicted_block_weights
    modulation = z.modulation_weights + z.final_modulation
    head = z.width if z.linear else 0
    content = z.content_weights + z.width**2 * z.workspace_term
    if config.refinement.recompute == "step":
        return (
            (2 * 2 + 2) * rows * (blocks + content)
            + 2 * 2 * (rows * head + modulation)
            + z.attention(samples, forward=2, inner=1)
        )
    if config.refinement.recompute == "block":
        spared = 2 * z.predicted_layers * z.width * z.feed_forward
        head += content
        attention = z.attention(samples, forward=3, inner=1, first_order=1)
        return 2.0 * rows * (6 * blocks - spared + 2 * head) + attention
    return 0.0
