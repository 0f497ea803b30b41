"""What each refinement step does, decided once before the loop.

graph      detach: each step has a graph of its own;  truncate: only the last one has;
           full: one graph through all steps
loss       every: the mean over the steps' losses, or a weighted one (`loss_weights`);
           last: the last step's loss
S1 = detach + every;  S2 = truncate + last;  Algorithm 1 of the paper = full + last
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ebwm_scale.config.schema import RefinementConfig


@dataclass(frozen=True)
class StepPlan:
    """One refinement step.

    index: 0 for the first step. landscape: which energy landscape it descends.
    needs_graph: the step is differentiated, so its inner gradient has a graph.
    next_needs_graph: the step after it is differentiated.
    keep_graph: the next state carries this step's graph (`refinement.graph: full`).
    keep_state: the next state itself is needed, not only what enters the next step.
    loss_weight: of the step's loss in what is back-propagated; 0 without a graph.
    """

    index: int
    landscape: int
    is_last: bool
    needs_graph: bool
    next_needs_graph: bool
    keep_graph: bool
    keep_state: bool
    loss_weight: float


INFERENCE_STEP = StepPlan(
    index=0,
    landscape=0,
    is_last=True,
    needs_graph=False,
    next_needs_graph=False,
    keep_graph=False,
    keep_state=True,
    loss_weight=0.0,
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
    plan = []
    for i, landscape in enumerate(landscapes):
        is_last = i == num_steps - 1
        if is_last:
            keep_state = keep_last_state
        else:
            keep_state = config.noise > 0  # Langevin noise is added to the state itself
        plan.append(
            StepPlan(
                index=i,
                landscape=landscape,
                is_last=is_last,
                needs_graph=needs_graph[i],
                next_needs_graph=needs_graph[i + 1],
                keep_graph=needs_graph[i] and config.graph == "full",
                keep_state=keep_state or keep_every_state,
                loss_weight=loss_weight(config, i, num_steps) if needs_graph[i] else 0.0,
            )
        )
    return tuple(plan)


def has_graph(config: RefinementConfig, index: int, num_steps: int) -> bool:
    """Whether training differentiates step `index` of num_steps."""
    if config.graph == "full":
        return True
    if config.graph == "detach":
        return loss_weight(config, index, num_steps) > 0
    return index == num_steps - 1


def loss_weight(config: RefinementConfig, index: int, num_steps: int) -> float:
    """Of the loss of step `index` in the training loss; those of all steps sum to 1."""
    if config.loss == "last":
        return float(index == num_steps - 1)
    if config.loss_weights is None:
        return 1 / num_steps
    weights = relative_loss_weights(config.loss_weights, num_steps)
    return weights[index] / sum(weights)


def relative_loss_weights(given: str | tuple[float, ...], num_steps: int) -> list[float]:
    """One weight for each of num_steps steps, in any unit.

    "rising": the square of the step's number, so that two steps have .2 and .8. A list counts from
    its end, since the last step gives the prediction: fewer steps than it has take its last
    weights, of more steps than it has the first ones have none.
    """
    if isinstance(given, str):
        return [float(number**2) for number in range(1, num_steps + 1)]
    missing = max(0, num_steps - len(given))
    return [0.0] * missing + list(given[-num_steps:])


def num_graph_steps(config: RefinementConfig, num_steps: int) -> int:
    """How many of num_steps steps training differentiates."""
    return sum(has_graph(config, i, num_steps) for i in range(num_steps))


def num_landscapes(config: RefinementConfig) -> int:
    """How many landscapes a model is trained with."""
    return config.num_steps if config.landscapes == "per_step" else 1


def count_reads(plan: Sequence[StepPlan]) -> Counter[int]:
    """How often each landscape's context is read by a step that is differentiated."""
    return Counter(step.landscape for step in plan if step.needs_graph)
