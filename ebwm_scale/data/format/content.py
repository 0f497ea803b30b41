"""What a sample is: the fields of a WebDataset sample -> a sequence of block_length states,
checked.

    text                tokens.npy                      -> unsigned integers (block_length,); with a
                                                           mask of what is scored int64, marked
                                                           (data/format/scored.py)
    video, embedding    frames.npy                      -> float16 or float32, as the encoder gave
                                                           them: (block_length, dimension)
    video, jpeg, webp   000.jpg, 001.jpg, ... or .webp  -> uint8 (block_length, height, width, 3)

A block of text is a sequence of groups of group_size tokens: 1 for ordinary text, the cells of a
grid for tasks on grids. Each group after the first is predicted from those before it.

Video samples carry a clip.json beside them: which video, and where in it. How raw frames become the
standardised embeddings that a model sees is the business of ebwm_scale/data/encoders/.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.format.scored import mark_unscored, plain_tokens

STORED = ("embedding", "jpeg", "webp")
CLIP_FIELD = "clip.json"
_SUFFIX = {"jpeg": "jpg", "webp": "webp"}
_IMAGE_FORMATS = ("JPEG", "WEBP", "PNG")
MAX_IMAGE_PIXELS = 2**24  # of an image whose size is not known beforehand: 48 MiB decoded
# What numpy writes before a C-ordered array: the header of a sample is compared with this, and
# never evaluated.
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_TEXT = re.compile(
    rb"\{'descr': '([<>|=][a-zA-Z]\d{1,4})', 'fortran_order': False, "
    rb"'shape': \(([0-9, ]{0,60})\), \} *\n"
)
_TOKENS = ("|u1", "<u2", "<u4", "<u8")
_EMBEDDINGS = ("<f2", "<f4", "<f8")


@dataclass(frozen=True)
class TextContent:
    """group_size: tokens that are predicted together; grid: their (rows, columns), if they are one.

    members: of MEMBERS, what each sample has beside its tokens.
    """

    vocabulary_size: int
    eos_id: int
    tokenizer_path: Path
    tokenizer_sha256: str
    group_size: int = 1
    grid: tuple[int, int] | None = None
    members: tuple[str, ...] = ()

    modality = "text"
    unit = "tokens"
    size_name = "vocabulary_size"

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
            "group_size": self.group_size,
            "grid": self.grid,
            "members": self.members,
        }

    def files(self) -> dict[Path, str]:
        """Files beside the shards, with their sha256."""
        return {self.tokenizer_path: self.tokenizer_sha256}

    def fields(self, block_length: int) -> tuple[str, ...]:
        return ("tokens.npy", *(f"{member}.npy" for member in self.members))

    def decode(self, fields: Mapping[str, bytes], block_length: int) -> np.ndarray:
        """The sequence of a sample; ValueError says what it is instead."""
        tokens = _npy(fields["tokens.npy"], _TOKENS, (block_length,), "unsigned integers")
        if "difficulty" in self.members:
            difficulty_of(fields)
        if "scored" not in self.members:
            return tokens
        shape = (block_length - self.group_size,)
        return mark_unscored(tokens, _npy(fields["scored.npy"], ("|u1",), shape, "uint8"))

    def problem(self, sequences: np.ndarray) -> str | None:
        """What is wrong with the values of decoded sequences, one or a batch."""
        highest = int(plain_tokens(sequences).max())
        if highest < self.vocabulary_size:
            return None
        return f"holds token {highest}: must be below the vocabulary size {self.vocabulary_size}"


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

    modality = "video"
    unit = "frames"
    size_name = "dimension"
    group_size = 1
    grid = None
    members = ()

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
        if self.encoder_path is None or self.encoder_sha256 is None:
            return {}
        return {self.encoder_path: self.encoder_sha256}

    def fields(self, block_length: int) -> tuple[str, ...]:
        return field_names(self.stored, block_length)

    def decode(self, fields: Mapping[str, bytes], block_length: int) -> np.ndarray:
        if self.stored != "embedding":
            size = self.height, self.width
            return np.stack(
                [decode_image(fields[name], size) for name in self.fields(block_length)[:-1]]
            )
        return _npy(fields["frames.npy"], _EMBEDDINGS, (block_length, self.dimension), "floats")

    def problem(self, sequences: np.ndarray) -> str | None:
        """What is wrong with the values of decoded sequences, one or a batch."""
        finite = sequences.dtype == np.uint8 or np.isfinite(sequences).all()
        return None if finite else "holds numbers that are not finite"


def decode_sample(
    content: TextContent | VideoContent, fields: Mapping[str, bytes], block_length: int
) -> np.ndarray:
    """content.decode for bytes that nobody has vouched for: whatever goes wrong in it is a
    ValueError of one line.
    """
    try:
        return content.decode(fields, block_length)
    except DataError:  # a package is missing, which is no fault of the sample
        raise
    except Exception as error:  # noqa: BLE001 (bytes from outside make numpy raise whatever it does)
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(shorten(reason, 1000)) from None


def difficulty_of(fields: Mapping[str, bytes]) -> int:
    """How hard a sample is, of its fields; ValueError for a member that is no number."""
    return int(_npy(fields["difficulty.npy"], ("<u4",), (1,), "a uint32")[0])


def field_names(stored: str, block_length: int) -> tuple[str, ...]:
    """The fields of a video sample, clip.json last."""
    if stored == "embedding":
        return ("frames.npy", CLIP_FIELD)
    return (*(f"{i:03d}.{_SUFFIX[stored]}" for i in range(block_length)), CLIP_FIELD)


def decode_image(content: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """A jpeg, webp or png as uint8 (height, width, 3).

    size: the (height, width) that it must have; without, at most MAX_IMAGE_PIXELS. Nothing is
    decoded before that is known. Raises ValueError for anything else, and for an image that is cut
    off.
    """
    image = _pillow()
    try:
        # Only these: the plug-in for EPS would start another program, others read much and fail
        # late.
        with image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as file:
            width, height = file.size
            if size is not None and (height, width) != size:
                raise ValueError(f"is {height} x {width}: expected {size[0]} x {size[1]}")
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(f"is {height} x {width}: more than {MAX_IMAGE_PIXELS:,} pixels")
            return np.asarray(file.convert("RGB"))
    except image.UnidentifiedImageError:
        raise ValueError("no readable image (not a jpeg, webp or png that can be opened)") from None
    except Exception as error:  # noqa: BLE001 (Pillow's plug-ins raise whatever comes up)
        what = str(error) or type(error).__name__
        raise ValueError(f"no readable image ({shorten(what, 120)})") from None


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
            "reading and writing frames needs the package pillow; install it with: python -m pip "
            'install "ebwm_scale[video]"'
        ) from None
    return Image


def _npy(content: bytes, dtypes: tuple[str, ...], shape: tuple[int, ...], kind: str) -> np.ndarray:
    """The array of a .npy file that has one of the dtypes and this shape; ValueError says what it
    is instead.
    """
    header = content[: 10 + int.from_bytes(content[8:10], "little")]
    descr, found, size = _npy_header(header)
    if descr not in dtypes or found != shape:
        raise ValueError(f"holds {_dtype_name(descr)} {found}: expected {kind} {shape}")
    if len(content) != len(header) + size:
        raise ValueError(
            f"not a .npy array ({len(content) - len(header)} bytes of {found}, which takes {size})"
        )
    array = np.frombuffer(content, descr, offset=len(header))
    return array if len(shape) == 1 else array.reshape(shape)


@functools.lru_cache(maxsize=16)
def _npy_header(header: bytes) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, bytes of the numbers) of what stands before the numbers; cached, because all
    samples of a dataset have the same.
    """
    match = _NPY_TEXT.fullmatch(header[10:])
    if header.startswith(_NPY_MAGIC) and match is not None:
        descr, sizes = match[1].decode(), match[2].decode()
        shape = tuple(int(size) for size in sizes.replace(" ", "").split(",") if size)
        # One spelling: a flipped bit can make 017 of a space and 17.
        if repr(shape) == f"({sizes})":
            return descr, shape, math.prod(shape) * int(re.sub(r"\D", "", descr))
    raise ValueError("not a .npy array (no header of one in C order): damaged")


def _dtype_name(descr: str) -> str:
    try:
        return str(np.dtype(descr))
    except TypeError:
        return repr(descr)
