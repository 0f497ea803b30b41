"""safetensors files, one tensor in memory at a time: read without mapping the file, written as
tensors come.

The library reads and writes whole dictionaries, or maps the file, whose pages then count as memory;
a model larger than memory is converted with these. The format
(https://github.com/huggingface/safetensors): 8 bytes, the header's length, little-endian; the
header, JSON; the tensors' bytes one after the other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.strict_json import is_whole, parse

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 * 2**20  # a hundred thousand tensors
MAX_DIMENSIONS = 64  # torch's own limit


class TensorFile:
    """The tensors of a file, read when asked for.

    Raises CheckpointError naming a file that is missing, truncated or no safetensors file: every
    tensor must lie in the bytes that its type and shape need, and together they must fill the file
    without gap or overlap.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                    raise ValueError(
                        f"its header says {length} bytes, the file has {size}; at most {MAX_HEADER}"
                    )
                header = parse(file.read(length))
            if not isinstance(header, dict):
                raise ValueError(f"its header is {shown(header)}")
            self.metadata: dict[str, str] = _metadata(header.pop("__metadata__", {}))
            self._entries = {name: _entry(name, entry) for name, entry in header.items()}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise CheckpointError(
                f"{path}: no safetensors file ({error}); it is damaged, or of another kind"
            ) from None
        self._start = 8 + length
        end = 0
        spans = sorted((first, stop, name) for name, (*_, first, stop) in self._entries.items())
        for first, stop, name in spans:
            if first != end:
                what = "overlaps the one before it" if first < end else "follows a gap"
                raise CheckpointError(
                    f"{path}: {shown(name)} begins at byte {first} and {what}, which ends at "
                    f"{end}: damaged"
                )
            end = stop
        if self._start + end != size:
            raise CheckpointError(
                f"{path}: has {size} bytes, its header describes {self._start + end}: truncated "
                "or damaged"
            )

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][0]

    def read(self, name: str) -> Tensor:
        dtype, shape, first, stop = self._entries[name]
        tensor, got = torch.empty(prod(shape), dtype=dtype), 0
        try:
            with open(self.path, "rb") as file:
                file.seek(self._start + first)
                if stop > first:
                    got = file.readinto(tensor.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read: {error.strerror or error}"
            ) from None
        if got != stop - first:
            raise CheckpointError(f"{self.path}: ends inside {name}: truncated")
        return tensor.view(shape)


def _metadata(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"its metadata are {shown(values)}: expected texts by name")
    return values


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, end) of a header entry; ValueError for what the format does not
    allow.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} is {shown(entry)}")
    kind = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{shown(name)} has dtype {shown(kind)}: known are {', '.join(DTYPES)}")
    sizes_are_whole = isinstance(shape, list) and all(is_whole(n) and n >= 0 for n in shape)
    if not sizes_are_whole or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_whole, offsets)):
        raise ValueError(f"{shown(name)} lies at {shown(offsets)}: expected two whole numbers")
    first, stop = offsets
    if first < 0 or stop - first != prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{shown(name)} of shape {shown(shape)} lies in {stop - first} bytes")
    return DTYPES[kind], tuple(shape), first, stop


class TensorWriter:
    """Write the announced tensors in their order: with TensorWriter(path, {name: (dtype, shape)})
    as file: file.write(name, tensor).

    The file appears under its name when it is complete and on disk; on an error nothing is left.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = path
        self.expected = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
        header: dict = {"__metadata__": dict(metadata or {"format": "pt"})}
        offset = 0
        for name, (dtype, shape) in self.expected.items():
            size = prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        self.header = text + b" " * (-len(text) % 8)
        self.waiting = list(self.expected)

    def __enter__(self) -> TensorWriter:
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacement(self.path))
            self.file = stack.enter_context(open(temporary, "wb"))
            self.file.write(len(self.header).to_bytes(8, "little") + self.header)
            self._open = stack.pop_all()
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self.expected[name]
        if self.waiting[:1] != [name] or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} {tensor.dtype} {tuple(tensor.shape)}: expected {self.waiting[:1]} "
                f"{dtype} {shape}"
            )
        self.waiting.pop(0)
        flat = tensor.detach().cpu().contiguous().view(-1)
        self.file.write(flat.view(torch.uint8).numpy().data)

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._open.__exit__(kind, error, trace)
            return
        with self._open:
            if self.waiting:
                raise ValueError(
                    f"{self.path}: {', '.join(self.waiting)} were announced and not written"
                )
