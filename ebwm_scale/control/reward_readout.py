"""The reward that an imagined frame promises: a linear readout, fitted by ridge regression.

    r_t  ~  w . [o_(t+1), a_t] + b        o: a frame's states as the model sees them, a: the action

Datasets keep rewards as outcomes, and no model is trained on them. So the readout is fitted when it
is asked for, in closed form, on steps of the training split; the strength of the ridge is the one
with the least leave-one-out error. It is held against the validation split: where it does not tell
rewards there, planning by it would be planning by noise, and it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.control.actions import ActionSpec
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shards import ShardedSplit, open_split
from ebwm_scale.data.loading.batches import stacked, to_tensor, to_tensors
from ebwm_scale.inference.imagination import ACTION

MOST_STEPS = 2048  # of the training split; of the validation split a quarter
STRENGTHS = 10.0 ** np.arange(-4, 7)  # of the ridge, in units of a feature's mean square
LEAST_TOLD = 0.05  # of R^2: rewards that no frame shows reach about 0, now and then a bit more
PULL = 0.5  # a goal's pull towards reward: as of a frame so far away, in standard deviations


@dataclass(frozen=True)
class RewardGoal:
    """As much reward as the readout expects, summed over the horizon.

    of_states (P, dimension), of_actions (A,): weights; actions as in action_features. told: the
    share of the reward's variance on the validation split that it tells (R^2).
    """

    spec: ActionSpec
    of_states: Tensor
    of_actions: Tensor
    bias: float
    told: float

    def rewards(self, states: Tensor, actions: Tensor) -> Tensor:
        """Expected (N, H): states (N, H, P, dimension) that actions (N, H, ..) lead to."""
        features = action_features(actions, self.spec).to(states)
        of_states = (states * self.of_states.to(states)).sum((-2, -1))
        return of_states + features @ self.of_actions.to(states) + self.bias

    def cost(self, states: Tensor, actions: Tensor) -> Tensor:
        return -self.rewards(states, actions).sum(1)

    def pull(self, states: Tensor, actions: Tensor) -> Tensor:
        """Scaled so that it pulls as a goal's frame does that is PULL away in every number."""
        norm = self.of_states.norm().clamp(min=1e-12)
        return self.cost(states, actions) * PULL * self.of_states.numel() ** 0.5 / norm


def action_features(actions: Tensor, spec: ActionSpec) -> Tensor:
    """(.., A) of actions in the model's units (.., width): numbers as they are; ids as one of
    `width` times `values` numbers each. Probabilities (.., width, values) stay differentiable.
    """
    if not spec.is_discrete:
        return actions
    if not actions.is_floating_point():
        actions = F.one_hot(actions, spec.most_values).float()
    return actions.flatten(-2)


def fit_reward(manifest: Manifest, spec: ActionSpec) -> RewardGoal:
    """The readout of a dataset's rewards; the same for the same dataset.

    Raises UserError where there are no rewards, where all are the same, and where a readout does
    not tell them.
    """
    content = manifest.content
    if not isinstance(content, VideoContent) or "reward" not in content.outcomes:
        raise UserError(
            f"--goal reward: {manifest.path} keeps no rewards; give a frame as the goal"
        )
    train = _steps(open_split(manifest, "train", verify="sizes"), spec, MOST_STEPS)
    held_out = _steps(open_split(manifest, "validation", verify="sizes"), spec, MOST_STEPS // 4)
    features, rewards = train
    if float(rewards.std(correction=0)) < 1e-9:
        raise UserError(
            f"--goal reward: every step of {manifest.path} has the reward {float(rewards[0]):g}: "
            "there is nothing to plan for; give a frame as the goal"
        )
    weights, bias = ridge(features, rewards)
    told = share_told(held_out[0] @ weights + bias, held_out[1])
    if told < LEAST_TOLD:
        raise UserError(
            f"--goal reward: the reward cannot be read from this dataset's frames (a linear "
            f"readout has R^2 {told:.2f} on held-out steps, below {LEAST_TOLD}); give a frame as "
            "the goal"
        )
    num_states = content.group_size * content.dimension
    device = spec.observe.device
    return RewardGoal(
        spec,
        weights[:num_states].view(content.group_size, -1).float().to(device),
        weights[num_states:].float().to(device),
        bias,
        told,
    )


def share_told(expected: Tensor, rewards: Tensor) -> float:
    """R^2; 0 where the held-out rewards are all the same and so nothing can be told."""
    spread = (rewards - rewards.mean()).square().sum()
    if float(spread) == 0:
        return 0.0
    return float(1 - (rewards - expected).square().sum() / spread)


def ridge(features: Tensor, rewards: Tensor) -> tuple[Tensor, float]:
    """(weights (D,), bias) in float64 of features (n, D) and rewards (n,).

    With X centred and X X^T = U S U^T, the residuals without a step's own say are
    (r - H r) / (1 - diag H), H = U S / (S + strength) U^T + 1/n: all strengths from one
    decomposition of n x n numbers, however many features there are.
    """
    x, r = features.double(), rewards.double()
    middle, mean = x.mean(0), r.mean()
    x, r = x - middle, r - mean
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0)
    projected = vectors.T @ r
    unit = float(values.mean().clamp(min=1e-12))
    best = None
    for strength in STRENGTHS * unit:
        shrunk = values / (values + strength)
        residual = r - vectors @ (shrunk * projected)
        own = (vectors.square() @ shrunk) + 1 / len(r)
        error = float((residual / (1 - own).clamp(min=1e-9)).square().mean())
        if best is None or error < best[0]:
            best = (error, strength)
    assert best is not None
    weights = x.T @ (vectors @ (projected / (values + best[1])))
    return weights, float(mean - middle @ weights)


def _steps(split: ShardedSplit, spec: ActionSpec, most: int) -> tuple[Tensor, Tensor]:
    """(features (n, D), rewards (n,)) in float64 of at most so many steps, from clips that are
    spread over a split.
    """
    observe = spec.observe
    assert observe.space is not None, "a world is of frames"
    size = observe.group_size
    length = split.manifest.block_length // size - 1
    count = max(1, min(len(split), most // length))
    features, rewards = [], []
    for number in np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)).tolist():
        sequences, stored = stacked([split.read_sample(number)])
        states = observe.space.states(to_tensor(sequences))[0].unflatten(0, (-1, size))[1:]
        actions = observe.conditions(to_tensors(stored))[ACTION][0]
        row = torch.cat([states.flatten(1), action_features(actions, spec).to(states)], 1)
        features.append(row.double().cpu())
        reward = np.array(split.outcomes(number)["reward"], np.float64)
        rewards.append(torch.from_numpy(reward))
    return torch.cat(features), torch.cat(rewards)
