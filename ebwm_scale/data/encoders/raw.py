"""The encoder that does nothing: the pixels of each patch, from 0 to 1.

Back to a frame without loss where embeddings are float32 or float16: a step of a pixel is 1 / 255,
that of float16 below 1 is at most 1 / 2048. For small frames: an embedding is as large as its
patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebwm_scale.data.encoders.pca import check_patches, from_patches, to_patches


class RawEncoder:
    name = "raw"

    def __init__(self, settings: dict[str, Any], *, height: int, width: int, patches: bool = False):
        self.patch = settings.get("patch", 8)
        self.settings = {"patch": self.patch}
        self.height = height
        self.width = width
        self._size = self.patch * self.patch * 3
        check_patches(self.patch, 1, height, width, name=self.name)
        self._places = (height // self.patch, width // self.patch)
        self.grid = self._places if patches else None
        self.dimension = self._size if patches else height * width * 3

    def encode(self, frames: Tensor) -> Tensor:
        patches = to_patches(frames, self.patch)
        return patches.flatten(1) if self.grid is None else patches

    def decode(self, embeddings: Tensor) -> Tensor:
        patches = embeddings.reshape(len(embeddings), -1, self._size)
        return from_patches(patches, self.patch, self._places)

    def groups(self) -> Tensor:
        """Each pixel of a patch, and each of its colours, is a kind of its own."""
        return torch.arange(self._size).repeat(self.dimension // self._size)

    def parameters(self) -> dict[str, Tensor]:
        return {}
