"""What a sample is: the fields of a WebDataset sample -> a sequence of block_length states,
checked.

    text                tokens.npy                      -> unsigned integers (block_length,); with a
                                                           mask of what is scored int64, marked
                                                           (data/format/scored.py)
    video, embedding    frames.npy                      -> float16 or float32, as the encoder gave
                                                           them: (block_length, dimension)
    video, jpeg, webp   000.jpg, 001.jpg, ... or .webp  -> uint8 (frames, height, width, 3)

A block is a sequence of groups of group_size states. For text that is 1, and the cells of a grid
for tasks on grids; for video it is 1 where a frame is one vector, and the patches of a frame, row
by row, where it is a grid of them. Each group after the first is predicted from those before it. A
clip has block_length / group_size frames.

Video samples carry a clip.json beside them: which video, and where in it. Clips of worlds also
carry conditions and outcomes (data/format/conditions.py). How raw frames become the standardised
embeddings that a model sees is the business of ebwm_scale/data/encoders/.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.format.conditions import (
    Condition,
    check_outcome,
    check_values,
    shorter,
)
from ebwm_scale.data.format.scored import mark_padding, mark_unscored, plain_tokens

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
class Sample:
    """One sample as stored.

    states: as content.decode gives them. conditions: per name, (frames - 1, width); none of text,
    nor of a video dataset without.
    """

    states: np.ndarray
    conditions: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class TextContent:
    """group_size: tokens that are predicted together; grid: their (rows, columns), if they are one.

    members: of MEMBERS, what each sample has beside its tokens. is_padded: two ends of sequence in
    a row are padding (prepare/best_fit.py). mask_documents: what a run does by default.
    """

    vocabulary_size: int
    eos_id: int
    tokenizer_path: Path
    tokenizer_sha256: str
    group_size: int = 1
    grid: tuple[int, int] | None = None
    members: tuple[str, ...] = ()
    is_padded: bool = False
    mask_documents: bool = False

    modality = "text"
    unit = "tokens"
    size_name = "vocabulary_size"
    conditions: ClassVar[tuple[Condition, ...]] = ()
    outcomes: ClassVar[tuple[str, ...]] = ()

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
            "packing": self.is_padded,
        }

    @property
    def is_marked(self) -> bool:
        """Whether samples say of their targets which ones are scored."""
        return self.is_padded or "scored" in self.members

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
        if self.is_padded:
            return mark_padding(tokens, self.eos_id)
        if "scored" not in self.members:
            return tokens
        shape = (block_length - self.group_size,)
        return mark_unscored(tokens, _npy(fields["scored.npy"], ("|u1",), shape, "uint8"))

    def decode_conditions(
        self, fields: Mapping[str, bytes], block_length: int
    ) -> dict[str, np.ndarray]:
        """None: text is conditioned on nothing but what is before it."""
        return {}

    def decode_outcomes(
        self, fields: Mapping[str, bytes], block_length: int
    ) -> dict[str, np.ndarray]:
        """None: text has no steps of a world."""
        return {}

    def first(self, sample: Sample, length: int) -> Sample:
        """The first `length` tokens."""
        return Sample(sample.states[:length])

    def problem(self, sequences: np.ndarray) -> str | None:
        """What is wrong with the values of decoded sequences, one or a batch."""
        highest = int(plain_tokens(sequences).max())
        if highest < self.vocabulary_size:
            return None
        return f"holds token {highest}: must be below the vocabulary size {self.vocabulary_size}"


@dataclass(frozen=True, eq=False)
class VideoContent:
    """group_size: patches of a frame, grid: their (rows, columns); 1 and None where a frame is one
    vector.

    conditions: what each step is conditioned on. outcomes: of OUTCOMES, what else a step has.
    """

    stored: str  # of STORED
    height: int  # of a frame in pixels, as the encoder sees it
    width: int
    interval_s: float  # between frames
    dimension: int  # of the embedding of a frame, or of a patch where frames are grids of them
    encoder_name: str
    encoder_settings: dict[str, Any]
    encoder_path: Path | None  # of fitted parameters, inside the dataset folder
    encoder_sha256: str | None
    mean: np.ndarray  # (dimension,) float32 statistics of the training embeddings, per component
    std: np.ndarray
    group_size: int = 1
    grid: tuple[int, int] | None = None
    conditions: tuple[Condition, ...] = ()
    outcomes: tuple[str, ...] = ()

    modality = "video"
    size_name = "dimension"
    members = ()
    is_marked = False

    @property
    def unit(self) -> str:
        """What a state is."""
        return "frames" if self.grid is None else "patches"

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
            "group_size": self.group_size,
            "grid": self.grid,
            "conditions": [condition.describe() for condition in self.conditions],
            "outcomes": self.outcomes,
        }

    def files(self) -> dict[Path, str]:
        if self.encoder_path is None or self.encoder_sha256 is None:
            return {}
        return {self.encoder_path: self.encoder_sha256}

    def fields(self, block_length: int) -> tuple[str, ...]:
        *frames, about = field_names(self.stored, block_length // self.group_size)
        beside = (*(c.field for c in self.conditions), *(f"{o}.npy" for o in self.outcomes))
        return (*frames, *beside, about)

    def decode(self, fields: Mapping[str, bytes], block_length: int) -> np.ndarray:
        if self.stored != "embedding":
            *names, _ = field_names(self.stored, block_length // self.group_size)
            size = self.height, self.width
            return np.stack([decode_image(fields[name], size) for name in names])
        return _npy(fields["frames.npy"], _EMBEDDINGS, (block_length, self.dimension), "floats")

    def decode_conditions(
        self, fields: Mapping[str, bytes], block_length: int
    ) -> dict[str, np.ndarray]:
        """The conditions of a sample by name, each (frames - 1, width): float32, or uint32 where
        discrete.

        ValueError says what is wrong with one, or with an outcome.
        """
        num_steps = block_length // self.group_size - 1
        self.decode_outcomes(fields, block_length)
        decoded = {}
        for condition in self.conditions:
            shape, what = (num_steps, condition.width), f"{condition.name}: {condition.kind}"
            values = _npy(fields[condition.field], (condition.dtype,), shape, what)
            decoded[condition.name] = check_values(condition, values)
        return decoded

    def decode_outcomes(
        self, fields: Mapping[str, bytes], block_length: int
    ) -> dict[str, np.ndarray]:
        """The outcomes of a sample's steps by name, each (frames - 1,); ValueError as above."""
        shape = (block_length // self.group_size - 1,)
        dtypes = {"reward": "<f4", "terminated": "|u1"}
        return {
            name: check_outcome(
                name, _npy(fields[f"{name}.npy"], (dtypes[name],), shape, f"of {name}")
            )
            for name in self.outcomes
        }

    def first(self, sample: Sample, length: int) -> Sample:
        """The frames that the first `length` states belong to, and the steps between them."""
        num_frames = length // self.group_size
        rows = length if self.stored == "embedding" else num_frames
        return Sample(sample.states[:rows], shorter(sample.conditions, num_frames - 1))

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
    return _guarded(content.decode, fields, block_length)


def decode_conditions(
    content: TextContent | VideoContent, fields: Mapping[str, bytes], block_length: int
) -> dict[str, np.ndarray]:
    """content.decode_conditions for such bytes, in the same way."""
    return _guarded(content.decode_conditions, fields, block_length)


def decode_outcomes(
    content: TextContent | VideoContent, fields: Mapping[str, bytes], block_length: int
) -> dict[str, np.ndarray]:
    """content.decode_outcomes for such bytes, in the same way."""
    return _guarded(content.decode_outcomes, fields, block_length)


def _guarded(
    decode: Callable[[Mapping[str, bytes], int], Any], fields: Mapping[str, bytes], length: int
) -> Any:
    try:
        return decode(fields, length)
    except DataError:  # a package is missing, which is no fault of the sample
        raise
    except Exception as error:  # noqa: BLE001 (bytes from outside make numpy raise whatever it does)
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(shorten(reason, 1000)) from None


def difficulty_of(fields: Mapping[str, bytes]) -> int:
    """How hard a sample is, of its fields; ValueError for a member that is no number."""
    return int(_npy(fields["difficulty.npy"], ("<u4",), (1,), "a uint32")[0])


def field_names(stored: str, num_frames: int) -> tuple[str, ...]:
    """The frames of a video sample, and clip.json last."""
    if stored == "embedding":
        return ("frames.npy", CLIP_FIELD)
    return (*(f"{i:03d}.{_SUFFIX[stored]}" for i in range(num_frames)), CLIP_FIELD)


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
