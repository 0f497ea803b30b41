"""The encoder of a dataset of clips: fitted to its training frames, with their statistics, and as
its manifest says it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebwm_scale.data.encoders import FrameEncoder, build_encoder, load_encoder
from ebwm_scale.data.encoders.pca import fit_pca
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.walking import Report

ENCODER_FILE = "encoder.safetensors"
BATCH = 512  # frames in memory as pixels
# training frames that an encoder is fitted to, and statistics are taken of, evenly over the videos
MAX_FITTED_FRAMES = 50_000
Frames = Callable[[], Iterator[np.ndarray]]  # uint8 (n, height, width, 3) a batch, anew each call


@dataclass(frozen=True)
class FittedEncoder:
    """mean, std: float32 (dimension,) of the embeddings of the training frames; of patches, over
    all of them.
    """

    encoder: FrameEncoder
    mean: np.ndarray
    std: np.ndarray

    @property
    def num_patches(self) -> int:
        """Of a frame; 1 where it is one vector."""
        grid = self.encoder.grid
        return 1 if grid is None else grid[0] * grid[1]

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 3) -> float16 (n, patches, dimension)."""
        pieces = [
            self.encoder.encode(torch.from_numpy(frames[first : first + BATCH])).cpu()
            for first in range(0, len(frames), BATCH)
        ]
        embeddings = torch.cat(pieces).numpy().astype(np.float16)
        return embeddings.reshape(len(frames), self.num_patches, -1)

    def describe(
        self, folder: Path, *, stored: str, height: int, width: int, interval_s: float
    ) -> dict[str, Any]:
        """The manifest's entries about frames and embeddings; writes the encoder's parameters into
        the folder where it has some.
        """
        encoder = self.encoder
        described: dict[str, Any] = {"name": encoder.name, "settings": encoder.settings}
        parameters = encoder.parameters()
        if parameters:
            from safetensors.torch import save

            content = save(parameters)
            (folder / ENCODER_FILE).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            described |= {"file": ENCODER_FILE, "sha256": sha256}
        values: dict[str, Any] = {
            "dimension": encoder.dimension,
            "encoder": described,
            "frames": {
                "stored": stored,
                "height": height,
                "width": width,
                "interval_s": interval_s,
            },
            "statistics": {
                "mean": [float(f"{v:.7g}") for v in self.mean],
                "std": [float(f"{v:.7g}") for v in self.std],
            },
        }
        if encoder.grid is not None:
            values |= {"group_size": self.num_patches, "grid": list(encoder.grid)}
        return values


def encoder_of(content: VideoContent) -> FittedEncoder:
    """The encoder and the statistics of another dataset."""
    return FittedEncoder(load_encoder(content), content.mean, content.std)


def fit_encoder(
    name: str,
    settings: dict[str, Any],
    frames: Frames,
    *,
    height: int,
    width: int,
    patches: bool,
    report: Report,
) -> FittedEncoder:
    """The encoder of these settings, fitted to the training frames where it is one of that kind."""
    if name == "pca":
        settings = {"patch": 16, "components": 16} | settings
        encoder, share = fit_pca(
            map(torch.from_numpy, frames()),
            **settings,
            height=height,
            width=width,
            patches=patches,
        )
        report(
            f"pca: {settings['components']} components of {settings['patch']} x "
            f"{settings['patch']} patches hold {share:.1%} of the variance of the training frames"
        )
        if encoder.num_varying() < settings["components"]:
            report(
                f"pca: the training frames vary in {encoder.num_varying()} directions only; the "
                "other components are zero: fewer of them hold as much"
            )
    else:
        encoder = build_encoder(name, settings, height=height, width=width, patches=patches)
    return FittedEncoder(encoder, *_statistics(encoder, frames))


def _statistics(encoder: FrameEncoder, frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) of the embeddings, alike for all components of a kind."""
    groups = encoder.groups()
    count = 0
    total = torch.zeros(encoder.dimension, dtype=torch.float64)
    squares = torch.zeros(encoder.dimension, dtype=torch.float64)
    for batch in frames():
        embeddings = encoder.encode(torch.from_numpy(batch)).double().cpu().flatten(0, -2)
        count = count + len(embeddings)
        total = total + embeddings.sum(0)
        squares = squares + embeddings.square().sum(0)
    sizes = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(
        0, groups, torch.ones(len(groups), dtype=torch.float64)
    )
    mean, square = (
        torch.zeros_like(sizes).index_add(0, groups, v) / sizes / count for v in (total, squares)
    )
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)  # a constant component stays what it is
    return mean[groups].float().numpy(), std[groups].float().numpy()
