"""Frozen encoders: frames -> embeddings, and back to frames where that exists.

    name          an embedding is                                        weights            frames
    pca           whitened principal components of each patch            fitted, see below  yes
    raw           the pixels of each patch, from 0 to 1                  none               yes
    sd-vae        the latent mean of a Stable Diffusion VAE (diffusers)  a local folder     yes
    transformers  the pooled or class token of a vision backbone         a local folder     no
    timm          the pooled features of a timm model                    a local file       no
    efficientnet  7 x 7 features of EfficientNet-Lite0, averaged over    in its package     no
                  a grid

pca is fitted on the training frames, and its embeddings stand patch after patch. A vision backbone
is, for example, DINOv2.

Asked for patches, an encoder gives a grid of embeddings instead of one, P = rows * columns of them,
row by row: pca and raw those of each patch, sd-vae squares of its latent, backbones their patch
tokens, efficientnet the cells of its grid.

An encoder holds no statistics: those are the dataset's (data/encoders/space.py). Nothing is ever
downloaded here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ebwm_scale.core.errors import DataError


class FrameEncoder(Protocol):
    """name and settings say which encoder it is; height, width: the frames it takes; parameters:
    tensors to be kept with a dataset.

    grid: (rows, columns) where a frame becomes a grid of patches; None where it becomes one vector.
    dimension: of a vector, or of a patch.
    """

    name: str
    settings: dict[str, Any]
    height: int
    width: int
    dimension: int
    grid: tuple[int, int] | None

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (n, height, width, 3) -> float32 (n, dimension), of patches (n, P, dimension), on
        the frames' device.
        """
        ...

    def decode(self, embeddings: Tensor) -> Tensor | None:
        """What encode gives -> uint8 (n, height, width, 3); None where an encoder cannot."""
        ...

    def groups(self) -> Tensor:
        """int64 (dimension,): which numbers of an embedding are of one kind, and are standardised
        alike: a channel at every place.
        """
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Fitted tensors, empty where the weights are someone else's files."""
        ...


ENCODERS = ("pca", "raw", "sd-vae", "transformers", "timm", "efficientnet")


def build_encoder(
    name: str,
    settings: dict[str, Any],
    *,
    height: int,
    width: int,
    parameters: dict[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    patches: bool = False,
) -> FrameEncoder:
    """The encoder of these settings.

    parameters: of a fitted one. patches: whether a frame becomes a grid of them. Raises DataError
    for what does not exist or cannot be loaded.
    """
    if name == "pca":
        from ebwm_scale.data.encoders.pca import PcaEncoder

        if parameters is None:
            raise DataError(
                "the pca encoder has no parameters yet: it is fitted when shards are made"
            )
        return PcaEncoder(
            settings, parameters, height=height, width=width, device=device, patches=patches
        )
    if name == "raw":
        from ebwm_scale.data.encoders.raw import RawEncoder

        return RawEncoder(settings, height=height, width=width, patches=patches)
    if name not in ENCODERS:
        raise DataError(f"encoder {name!r}: unknown; allowed: {', '.join(ENCODERS)}")
    from ebwm_scale.data.encoders.pretrained import build_pretrained

    return build_pretrained(
        name, settings, height=height, width=width, device=device, patches=patches
    )


def load_encoder(content, device: torch.device | str = "cpu") -> FrameEncoder:
    """The encoder of a video dataset (data/format/content.py), its parameters read and checked."""
    parameters = None
    if content.encoder_path is not None:
        parameters = _read(content.encoder_path, content.encoder_sha256)
    encoder = build_encoder(
        content.encoder_name,
        content.encoder_settings,
        height=content.height,
        width=content.width,
        parameters=parameters,
        device=device,
        patches=content.grid is not None,
    )
    if (encoder.dimension, encoder.grid) != (content.dimension, content.grid):
        raise DataError(
            f"encoder {content.encoder_name} gives {_shape(encoder.dimension, encoder.grid)}, the "
            f"dataset was made with {_shape(content.dimension, content.grid)}: other weights or "
            "another version; make the dataset again"
        )
    return encoder


def _shape(dimension: int, grid: tuple[int, int] | None) -> str:
    numbers = f"embeddings of {dimension} numbers"
    return numbers if grid is None else f"{grid[0]} x {grid[1]} {numbers}"


def _read(path: Path, sha256: str | None) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the encoder's parameters: {error.strerror}; copy the dataset "
            "again"
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"{path}: its sha256 is not the manifest's: damaged; copy the dataset again"
        )
    return load(content)
