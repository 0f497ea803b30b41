"""What a sample is: the fields of a WebDataset sample -> a sequence of block_length states, checked.

    text                tokens.npy                          -> unsigned integers (block_length,)
    video, embedding    frames.npy                          -> float16 or float32 (block_length, dimension), as the encoder gave them
    video, jpeg, webp   000.jpg, 001.jpg, ... or .webp      -> uint8 (block_length, height, width, 3)

Video samples carry a clip.json beside them: which video, and where in it. How raw frames become the standardised embeddings that a model
sees is the business of ebwm_scale/encoders/.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from ..errors import DataError

STORED = ("embedding", "jpeg", "webp")
CLIP_FIELD = "clip.json"
_SUFFIX = {"jpeg": "jpg", "webp": "webp"}
_IMAGE_FORMATS = ("JPEG", "WEBP", "PNG")
MAX_IMAGE_PIXELS = 2**24  # of an image whose size is not known beforehand: 48 MiB decoded
_NPY_HEADER_BYTES = 128  # numpy pads the header of a small array to this


@dataclass(frozen=True)
class TextContent:
    vocabulary_size: int
    eos_id: int
    tokenizer_path: Path
    tokenizer_sha256: str

    modality, unit, size_name = "text", "tokens", "vocabulary_size"

    @property
    def size(self) -> int:
        return self.vocabulary_size

    @property
    def identity(self) -> dict[str, Any]:
        """What two datasets must share to be mixed."""
        return {
            "modality": "text",
            "tokenizer": self.tokenizer_sha256,
            "vocabulary_size": self.vocabulary_size,
        }

    def files(self) -> dict[Path, str]:
        """Files beside the shards, with their sha256."""
        return {self.tokenizer_path: self.tokenizer_sha256}

    def fields(self, block_length: int) -> tuple[str, ...]:
        return ("tokens.npy",)

    def decode(self, fields: Mapping[str, bytes], block_length: int) -> np.ndarray:
        """The sequence of a sample; ValueError says what it is instead."""
        tokens = _npy(fields["tokens.npy"])
        if tokens.shape != (block_length,) or tokens.dtype.kind != "u":
            raise ValueError(
                f"holds {tokens.dtype} {tokens.shape}: expected unsigned integers ({block_length},)"
            )
        return tokens

    def problem(self, sequences: np.ndarray) -> str | None:
        """What is wrong with the values of decoded sequences, one or a batch."""
        highest = int(sequences.max())
        return (
            None
            if highest < self.vocabulary_size
            else f"holds token {highest}: must be below the vocabulary size {self.vocabulary_size}"
        )


@dataclass(frozen=True, eq=False)
class VideoContent:
    stored: str  # of STORED
    height: int  # of a frame in pixels, as the encoder sees it
    width: int
    interval_s: float  # between frames
    dimension: int  # of an embedding
    encoder_name: str
    encoder_settings: dict[str, Any]
    encoder_path: Path | None  # of fitted parameters, inside the dataset folder
    encoder_sha256: str | None
    mean: np.ndarray  # (dimension,) float32 statistics of the training embeddings, per component
    std: np.ndarray

    modality, unit, size_name = "video", "frames", "dimension"

    @property
    def size(self) -> int:
        return self.dimension

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "modality": "video",
            "encoder": self.encoder_name,
            "settings": self.encoder_settings,
            "parameters": self.encoder_sha256,
            "interval_s": self.interval_s,
            "frames": [self.height, self.width],
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    def files(self) -> dict[Path, str]:
        return {} if self.encoder_path is None else {self.encoder_path: self.encoder_sha256}

    def fields(self, block_length: int) -> tuple[str, ...]:
        return field_names(self.stored, block_length)

    def decode(self, fields: Mapping[str, bytes], block_length: int) -> np.ndarray:
        if self.stored != "embedding":
            size = self.height, self.width
            return np.stack(
                [decode_image(fields[name], size) for name in self.fields(block_length)[:-1]]
            )
        frames = _npy(fields["frames.npy"])
        if frames.shape != (block_length, self.dimension) or frames.dtype.kind != "f":
            raise ValueError(
                f"holds {frames.dtype} {frames.shape}: expected floats {(block_length, self.dimension)}"
            )
        return frames

    def problem(self, sequences: np.ndarray) -> str | None:
        """What is wrong with the values of decoded sequences, one or a batch."""
        finite = sequences.dtype == np.uint8 or np.isfinite(sequences).all()
        return None if finite else "holds numbers that are not finite"


def field_names(stored: str, block_length: int) -> tuple[str, ...]:
    """The fields of a video sample, clip.json last."""
    frames = (
        ("frames.npy",)
        if stored == "embedding"
        else tuple(f"{i:03d}.{_SUFFIX[stored]}" for i in range(block_length))
    )
    return (*frames, CLIP_FIELD)


def decode_image(content: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """A jpeg, webp or png as uint8 (height, width, 3).

    size: the (height, width) that it must have; without, at most MAX_IMAGE_PIXELS. Nothing is decoded
    before that is known. Raises ValueError for anything else, and for an image that is cut off.
    """
    image = _pillow()
    try:
        # Only these: the plug-in for EPS would start another program, others read much and fail late.
        with image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as file:
            width, height = file.size
            if size is not None and (height, width) != size:
                raise ValueError(f"is {height} x {width}: expected {size[0]} x {size[1]}")
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(f"is {height} x {width}: more than {MAX_IMAGE_PIXELS:,} pixels")
            return np.asarray(file.convert("RGB"))
    except image.UnidentifiedImageError:
        raise ValueError("no readable image (not a jpeg, webp or png that can be opened)") from None
    except Exception as error:  # on damaged bytes Pillow's plug-ins raise whatever comes up
        what = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"no readable image ({what[:120]})") from None


def encode_image(frame: np.ndarray, stored: str, quality: int) -> bytes:
    """uint8 (height, width, 3) as jpeg, webp or png bytes."""
    stream = io.BytesIO()
    _pillow().fromarray(frame).save(stream, stored.upper(), quality=quality)
    return stream.getvalue()


def _pillow():
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            'reading and writing frames needs the package pillow; install it with: python -m pip install "ebwm_scale[video]"'
        ) from None
    return Image


def _npy(content: bytes) -> np.ndarray:
    try:
        dtype, shape, start, count = _npy_header(content[:_NPY_HEADER_BYTES])
        array = np.frombuffer(content, dtype, count, start)
        return array if len(shape) == 1 else array.reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"not a .npy array ({' '.join(str(error).split())})") from None


@functools.lru_cache(maxsize=16)
def _npy_header(content: bytes) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, where the data starts, how many numbers) of a .npy file; cached, because parsing it took most of the time of a read."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not version 1.0 of the format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order or dtype.hasobject:
        raise ValueError("objects or Fortran order")
    return dtype, shape, stream.tell(), math.prod(shape)
