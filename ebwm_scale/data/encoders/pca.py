"""The encoder that needs no download: principal components of image patches, whitened, fitted on
the training frames.

    frame (height, width, 3) in [0, 1]  ->  patches of P x P x 3 numbers
    c = (patch - mean) @ basis / scale
    embedding = the C components of every patch, patch after patch; as patches, each on its own

Components are ordered by variance, and each has variance 1 over the training patches. Back to a
frame: mean + (c * scale) @ basis^T, which is the best linear reconstruction from C numbers per
patch.

Directions in which the training patches do not vary, beyond the rounding to bytes, are zero for
every patch: divided by their scale, what was never seen before would be thousands of times as large
as all that was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.core.errors import DataError

ROUNDING = (1 / 255) ** 2 / 12  # variance that rounding to bytes gives a direction


class PcaEncoder:
    name = "pca"

    def __init__(
        self,
        settings: dict[str, Any],
        parameters: dict[str, Tensor],
        *,
        height: int,
        width: int,
        device: torch.device | str = "cpu",
        patches: bool = False,
    ):
        self.settings = settings
        self.height = height
        self.width = width
        self.patch, self.components = settings["patch"], settings["components"]
        check_patches(self.patch, self.components, height, width)
        self.mean, self.basis, self.scale = (
            parameters[key].to(device, torch.float32) for key in ("mean", "basis", "scale")
        )
        self._places = (height // self.patch, width // self.patch)
        self.grid = self._places if patches else None
        self.dimension = self.components
        if not patches:
            self.dimension *= self._places[0] * self._places[1]

    def encode(self, frames: Tensor) -> Tensor:
        patches = to_patches(frames, self.patch).to(self.mean.device)
        components = (patches - self.mean) @ self.basis / self.scale
        return components.flatten(1) if self.grid is None else components

    def decode(self, embeddings: Tensor) -> Tensor:
        components = embeddings.to(self.mean.device).reshape(len(embeddings), -1, self.components)
        patches = self.mean + (components * self.scale) @ self.basis.T
        return from_patches(patches, self.patch, self._places)

    def num_varying(self) -> int:
        """How many of the components are not zero for every patch."""
        return int(self.basis.any(0).sum())

    def groups(self) -> Tensor:
        return torch.arange(self.components).repeat(self.dimension // self.components)

    def parameters(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean.cpu(),
            "basis": self.basis.cpu().contiguous(),
            "scale": self.scale.cpu(),
        }


def fit_pca(
    frames: Iterable[Tensor],
    *,
    patch: int,
    components: int,
    height: int,
    width: int,
    patches: bool = False,
) -> tuple[PcaEncoder, float]:
    """(the encoder, its share of the variance) of the frames, uint8 (n, height, width, 3) a batch;
    two float64 sums, any number of frames.
    """
    check_patches(patch, components, height, width)
    size = patch * patch * 3
    count = 0
    total = torch.zeros(size, dtype=torch.float64)
    products = torch.zeros(size, size, dtype=torch.float64)
    for batch in frames:
        rows = to_patches(batch, patch).flatten(0, 1).double()
        count = count + len(rows)
        total = total + rows.sum(0)
        products = products + rows.T @ rows
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    values, vectors = values.flip(0), vectors.flip(1)
    vectors = (
        vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    )  # the sign of a component is free: make it one
    kept, directions = values[:components], vectors[:, :components]
    varies = kept > ROUNDING
    parameters = {
        "mean": mean.float(),
        "basis": (directions * varies).float().contiguous(),
        "scale": torch.where(varies, kept, 1.0).sqrt().float(),
    }
    share = float(values[:components].sum() / values.sum().clamp(min=1e-12))
    return PcaEncoder(
        {"patch": patch, "components": components},
        parameters,
        height=height,
        width=width,
        patches=patches,
    ), share


def to_patches(frames: Tensor, patch: int) -> Tensor:
    """uint8 (n, height, width, 3) -> float32 (n, patches, patch * patch * 3) in [0, 1]."""
    n, height, width, _ = frames.shape
    rows = frames.view(n, height // patch, patch, width // patch, patch, 3).permute(
        0, 1, 3, 2, 4, 5
    )
    return rows.reshape(n, -1, patch * patch * 3).float() / 255


def from_patches(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """float32 (n, patches, patch * patch * 3) in [0, 1] -> uint8 (n, height, width, 3)."""
    rows, columns = grid
    frames = (
        patches.view(-1, rows, columns, patch, patch, 3)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(-1, rows * patch, columns * patch, 3)
    )
    return (frames * 255).round().clamp(0, 255).to(torch.uint8)


def check_patches(
    patch: int, components: int, height: int, width: int, *, name: str = "pca"
) -> None:
    """DataError for patches that do not fill a frame, or have fewer numbers than are asked for."""
    if patch < 1 or height % patch or width % patch:
        raise DataError(
            f"{name} patch is {patch}: must divide the frame's height {height} and width {width}"
        )
    if not 1 <= components <= patch * patch * 3:
        raise DataError(
            f"pca components is {components}: a patch of {patch} x {patch} x 3 has 1 to "
            f"{patch * patch * 3}"
        )
