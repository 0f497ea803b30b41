"""What each refinement step does, decided once before the loop.

graph      detach: each step has a graph of its own;  truncate: only the last one has;
           full: one graph through all steps, or through the last `backprop_steps`; the ones in
           front of them run without a graph and are not scored
loss       every: the mean over the steps' losses, or a weighted one (`loss_weights`);
           last: the last step's loss
reencode   before a further step the observed stream is encoded again: such a step reads a context
           that the predictions before it shaped
S1 = detach + every;  S2 = truncate + last;  Algorithm 1 of the paper = full + last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebwm_scale.config.schema import RefinementConfig


@dataclass(frozen=True)
class StepPlan:
    """One refinement step.

    index: 0 for the first step. landscape: which energy landscape it descends.
    needs_graph: the step is differentiated, so its inner gradient has a graph.
    next_needs_graph: the step after it is differentiated.
    keep_graph: the next state carries this step's graph (`refinement.graph: full`, where several
    steps have one: a single step costs less as under `detach`, and has the same gradients).
    keep_state: the next state itself is needed, not only what enters the next step: somebody asked
    for it, noise is added to it, its loss is compared with its energy, or the graph begins there.
    loss_weight: of the step's loss in what is back-propagated; 0 without a graph.
    scale: factor on the sizes of the step, alpha and beta (`refinement.damping`).
    encoded_before: the step before which the context that this one reads is encoded; 0 is the
    observed stream alone. encodes_with_graph: a step that reads the context which this one encodes
    is differentiated.
    ends_graph: what is pending is back-propagated after this step, since the next one reads neither
    its graph nor its encoded context.
    chooses_candidates: after it, further steps move the most probable tokens alone
    (`refinement.candidates`). keep_whole: with candidates, all tokens of a state will be asked for.
    """

    index: int
    landscape: int
    is_last: bool
    needs_graph: bool
    next_needs_graph: bool
    keep_graph: bool
    keep_state: bool
    loss_weight: float
    scale: float = 1.0
    encoded_before: int = 0
    encodes_with_graph: bool = False
    ends_graph: bool = True
    chooses_candidates: bool = False
    keep_whole: bool = False

    @property
    def encodes_again(self) -> bool:
        """The observed stream is encoded again before this step."""
        return 0 < self.encoded_before == self.index


INFERENCE_STEP = StepPlan(
    index=0,
    landscape=0,
    is_last=True,
    needs_graph=False,
    next_needs_graph=False,
    keep_graph=False,
    keep_state=True,
    loss_weight=0.0,
    keep_whole=True,
)


def plan_steps(
    config: RefinementConfig,
    landscapes: Sequence[int],
    *,
    training: bool,
    keep_last_state: bool = False,
    keep_every_state: bool = False,
) -> tuple[StepPlan, ...]:
    """The plan of len(landscapes) steps. training False: no step is differentiated."""
    num_steps = len(landscapes)
    needs_graph = [training and has_graph(config, i, num_steps) for i in range(num_steps)]
    needs_graph.append(False)  # nothing follows the last step
    is_spanned = graph_spans_steps(config, num_steps)
    encoded_before = [last_encoding(config, i) for i in range(num_steps)]
    plan = []
    for i, landscape in enumerate(landscapes):
        is_last = i == num_steps - 1
        if is_last:
            keep_state = keep_last_state or (needs_graph[i] and config.level_weight > 0)
        else:
            # Langevin noise is added to the state itself, and a graph through steps begins at one.
            starts_graph = config.graph == "full" and needs_graph[i + 1] and not needs_graph[i]
            keep_state = config.noise > 0 or config.accept == "lower" or starts_graph
            keep_state = keep_state or config.level_weight > 0
        keep_graph = needs_graph[i] and is_spanned
        shares_context = not is_last and 0 < encoded_before[i] == encoded_before[i + 1]
        readers = [j for j in range(num_steps) if encoded_before[j] == i]
        plan.append(
            StepPlan(
                index=i,
                landscape=landscape,
                is_last=is_last,
                needs_graph=needs_graph[i],
                next_needs_graph=needs_graph[i + 1],
                keep_graph=keep_graph,
                keep_state=keep_state or keep_every_state,
                loss_weight=loss_weight(config, i, num_steps) if needs_graph[i] else 0.0,
                scale=step_scale(config, i),
                encoded_before=encoded_before[i],
                encodes_with_graph=any(needs_graph[j] for j in readers),
                ends_graph=is_last or not (keep_graph or shares_context),
                chooses_candidates=config.candidates is not None and i == 0 and not is_last,
                keep_whole=keep_last_state or keep_every_state,
            )
        )
    return tuple(plan)


def step_scale(config: RefinementConfig, index: int) -> float:
    """Factor on alpha and beta of step `index`, by `refinement.damping` and `damping_after`."""
    number = max(config.damping_after, index + 1)
    return (number / config.damping_after) ** -config.damping


def last_encoding(config: RefinementConfig, index: int) -> int:
    """Before which step the context of step `index` is encoded: 0 for the first encoding."""
    if config.reencode == "none" or index == 0:
        return 0
    return index - (index - 1) % config.reencode_every


def has_graph(config: RefinementConfig, index: int, num_steps: int) -> bool:
    """Whether training differentiates step `index` of num_steps."""
    if config.graph == "full":
        return index >= first_graph_step(config, num_steps)
    if config.graph == "detach":
        return loss_weight(config, index, num_steps) > 0
    return index == num_steps - 1


def first_graph_step(config: RefinementConfig, num_steps: int) -> int:
    """The step that `refinement.backprop_steps` starts to differentiate at, and to score."""
    if config.backprop_steps is None:
        return 0
    return max(0, num_steps - config.backprop_steps)


def loss_weight(config: RefinementConfig, index: int, num_steps: int) -> float:
    """Of the loss of step `index` in the training loss; those of all steps sum to 1."""
    if config.loss == "last":
        return float(index == num_steps - 1)
    first = first_graph_step(config, num_steps)
    if index < first:
        return 0.0
    if config.loss_weights is None:
        return 1 / (num_steps - first)
    weights = relative_loss_weights(config.loss_weights, num_steps)
    return weights[index] / sum(weights[first:])


def relative_loss_weights(given: str | tuple[float, ...], num_steps: int) -> list[float]:
    """One weight for each of num_steps steps, in any unit.

    "rising": the square of the step's number, so that two steps have .2 and .8. "exits": equal, as
    a fresh model has them; those that were learned come as a list (exits.py). A list counts from
    its end, since the last step gives the prediction: fewer steps than it has take its last
    weights, of more steps than it has the first ones have none.
    """
    if given == "exits":
        return [1.0] * num_steps
    if isinstance(given, str):
        return [float(number**2) for number in range(1, num_steps + 1)]
    missing = max(0, num_steps - len(given))
    return [0.0] * missing + list(given[-num_steps:])


def num_graph_steps(config: RefinementConfig, num_steps: int) -> int:
    """How many of num_steps steps training differentiates."""
    return sum(has_graph(config, i, num_steps) for i in range(num_steps))


def graph_spans_steps(config: RefinementConfig, num_steps: int) -> bool:
    """Whether training differentiates several of num_steps steps by one graph."""
    return config.graph == "full" and num_graph_steps(config, num_steps) > 1


def num_landscapes(config: RefinementConfig) -> int:
    """How many landscapes a model is trained with."""
    return config.num_steps if config.landscapes == "per_step" else 1
