"""Imagined frames in pixels: PSNR and SSIM against the true ones, as scikit-image defines them.

Where an encoder cannot go back to frames, or scikit-image is not installed, what is missing is said
in place of the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.data.encoders.space import FrameSpace
from ebwm_scale.evaluation.clusters import mean_ci
from ebwm_scale.inference.imagination import Window

SMALLEST_SIDE = 7  # of a frame, for the windows of SSIM
HIGHEST = 100.0  # dB that equal frames count for


def measure_pixels(
    windows: Sequence[Window],
    imagined: dict[str, Tensor],
    space: FrameSpace | None,
    num_context: int,
    horizons: Sequence[int],
    episodes: Sequence[str],
) -> dict[str, Any]:
    """{"psnr", "ssim": rows of a horizon and {"mean", "low", "high"} by who imagined}, or
    {"missing": why}.

    imagined: states (n, k, P, dimension) by name, "truth" among them, which is compared with where
    the windows hold no frames.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError:
        return {"missing": "scikit-image is not installed (pip install scikit-image)"}
    assert space is not None, "imagination is of video"
    shown = {}
    for name, states in imagined.items():
        chosen = states[:, [horizon - 1 for horizon in horizons]]
        frames = space.frames(chosen.flatten(1, 2))
        if frames is None:
            return {"missing": "the encoder cannot go back to frames"}
        shown[name] = frames.cpu().numpy()
    truth = shown.pop("truth")
    if windows[0].frames is not None:
        places = [num_context + horizon - 1 for horizon in horizons]
        shown_truth = [window.frames for window in windows if window.frames is not None]
        truth = np.stack([frames[places] for frames in shown_truth])
    if min(truth.shape[2:4]) < SMALLEST_SIDE:
        return {"missing": f"frames have fewer than {SMALLEST_SIDE} pixels a side"}

    def psnr(a: np.ndarray, b: np.ndarray) -> float:
        if np.array_equal(a, b):
            return HIGHEST
        return min(HIGHEST, float(peak_signal_noise_ratio(a, b)))

    def ssim(a: np.ndarray, b: np.ndarray) -> float:
        similarity: Any = structural_similarity(a, b, channel_axis=-1)
        return float(similarity)

    result: dict[str, Any] = {}
    for measure_name, measure in (("psnr", psnr), ("ssim", ssim)):
        rows = []
        for place, horizon in enumerate(horizons):
            row: dict[str, Any] = {"horizon": horizon}
            for name, frames in shown.items():
                pairs = zip(truth[:, place], frames[:, place])
                values = torch.tensor([measure(a, b) for a, b in pairs])
                row[name] = mean_ci(values, episodes)
            rows.append(row)
        result[measure_name] = rows
    return result
