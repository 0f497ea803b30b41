"""Clips to look at: what a model saw, what it predicted after each refinement step, the truth, and
a continuation of its own, under the true conditions where the data has some.

A frame is P states, 1 or its patches; P is the model's group size.
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
from ebwm_scale.data.loading.batches import stacked, to_tensor, to_tensors
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.generation import Session, candidate_energies, continue_states
from ebwm_scale.inference.initial_states import NextPositionSampler
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.model.conditions import Conditions
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
    size = resolved.group_size(model.config)
    length = resolved.num_groups(model.config)
    observe = Observation(split.manifest, device)
    content = split.manifest.content
    config = ThinkingConfig(seed=seed)
    energy = model.config.model.kind == "energy"
    results = []
    for sample_id in [
        int((i + 0.5) * len(split) / num_samples) for i in range(min(num_samples, len(split)))
    ]:
        sample = content.first(split.read_sample(sample_id), (length + 1) * size)
        sequences, stored = stacked([sample])
        conditions = observe.conditions(to_tensors(stored))
        conditions = {name: values[0] for name, values in conditions.items()}
        states = space.states(to_tensor(sequences))[0]
        frames = sequences[0] if sequences.dtype == np.uint8 else decoded(space, states)
        states = states.unflatten(0, (-1, size))  # (frames, P, dimension)
        observed, truth = states[:length].flatten(0, 1), states[length]
        predicted = each_step(model, observed, config, sample_id, conditions)
        values = [None] * (len(predicted) + 1)
        if energy:
            values = candidate_energies(
                model,
                observed,
                model.state_space().embed(torch.cat([*predicted, truth])[None]).vectors[0],
                conditions,
            ).tolist()
        images = decoded(space, torch.cat(predicted))
        first = max(1, length // 2)
        onwards = continue_states(
            model,
            [states[:first].flatten(0, 1)],
            length + 1 - first,
            config=config,
            sample_ids=torch.tensor([sample_id]),
            conditions=[conditions],
        )[0]
        shown = decoded(space, onwards)
        onwards = onwards.unflatten(0, (-1, size))
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
                "persistence_loss": smooth_l1(states[length - 1], truth),
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
    model: WorldModel,
    observed: Tensor,
    config: ThinkingConfig,
    sample_id: int,
    conditions: Conditions,
) -> list[Tensor]:
    """The prediction (P, dimension) of the frame after observed (T P, dimension), after 0, 1, ...

    N steps: [x_0, ... x_N]; of a baseline, the one it makes. conditions: of the T frames.
    """
    ids = torch.tensor([sample_id])
    size = resolved.group_size(model.config)

    def predicted(config: ThinkingConfig) -> Tensor:
        session = Session(model, [observed], config, sample_ids=ids, conditions=[conditions])
        return session.predict().state.float().reshape(size, -1)

    if model.config.model.kind == "baseline":
        return [predicted(config)]
    position = torch.tensor([len(observed) - size])
    sampler = NextPositionSampler(model, config.seed, ids, position, group_size=size)
    start = sampler.initial(observed[None, -size:])[0].float()
    counts = range(1, model.config.refinement.num_steps + 1)
    return [start, *(predicted(replace(config, num_steps=count)) for count in counts)]


def decoded(space: FrameSpace, states: Tensor) -> np.ndarray | None:
    """States (n P, dimension) as frames (n, height, width, 3)."""
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
