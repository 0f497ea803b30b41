"""manifest.json, the root of a dataset folder: what it holds, for whom it was made, and the hashes of every file in it.

dataset/
  manifest.json                this file; the hash of its canonical JSON is the dataset's fingerprint
  tokenizer.model              text: a copy of the tokenizer.  video: encoder.safetensors, where the encoder was fitted
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

import numpy as np

from ..errors import DataError
from .content import STORED, TextContent, VideoContent

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
_REMAKE = "make the dataset again with tools/make_text_shards.py or tools/make_video_shards.py"

_FACTS = {
    "text": {
        "num_documents": int,
        "num_dropped_tokens": int,
        "num_text_bytes": int,
        "unigram_entropy": float,
    },
    "video": {"num_videos": int},
}


@dataclass(frozen=True)
class ShardInfo:
    """One shard file and its index; paths are relative to the dataset folder, size in bytes, hashes sha256 in hex."""

    path: str
    num_samples: int
    num_targets: int  # tokens or frames to be predicted: block_length - 1 per sample
    size: int
    sha256: str
    index_path: str
    index_sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split. facts: numbers that only its modality has, for text unigram_entropy (nats per token: entropy of the targets under their own
    frequencies), num_documents, num_text_bytes and num_dropped_tokens (after the last full block), for video num_videos."""

    shards: tuple[ShardInfo, ...]
    num_samples: int
    num_targets: int
    facts: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """The checked content of a manifest; `values` is the plain JSON, `fingerprint` its canonical sha256."""

    path: Path
    block_length: int  # states (tokens, frames) per sample = context_length + 1
    content: TextContent | VideoContent
    source: dict[str, Any]
    splits: dict[str, SplitInfo]
    values: dict[str, Any]
    fingerprint: str

    @property
    def modality(self) -> str:
        return self.content.modality

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
        raise DataError(
            f"{path}: cannot read the manifest: {error.strerror or error}; data.manifest names the manifest.json "
            "that tools/make_text_shards.py writes"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path}: not a manifest: not JSON ({' '.join(str(error).split())}); {_REMAKE}"
        ) from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DataError(
            f"{path}: format_version is {version!r}: this release reads {FORMAT_VERSION}; {_REMAKE}"
        )
    take = _Taker(path)
    modality = take(values, "modality", str)
    if modality not in _FACTS:
        raise DataError(
            f"{path}: modality is {modality!r}: this release reads {' and '.join(_FACTS)}"
        )
    splits = {}
    for name, split in take(values, "splits", dict).items():
        if not isinstance(split, dict):
            raise take.wrong(f"splits.{name}", split, "an object")
        splits[name] = _split_info(take, split, name, _FACTS[modality])
    manifest = Manifest(
        path=path,
        block_length=take(values, "block_length", int),
        content=(_text_content if modality == "text" else _video_content)(take, values),
        source=take(values, "source", dict),
        splits=splits,
        values=values,
        fingerprint=hashlib.sha256(canonical_json(values)).hexdigest(),
    )
    if manifest.block_length < 2 or manifest.content.size < 1:
        raise DataError(
            f"{path}: block_length is {manifest.block_length} and {manifest.content.size_name} {manifest.content.size}: "
            f"must be at least 2 and 1; {_REMAKE}"
        )
    return manifest


def _text_content(take: _Taker, values: dict) -> TextContent:
    tokenizer = take(values, "tokenizer", dict)
    return TextContent(
        vocabulary_size=take(values, "vocabulary_size", int),
        eos_id=take(values, "eos_id", int),
        tokenizer_path=take.path.parent / take.relative(tokenizer, "path", "tokenizer."),
        tokenizer_sha256=take(tokenizer, "sha256", str, "tokenizer."),
    )


def _video_content(take: _Taker, values: dict) -> VideoContent:
    frames, statistics, encoder = (
        take(values, key, dict) for key in ("frames", "statistics", "encoder")
    )
    stored = take(frames, "stored", str, "frames.")
    if stored not in STORED:
        raise take.wrong("frames.stored", stored, f"one of {', '.join(STORED)}")
    mean, std = (take(statistics, key, list, "statistics.") for key in ("mean", "std"))
    dimension = take(values, "dimension", int)
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in mean + std)
    if not numbers or len(mean) != dimension or len(std) != dimension or any(v <= 0 for v in std):
        raise take.wrong(
            "statistics",
            f"{len(mean)} and {len(std)} values",
            f"{dimension} numbers for mean and std each, std above 0",
        )
    file, sha256 = None, None
    if "file" in encoder:
        file, sha256 = (
            take.path.parent / take.relative(encoder, "file", "encoder."),
            take(encoder, "sha256", str, "encoder."),
        )
    return VideoContent(
        stored=stored,
        height=take(frames, "height", int, "frames."),
        width=take(frames, "width", int, "frames."),
        interval_s=float(take(frames, "interval_s", float, "frames.")),
        dimension=dimension,
        encoder_name=take(encoder, "name", str, "encoder."),
        encoder_settings=take(encoder, "settings", dict, "encoder."),
        encoder_path=file,
        encoder_sha256=sha256,
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
    )


def canonical_json(values: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(
        values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_hashes(paths: list[Path]) -> list[str | OSError]:
    """file_sha256 of several files, or why one cannot be read.

    In parallel threads: hashing releases the interpreter lock.
    """

    def hash_or_error(path: Path) -> str | OSError:
        try:
            return file_sha256(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_or_error, paths))


def already_there(output: Path, values: dict[str, Any], *, digest: str) -> bool:
    """Whether a dataset folder is complete and made of the same things as `values`; DataError if complete and made of other things.

    digest: the key of `source` that says what it was made of; the other values must be equal where they are given.
    """
    if not (output / MANIFEST_NAME).exists():
        return False
    try:
        manifest = load_manifest(output)
    except DataError:
        return False
    files: dict[str, int | None] = {path.name: None for path in manifest.content.files()}
    for split in manifest.splits.values():
        files.update(
            {shard.path: shard.size for shard in split.shards}
            | {shard.index_path: None for shard in split.shards}
        )
    for name, size in files.items():
        path = output / name
        if not path.is_file() or (size is not None and path.stat().st_size != size):
            return False
    different = [
        key for key in values if key != "source" and manifest.values.get(key) != values[key]
    ]
    if manifest.source.get(digest) != values["source"][digest]:
        different.append(digest.removesuffix("_sha256"))
    if different:
        raise DataError(
            f"{output}: already holds a dataset that differs in {', '.join(different)}; name another folder, or delete this "
            "one first"
        )
    return True


class _Taker:
    """Takes typed values out of the manifest; what is absent or of another type is a DataError that names the field."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, values: dict, key: str, kind: type, prefix: str = "") -> Any:
        value = values.get(key)
        number = kind is float and isinstance(value, int)
        if not (isinstance(value, kind) or number) or isinstance(value, bool):
            raise self.wrong(
                prefix + key,
                value,
                {
                    int: "a whole number",
                    float: "a number",
                    str: "text",
                    dict: "an object",
                    list: "a list",
                }[kind],
            )
        if kind in (int, float) and value < 0:
            raise self.wrong(prefix + key, value, "0 or more")
        return value

    def relative(self, values: dict, key: str, prefix: str) -> str:
        """A path that stays inside the dataset folder."""
        text = self(values, key, str, prefix)
        path = PurePosixPath(text)
        if (
            path.is_absolute()
            or ".." in path.parts
            or not path.parts
            or "\\" in text
            or "\0" in text
        ):
            raise DataError(
                f"{self.path}: {prefix}{key} is {text!r}: refused, a path must be relative and stay inside the dataset "
                f"folder; {_REMAKE}"
            )
        return text

    def wrong(self, field: str, value: Any, expected: str) -> DataError:
        shown = repr(value)
        return DataError(f"{self.path}: {field} is {shown[:80]}: expected {expected}; {_REMAKE}")


def _split_info(take: _Taker, split: dict, name: str, facts: dict[str, type]) -> SplitInfo:
    prefix = f"splits.{name}."
    shards = []
    for number, shard in enumerate(take(split, "shards", list, prefix)):
        here = f"{prefix}shards[{number}]."
        if not isinstance(shard, dict):
            raise take.wrong(here.rstrip("."), shard, "an object")
        shards.append(
            ShardInfo(
                path=take.relative(shard, "path", here),
                num_samples=take(shard, "num_samples", int, here),
                num_targets=take(shard, "num_targets", int, here),
                size=take(shard, "size", int, here),
                sha256=take(shard, "sha256", str, here),
                index_path=take.relative(shard, "index_path", here),
                index_sha256=take(shard, "index_sha256", str, here),
            )
        )
    num_samples = take(split, "num_samples", int, prefix)
    if num_samples != sum(s.num_samples for s in shards) or num_samples == 0:
        raise DataError(
            f"{take.path}: split {name} has {num_samples} samples and its {len(shards)} shards "
            f"{sum(s.num_samples for s in shards)}: must be equal and above 0 (empty split?); {_REMAKE}"
        )
    return SplitInfo(
        shards=tuple(shards),
        num_samples=num_samples,
        num_targets=take(split, "num_targets", int, prefix),
        facts={key: take(split, key, kind, prefix) for key, kind in facts.items()},
    )
