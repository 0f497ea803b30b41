"""Clips to look at: what a model saw, what it predicted after each refinement step, the truth, and
a continuation of its own.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.config import resolved
from ebwm_scale.data.encoders.space import FrameSpace
from ebwm_scale.data.format.content import encode_image
from ebwm_scale.inference.generation import Session, candidate_energies, continue_states
from ebwm_scale.inference.initial_states import NextPositionSampler
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel


def sample_clips(
    model: WorldModel, split, *, seed: int, num_samples: int = 3
) -> list[dict[str, Any]]:
    """For samples.json: clips of the split, evenly spaced.

    Images are data URIs, or None where the encoder cannot go back to frames.

    Each: video, start_s; context [images], truth, candidates [{"step", "image", "loss" (SmoothL1 to
    the truth), "energy"}] for x_0, x_1, ...; persistence_loss; truth_energy; continuation and
    continuation_truth [images], from half of the context on, and their losses per frame.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    space = FrameSpace(split.manifest.content, device)
    length = resolved.context_length(model.config)
    config = ThinkingConfig(seed=seed)
    energy = model.config.model.kind == "energy"
    results = []
    for sample_id in [
        int((i + 0.5) * len(split) / num_samples) for i in range(min(num_samples, len(split)))
    ]:
        sequence = split.read(sample_id)[: length + 1]
        states = space.states(torch.from_numpy(np.array(sequence))[None])[0]
        frames = sequence if sequence.dtype == np.uint8 else decoded(space, states)
        observed, truth = states[:length], states[length]
        predicted = each_step(model, observed, config, sample_id)
        values = [None] * (len(predicted) + 1)
        if energy:
            values = candidate_energies(
                model,
                observed,
                model.state_space().embed(torch.stack([*predicted, truth])[None]).vectors[0],
            ).tolist()
        images = decoded(space, torch.stack(predicted))
        first = max(1, length // 2)
        onwards = continue_states(
            model,
            [states[:first]],
            length + 1 - first,
            config=config,
            sample_ids=torch.tensor([sample_id]),
        )[0]
        shown = decoded(space, onwards)
        results.append(
            {
                **split.about(sample_id),
                "context": pictures(frames, length),
                "truth": pictures(frames, length + 1)[length],
                "candidates": [
                    {
                        "step": step + (not energy),
                        "image": image,
                        "loss": smooth_l1(state, truth),
                        "energy": value,
                    }
                    for step, (state, image, value) in enumerate(
                        zip(predicted, pictures(images, len(predicted)), values)
                    )
                ],
                "persistence_loss": smooth_l1(observed[-1], truth),
                "truth_energy": values[-1],
                "first": first,
                "continuation": pictures(shown, len(onwards)),
                "continuation_truth": pictures(frames, length + 1)[first:],
                "continuation_loss": [smooth_l1(a, b) for a, b in zip(onwards, states[first:])],
                "continuation_persistence_loss": [
                    smooth_l1(states[first - 1], b) for b in states[first:]
                ],
            }
        )
    model.train(was_training)
    return results


def each_step(
    model: WorldModel, observed: Tensor, config: ThinkingConfig, sample_id: int
) -> list[Tensor]:
    """The prediction of the state after observed (S, dimension), after 0, 1, ...

    N steps: [x_0, ... x_N]; of a baseline, the one it makes.
    """
    ids = torch.tensor([sample_id])
    if model.config.model.kind == "baseline":
        return [Session(model, [observed], config).predict().state[0]]
    start = (
        NextPositionSampler(model, config.seed, ids, torch.tensor([len(observed) - 1]))
        .initial(observed[None, -1:])[0, 0]
        .float()
    )
    return [
        start,
        *(
            Session(model, [observed], replace(config, num_steps=i + 1), sample_ids=ids)
            .predict()
            .state[0]
            .float()
            for i in range(model.config.refinement.num_steps)
        ),
    ]


def decoded(space: FrameSpace, states: Tensor) -> np.ndarray | None:
    """States (n, dimension) as frames (n, height, width, 3)."""
    frames = space.frames(states[None])
    return None if frames is None else frames[0].cpu().numpy()


def pictures(frames: np.ndarray | None, count: int) -> list[str | None]:
    """The first `count` frames as data URIs."""
    if frames is None:
        return [None] * count
    return [
        "data:image/jpeg;base64,"
        + base64.b64encode(encode_image(np.ascontiguousarray(frame), "jpeg", 88)).decode()
        for frame in frames[:count]
    ]


def smooth_l1(prediction: Tensor, truth: Tensor) -> float:
    return float(F.smooth_l1_loss(prediction.float(), truth.float(), beta=1.0))
