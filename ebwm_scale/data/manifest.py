"""manifest.json, the root of a dataset folder: what it holds, for whom it was made, and the hashes of every file in it.

    dataset/
      manifest.json                this file; the hash of its canonical JSON is the dataset's fingerprint
      tokenizer.model              a copy of the tokenizer
      train-000000.tar             plain WebDataset shard
      train-000000.index.json      where each sample of the shard lies, and its checksum
      validation-000000.tar  ...
"""
from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_REMAKE = "make the dataset again with tools/make_text_shards.py"


@dataclass(frozen=True)
class ShardInfo:
    """One shard file and its index; paths are relative to the dataset folder, size in bytes, hashes sha256 in hex."""
    path: str
    num_samples: int
    num_tokens: int             # targets: block_length - 1 per sample
    size: int
    sha256: str
    index_path: str
    index_sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split. Every token of its documents is a target once, except the first and the dropped ones."""
    shards: tuple[ShardInfo, ...]
    num_documents: int
    num_samples: int
    num_tokens: int             # targets in the blocks
    num_dropped_tokens: int     # after the last full block: the packing waste
    num_text_bytes: int         # UTF-8 bytes of the documents
    unigram_entropy: float      # nats per token: entropy of the targets under their own frequencies


@dataclass(frozen=True)
class Manifest:
    """The checked content of a manifest; `values` is the plain JSON, `fingerprint` its canonical sha256."""
    path: Path
    modality: str
    block_length: int           # tokens per sample = context_length + 1
    vocabulary_size: int
    eos_id: int
    tokenizer_path: Path
    tokenizer_sha256: str
    source: dict[str, Any]
    splits: dict[str, SplitInfo]
    values: dict[str, Any]
    fingerprint: str

    @property
    def folder(self) -> Path:
        return self.path.parent


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest (or the manifest of a dataset folder). Raises DataError with one line."""
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot read the manifest: {error.strerror or error}; data.manifest names the manifest.json "
                        "that tools/make_text_shards.py writes") from None
    except ValueError as error:
        raise DataError(f"{path}: not a manifest: not JSON ({' '.join(str(error).split())}); {_REMAKE}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DataError(f"{path}: format_version is {version!r}: this release reads {FORMAT_VERSION}; {_REMAKE}")
    take = _Taker(path)
    modality = take(values, "modality", str)
    if modality != "text":
        raise DataError(f"{path}: modality is {modality!r}: this release reads text")
    tokenizer = take(values, "tokenizer", dict)
    splits = {}
    for name, split in take(values, "splits", dict).items():
        if not isinstance(split, dict):
            raise take.wrong(f"splits.{name}", split, "an object")
        splits[name] = _split_info(take, split, name)
    manifest = Manifest(
        path=path, modality=modality, block_length=take(values, "block_length", int), vocabulary_size=take(values, "vocabulary_size", int),
        eos_id=take(values, "eos_id", int), tokenizer_path=path.parent / take.relative(tokenizer, "path", "tokenizer."),
        tokenizer_sha256=take(tokenizer, "sha256", str, "tokenizer."), source=take(values, "source", dict), splits=splits, values=values,
        fingerprint=hashlib.sha256(canonical_json(values)).hexdigest())
    if manifest.block_length < 2 or manifest.vocabulary_size < 1:
        raise DataError(f"{path}: block_length is {manifest.block_length} and vocabulary_size {manifest.vocabulary_size}: "
                        f"must be at least 2 and 1; {_REMAKE}")
    return manifest


def canonical_json(values: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_hashes(paths: list[Path]) -> list[str]:
    """file_sha256 of several files, in parallel threads (hashing releases the interpreter lock)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_sha256, paths))


class _Taker:
    """Takes typed values out of the manifest; what is absent or of another type is a DataError that names the field."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, values: dict, key: str, kind: type, prefix: str = "") -> Any:
        value = values.get(key)
        number = kind is float and isinstance(value, int)
        if not (isinstance(value, kind) or number) or isinstance(value, bool):
            raise self.wrong(prefix + key, value, {int: "a whole number", float: "a number", str: "text", dict: "an object",
                                                   list: "a list"}[kind])
        if kind in (int, float) and value < 0:
            raise self.wrong(prefix + key, value, "0 or more")
        return value

    def relative(self, values: dict, key: str, prefix: str) -> str:
        """A path that stays inside the dataset folder."""
        text = self(values, key, str, prefix)
        path = PurePosixPath(text)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in text or "\0" in text:
            raise DataError(f"{self.path}: {prefix}{key} is {text!r}: refused, a path must be relative and stay inside the dataset "
                            f"folder; {_REMAKE}")
        return text

    def wrong(self, field: str, value: Any, expected: str) -> DataError:
        shown = repr(value)
        return DataError(f"{self.path}: {field} is {shown[:80]}: expected {expected}; {_REMAKE}")


def _split_info(take: _Taker, split: dict, name: str) -> SplitInfo:
    prefix = f"splits.{name}."
    shards = []
    for number, shard in enumerate(take(split, "shards", list, prefix)):
        here = f"{prefix}shards[{number}]."
        if not isinstance(shard, dict):
            raise take.wrong(here.rstrip("."), shard, "an object")
        shards.append(ShardInfo(
            path=take.relative(shard, "path", here), num_samples=take(shard, "num_samples", int, here),
            num_tokens=take(shard, "num_tokens", int, here), size=take(shard, "size", int, here),
            sha256=take(shard, "sha256", str, here), index_path=take.relative(shard, "index_path", here),
            index_sha256=take(shard, "index_sha256", str, here)))
    counts = {key: take(split, key, int, prefix) for key in ("num_documents", "num_samples", "num_tokens", "num_dropped_tokens",
                                                             "num_text_bytes")}
    if counts["num_samples"] != sum(s.num_samples for s in shards) or counts["num_samples"] == 0:
        raise DataError(f"{take.path}: split {name} has {counts['num_samples']} samples and its {len(shards)} shards "
                        f"{sum(s.num_samples for s in shards)}: must be equal and above 0 (empty split?); {_REMAKE}")
    return SplitInfo(shards=tuple(shards), **counts, unigram_entropy=float(take(split, "unigram_entropy", float, prefix)))
