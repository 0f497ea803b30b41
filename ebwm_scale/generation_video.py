"""Clips to look at: what a model saw, what it predicted after each refinement step, the truth, and a continuation of its own."""
from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data.content import encode_image
from .draws import SampledDraws
from .encoders.space import FrameSpace
from .model.world_model import WorldModel
from .noise import NoiseSource
from .refinement import StepRecord, refine
from .training.validation import EVALUATION_STEP


@torch.no_grad()
def predict(model: WorldModel, observed: Tensor, source: NoiseSource, sample_id: int = 0) -> list[Tensor]:
    """The last position's prediction of the state after observed (S, dimension): [x_0, x_1, ... x_N], each (dimension,).

    A baseline gives one entry.
    """
    embedded = model.embed_observed(observed[None])
    if model.config.model.kind == "baseline":
        return [model.output(model.network(embedded))[0, -1].float()]
    rules, states = model.config.refinement, []
    draws = SampledDraws(source, rules, torch.tensor([sample_id]), (1, len(observed), model.state.size), kind=model.config.state.initial,
                         randomize=False, device=observed.device, start=observed[None])

    def remember(step: StepRecord) -> None:
        states.append(step.state[0, -1].float())

    refine(model, embedded, None, rules=rules, landscapes=model.landscapes(rules.num_steps), draws=draws, training=False,
           keep_state=torch.float32, record=remember)
    return [draws.initial()[0, -1].float(), *states]


@torch.no_grad()
def energies(model: WorldModel, observed: Tensor, candidates: Tensor) -> list[float]:
    """Energies in the last landscape of candidate next states (K, dimension) after observed (S, dimension)."""
    embedded = model.embed_observed(observed.expand(len(candidates), -1, -1))
    landscape = model.network.num_landscapes - 1
    context = model.network.encode(embedded, landscape)
    entered = model.state.enter(candidates[:, None].expand(-1, len(observed), -1)).embedded    # only the last position is read
    return model.network.energy(model.predicted_rows(entered, embedded), context, landscape)[:, -1].float().tolist()


def continue_clip(model: WorldModel, observed: Tensor, count: int, source: NoiseSource, sample_id: int = 0) -> Tensor:
    """`count` further states (count, dimension), each predicted from those before it."""
    length, states = model.config.data.context_length, observed
    for _ in range(count):
        states = torch.cat([states, predict(model, states[-length:], source, sample_id)[-1][None]])
    return states[len(observed):]


def sample_clips(model: WorldModel, split, *, seed: int, num_samples: int = 3) -> list[dict[str, Any]]:
    """For samples.json: clips of the split, evenly spaced. Images are data URIs, or None where the encoder cannot go back to frames.

    Each: video, start_s; context [images], truth, candidates [{"step", "image", "loss" (SmoothL1 to the truth), "energy"}] for x_0, x_1, ...;
    copy_last_loss; truth_energy; continuation and continuation_truth [images], from half of the context on, and their losses per frame.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    space, length = FrameSpace(split.manifest.content, device), model.config.data.context_length
    source, energy = NoiseSource(seed, EVALUATION_STEP), model.config.model.kind == "energy"
    results = []
    for sample_id in [int((i + 0.5) * len(split) / num_samples) for i in range(min(num_samples, len(split)))]:
        sequence = split.read(sample_id)[:length + 1]
        states = space.states(torch.from_numpy(np.array(sequence))[None])[0]
        frames = sequence if sequence.dtype == np.uint8 else decoded(space, states)
        observed, truth = states[:length], states[length]
        predicted = predict(model, observed, source, sample_id)
        values = energies(model, observed, torch.stack([*predicted, truth])) if energy else [None] * (len(predicted) + 1)
        images = decoded(space, torch.stack(predicted))
        first = max(1, length // 2)
        onwards = continue_clip(model, states[:first], length + 1 - first, source, sample_id)
        shown = decoded(space, onwards)
        results.append({
            **split.about(sample_id), "context": pictures(frames, length), "truth": pictures(frames, length + 1)[length],
            "candidates": [{"step": step + (not energy), "image": image, "loss": smooth_l1(state, truth), "energy": value}
                           for step, (state, image, value) in enumerate(zip(predicted, pictures(images, len(predicted)), values))],
            "copy_last_loss": smooth_l1(observed[-1], truth), "truth_energy": values[-1], "first": first,
            "continuation": pictures(shown, len(onwards)), "continuation_truth": pictures(frames, length + 1)[first:],
            "continuation_loss": [smooth_l1(a, b) for a, b in zip(onwards, states[first:])],
            "continuation_copy_loss": [smooth_l1(states[first - 1], b) for b in states[first:]]})
    model.train(was_training)
    return results


def decoded(space: FrameSpace, states: Tensor) -> np.ndarray | None:
    """States (n, dimension) as frames (n, height, width, 3)."""
    frames = space.frames(states[None])
    return None if frames is None else frames[0].cpu().numpy()


def pictures(frames: np.ndarray | None, count: int) -> list[str | None]:
    """The first `count` frames as data URIs."""
    if frames is None:
        return [None] * count
    return ["data:image/jpeg;base64," + base64.b64encode(encode_image(np.ascontiguousarray(frame), "jpeg", 88)).decode() for frame in frames[:count]]


def smooth_l1(prediction: Tensor, truth: Tensor) -> float:
    return float(F.smooth_l1_loss(prediction.float(), truth.float(), beta=1.0))
