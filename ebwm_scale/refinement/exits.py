"""A learned distribution over the steps that a prediction may be taken after
(`refinement.loss_weights: exits`).

    q = softmax(l)                                      l (N,): a number per step, learned
    loss = sum_i q_i loss_i + exit_entropy x KL(q | uniform)

The loss is its expectation over exits; the divergence from the uniform distribution keeps q from
shrinking to the one step that is best at first, so that the others stay trained. A batch of fewer
steps, or one whose first steps have no graph, has the distribution of those that are scored. Where
the losses stand still q is proportional to exp(-loss_i / exit_entropy).

In eval mode a model's loss is the expectation alone. Source of the objective: looped language
models, arXiv 2510.25741, whose gate also reads the input; PonderNet, arXiv 2107.05407.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.refinement.step_plan import first_graph_step

EXITS = "exits"


def with_exit_weights(
    config: RefinementConfig, logits: Tensor | None, num_steps: int
) -> RefinementConfig:
    """The configuration with the learned distribution as its list of weights.

    logits (N,): of the trained steps; of more steps the others have no weight.
    """
    if config.loss_weights != EXITS or logits is None:
        return config
    weights = exit_probabilities(logits[:num_steps]).tolist()
    weights += [0.0] * (num_steps - len(weights))
    return config.replace(loss_weights=tuple(weights))


def exit_probabilities(logits: Tensor) -> Tensor:
    """q (N,) without graph, float64."""
    return logits.detach().double().softmax(-1)


def exit_objective(logits: Tensor, losses: Sequence[Tensor], config: RefinementConfig) -> Tensor:
    """A scalar with the graph of logits (N,): the training loss of the steps' losses."""
    first = first_graph_step(config, len(losses))
    of_steps = torch.stack([loss.detach() for loss in losses[first:]])
    log_q = logits[first : len(losses)].to(of_steps.dtype).log_softmax(-1)
    q = log_q.exp()
    divergence = (q * (log_q + math.log(len(of_steps)))).sum()
    return (q * of_steps).sum() + config.exit_entropy * divergence


def exit_summary(logits: Tensor) -> dict[str, Any]:
    """For people: the probability of each exit, and the number of steps to expect."""
    q = exit_probabilities(logits)
    steps = torch.arange(1, len(q) + 1, dtype=q.dtype, device=q.device)
    return {"probabilities": q.tolist(), "expected_step": float((q * steps).sum())}
