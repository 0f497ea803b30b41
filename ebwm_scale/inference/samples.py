"""Samples a person looks at while a model trains: continuations of text, or clips."""

from __future__ import annotations

from typing import Any

from ebwm_scale.config import resolved
from ebwm_scale.world_model import WorldModel


def samples_to_look_at(model: WorldModel, split, *, seed: int) -> dict[str, Any]:
    """What samples.json holds beside the step: {"continuations": [...]} of text, {"clips": [...]}
    of video; no continuations of tasks in groups.
    """
    from ebwm_scale.data.loading.mixture import MixedSplit

    split = split.parts[0] if isinstance(split, MixedSplit) else split
    if split.manifest.modality == "video":
        from ebwm_scale.inference.samples_video import sample_clips

        return {"clips": sample_clips(model, split, seed=seed)}
    if resolved.group_size(model.config) > 1:
        return {"continuations": []}  # an answer on a grid is no text to read on
    from ebwm_scale.inference.samples_text import sample_continuations

    return {"continuations": sample_continuations(model, split, seed=seed)}
