"""safetensors files, one tensor in memory at a time: read without mapping the file, written as tensors come.

The library reads and writes whole dictionaries, or maps the file, whose pages then count as memory; a model larger than memory is converted with these. The format
(https://github.com/huggingface/safetensors): 8 bytes, the header's length, little-endian; the header, JSON; the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Iterable, Mapping

import torch
from torch import Tensor

from .errors import CheckpointError

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
MAX_HEADER = 100 * 2**20


class TensorFile:
    """The tensors of a file, read when asked for. Raises CheckpointError naming a file that is missing, truncated or no safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                    raise ValueError(f"its header says {length} bytes, the file has {size}")
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {
                name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: no safetensors file ({error}); it is damaged, or of another kind"
            ) from None
        self._start = 8 + length
        end = max((stop for *_, stop in self._entries.values()), default=0)
        if self._start + end != size:
            raise CheckpointError(
                f"{path}: has {size} bytes, its header describes {self._start + end}: truncated or damaged"
            )
        for name, (dtype, shape, first, stop) in self._entries.items():
            if stop - first != prod(shape) * dtype.itemsize or first < 0:
                raise CheckpointError(
                    f"{path}: {name} of shape {list(shape)} lies in {stop - first} bytes: damaged"
                )

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][0]

    def read(self, name: str) -> Tensor:
        dtype, shape, first, stop = self._entries[name]
        tensor = torch.empty(prod(shape), dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(self._start + first)
            got = file.readinto(memoryview(tensor.view(torch.uint8).numpy())) if stop > first else 0
        if got != stop - first:
            raise CheckpointError(f"{self.path}: ends inside {name}: truncated")
        return tensor.view(shape)


class TensorWriter:
    """Write the announced tensors in their order: with TensorWriter(path, {name: (dtype, shape)}) as file: file.write(name, tensor).

    The file appears under its name when it is complete and on disk; on an error nothing is left.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
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

    def __enter__(self) -> "TensorWriter":
        self.file = open(self.partial, "wb")
        self.file.write(len(self.header).to_bytes(8, "little") + self.header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self.expected[name]
        if self.waiting[:1] != [name] or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} {tensor.dtype} {tuple(tensor.shape)}: expected {self.waiting[:1]} {dtype} {shape}"
            )
        self.waiting.pop(0)
        self.file.write(
            memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        )

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                if self.waiting:
                    raise ValueError(
                        f"{self.path}: {', '.join(self.waiting)} were announced and not written"
                    )
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.partial, self.path)
        finally:
            self.file.close()
            self.partial.unlink(missing_ok=True)
