"""Documents that were tokenised elsewhere: files of token ids, as other projects write them.

    train.bin                     ids and nothing else (nanoGPT), of the type that --tokens names
    train.bin with a header       llm.c: 256 numbers of 32 bits; lit-llama: LITPKDS
    train.bin beside train.idx    Megatron: the index has the type, and where documents begin
    index.json and chunk-*.bin    litgpt (litdata): each chunk begins with where its documents do
    train.npy                     a vector of ids; train.starts.npy beside it: where documents begin

Where nothing says where documents begin, the tokenizer's end of sequence stands between them. With
an index it may stand at their ends. Ids are read front to back, a piece at a time.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.prepare.reading.opening import label, open_source
from ebwm_scale.data.prepare.reading.source import Source

TYPES = ("uint16", "uint32")
_PIECE_BYTES = 2**22
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "|u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LIT = b"LITPKDS"
_LIT_HEADER_BYTES = 24
_LLM_C = {20240520: "<u2", 20240801: "<u4"}
_LLM_C_HEADER_BYTES = 1024
# litdata numbers PyTorch's types in a list of its own.
_LITDATA_TYPES = {11: "|u1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8"}
_LITDATA_TYPES[20] = "<u2"
_NPY = b"\x93NUMPY"


def token_documents(source: Source, default_type: str, eos_id: int) -> Iterator[np.ndarray]:
    """The ids of each document (int64, 1-D, not empty), without ends of sequence.

    default_type: of ids where the file does not say it. Raises DataError for a file that is cut, or
    that has no end of sequence where one is needed.
    """
    with open_source(source) as stream:
        reader = _Ids(stream, source)
        index = _beside(source, ".idx")
        if index is not None:
            documents = _megatron(reader, index, source)
        elif _litdata_index(source) is not None:
            documents = _litdata(reader, source)
        else:
            starts = _beside(source, ".starts.npy")
            _read_header(reader, default_type)
            if starts is None:
                yield from _between_ends(reader, eos_id, source)
                return
            documents = _from_starts(reader, _starts(starts, source))
        for ids in documents:
            # An end of sequence within a document would end it for whoever reads the dataset.
            for piece in np.split(ids, np.flatnonzero(ids == eos_id)):
                kept = piece[piece != eos_id]
                if len(kept):
                    yield kept


class _Ids:
    """A stream of ids; dtype is set once it is known."""

    def __init__(self, stream: BinaryIO, source: Source):
        self.stream, self.source = stream, source
        self.dtype: np.dtype = np.dtype("<u2")
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read."""
        if len(self._ahead) < size:
            self._ahead += self._read(size - len(self._ahead))
        return self._ahead[:size]

    def skip(self, size: int) -> None:
        left = size
        while left:
            taken = len(self.bytes(min(left, _PIECE_BYTES)))
            left -= taken
            if not taken:
                raise self.cut()

    def bytes(self, size: int) -> bytes:
        """As many as there are, up to `size`."""
        ahead, self._ahead = self._ahead[:size], self._ahead[size:]
        return ahead + self._read(size - len(ahead)) if len(ahead) < size else ahead

    def take(self, count: int) -> np.ndarray:
        """Exactly `count` ids."""
        content = self.bytes(count * self.dtype.itemsize)
        if len(content) < count * self.dtype.itemsize:
            raise self.cut()
        return np.frombuffer(content, dtype=self.dtype).astype(np.int64)

    def pieces(self) -> Iterator[np.ndarray]:
        """All ids that are left."""
        while content := self.bytes(_PIECE_BYTES):
            if len(content) % self.dtype.itemsize:
                raise self.cut()
            yield np.frombuffer(content, dtype=self.dtype).astype(np.int64)

    def cut(self) -> DataError:
        return DataError(
            f"{label(self.source)}: ends in the middle of its ids of {self.dtype.itemsize} bytes: "
            "truncated, or of another type; copy it again, or give its type with --tokens"
        )

    def _read(self, size: int) -> bytes:
        pieces, got = [], 0
        while got < size and (piece := self.stream.read(size - got)):
            pieces.append(piece)
            got += len(piece)
        return b"".join(pieces)


def _read_header(reader: _Ids, default_type: str) -> None:
    """Past what stands before the ids, which says their type; else it is the default."""
    head = reader.peek(_LIT_HEADER_BYTES)
    reader.dtype = np.dtype(default_type).newbyteorder("<")
    if head.startswith(_NPY):
        _read_npy_header(reader)
    elif head.startswith(_LIT):
        reader.dtype = _type(_MEGATRON_TYPES, head[len(_LIT) + 8], reader.source)
        reader.skip(_LIT_HEADER_BYTES)
    elif len(head) >= 4 and (magic := struct.unpack("<I", head[:4])[0]) in _LLM_C:
        reader.dtype = np.dtype(_LLM_C[magic])
        reader.skip(_LLM_C_HEADER_BYTES)


def _read_npy_header(reader: _Ids) -> None:
    """The type of a vector of whole numbers."""
    version = reader.bytes(8)[6]
    width = 2 if version == 1 else 4
    size = int.from_bytes(reader.bytes(width), "little")
    header = reader.bytes(size).decode("latin-1") if size < 10_000 else ""
    kind = header.partition("'descr': '")[2].partition("'")[0]
    is_vector = "'fortran_order': False" in header and "'shape': (" in header
    shape = header.partition("'shape': (")[2].partition(")")[0]
    if not is_vector or shape.count(",") != 1 or shape.split(",")[1].strip():
        raise DataError(f"{label(reader.source)}: must be a vector of ids, and has shape ({shape})")
    if kind not in ("|u1", "<u2", "<u4", "<u8", "<i2", "<i4", "<i8"):
        raise DataError(
            f"{label(reader.source)}: holds {shorten(kind or header)}, not whole numbers; save the "
            "ids as uint16 or uint32"
        )
    reader.dtype = np.dtype(kind)


def _between_ends(reader: _Ids, eos_id: int, source: Source) -> Iterator[np.ndarray]:
    """Documents with ends of sequence between them."""
    waiting: list[np.ndarray] = []
    found_any = found_end = False
    for ids in reader.pieces():
        found_any = True
        parts = np.split(ids, np.flatnonzero(ids == eos_id))
        waiting.append(parts[0])
        for part in parts[1:]:  # each begins with the end of the document before it
            found_end = True
            document = np.concatenate(waiting)
            if len(document):
                yield document
            waiting = [part[1:]]
    if found_any and not found_end:
        raise DataError(
            f"{label(source)}: the tokenizer's end of sequence, {eos_id}, is nowhere in it, so its "
            "documents cannot be told apart: give the tokenizer and the type it was made with"
        )
    if waiting and len(rest := np.concatenate(waiting)):
        yield rest


def _from_starts(reader: _Ids, starts: np.ndarray) -> Iterator[np.ndarray]:
    """Documents that begin at the given places; the last one ends with the file."""
    if not len(starts):
        return
    reader.skip(int(starts[0]) * reader.dtype.itemsize)
    for size in np.diff(starts):
        yield reader.take(int(size))
    rest = list(reader.pieces())
    if rest:
        yield np.concatenate(rest)


def _starts(path: Path, source: Source) -> np.ndarray:
    try:
        starts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not an index of documents ({shorten(str(error))})") from None
    rises = starts.ndim == 1 and np.issubdtype(starts.dtype, np.integer)
    if not rises or (np.diff(starts.astype(np.int64)) < 0).any() or (starts < 0).any():
        raise DataError(
            f"{path}: must be a vector of whole numbers that do not fall: where each document of "
            f"{PurePosixPath(source.place).name} begins"
        )
    return starts.astype(np.int64)


def _megatron(reader: _Ids, index: Path, source: Source) -> Iterator[np.ndarray]:
    """Megatron's documents: one or more sequences each, one after the other in the .bin."""
    content = index.read_bytes()
    try:
        if not content.startswith(_MEGATRON):
            raise ValueError("does not begin with its mark")
        at = len(_MEGATRON)
        version, code, num_sequences, num_documents = struct.unpack_from("<QBQQ", content, at)
        if version != 1:
            raise ValueError(f"version {version}, known is 1")
        at += struct.calcsize("<QBQQ")
        sizes = np.frombuffer(content, "<i4", num_sequences, at)
        at += 4 * num_sequences
        pointers = np.frombuffer(content, "<i8", num_sequences, at)
        at += 8 * num_sequences
        documents = np.frombuffer(content, "<i8", num_documents, at)
    except (ValueError, struct.error) as error:
        raise DataError(
            f"{index}: not an index of Megatron ({shorten(str(error))}); copy it again"
        ) from None
    reader.dtype = _type(_MEGATRON_TYPES, code, source)
    places = np.cumsum(sizes, dtype=np.int64) - sizes
    if (pointers != places * reader.dtype.itemsize).any():
        raise DataError(f"{index}: its sequences do not follow each other: not read")
    if num_documents < 2:  # written without: each sequence is a document
        documents = np.arange(num_sequences + 1)
    ends = np.append(places, int(sizes.sum()))
    for first, end in itertools.pairwise(documents):
        yield reader.take(int(ends[end] - ends[first]))


def _litdata_index(source: Source) -> dict[str, Any] | None:
    """index.json beside a chunk, if it lists this one."""
    path = Path(source.place).parent / "index.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = PurePosixPath(source.place).name
        listed = any(chunk["filename"] == name for chunk in values["chunks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values if listed else None


def _litdata(reader: _Ids, source: Source) -> Iterator[np.ndarray]:
    """The items of a chunk: how many, where each begins and the last ends, and their ids."""
    values = _litdata_index(source)
    config = values.get("config", {}) if values else {}
    formats = config.get("data_format") or [""]
    kind, _, number = str(formats[0]).partition(":")
    if len(formats) != 1 or kind != "no_header_tensor" or config.get("compression"):
        raise DataError(
            f"{label(source)}: a chunk of {shorten(str(formats))} (compression "
            f"{config.get('compression')}): only plain tensors of token ids are read"
        )
    reader.dtype = np.dtype("<u4")
    num_items = int(reader.take(1)[0])
    offsets = reader.take(num_items + 1)
    reader.dtype = _type(_LITDATA_TYPES, int(number or -1), source)
    if offsets[0] != 4 * (num_items + 2) or (np.diff(offsets) < 0).any():
        raise DataError(f"{label(source)}: not a chunk of litdata: its offsets are damaged")
    for size in np.diff(offsets):
        yield reader.take(int(size) // reader.dtype.itemsize)


def _type(known: dict[int, str], code: int, source: Source) -> np.dtype:
    if code not in known:
        raise DataError(f"{label(source)}: its ids have the type number {code}, which is not read")
    return np.dtype(known[code])


def _beside(source: Source, suffix: str) -> Path | None:
    """The file of the same name with another suffix."""
    path = Path(source.place)
    name = path.stem if source.compression else path.name
    beside = path.with_name(PurePosixPath(name).stem + suffix)
    return beside if beside.is_file() else None
