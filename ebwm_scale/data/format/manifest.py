"""manifest.json, the root of a dataset folder: what it holds, for whom it was made, and the hashes
of every file in it.

dataset/
  manifest.json                this file; its canonical JSON's hash is the dataset's fingerprint
  train-000000.shards.json     above 10,000 shards: the list of some of them, as if it stood in the
                               manifest (data/format/shard_table.py)
  tokenizer.model              text: a copy of the tokenizer
  encoder.safetensors          video: the encoder, where it was fitted
  train-000000.tar             plain WebDataset shard
  train-000000.index.json      where each sample of the shard lies, and its checksum
  validation-000000.tar  ...
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import read_small
from ebwm_scale.core.plain_text import shorten, shown
from ebwm_scale.core.strict_json import canonical_json, is_whole, other_version, parse
from ebwm_scale.data.format.conditions import OUTCOMES, read_conditions
from ebwm_scale.data.format.content import STORED, TextContent, VideoContent
from ebwm_scale.data.format.scored import MEMBERS
from ebwm_scale.data.format.shard_table import PartInfo, ShardTable, inside_folder

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
PACKINGS = ("consecutive", "best_fit")  # of text
MAX_MANIFEST_BYTES = 2**30
_REMAKE = "make the dataset again with the tool that did (tools/make_*_shards.py)"

_SMALLEST_STD = float(np.finfo(np.float32).tiny)  # what is below becomes 0 in float32
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
class SplitInfo:
    """One split.

    facts: numbers that only its modality has, for text unigram_entropy (nats per token: entropy of
    the targets under their own frequencies), num_documents, num_text_bytes and num_dropped_tokens
    (after the last full block), for video num_videos.
    """

    shards: ShardTable
    num_samples: int
    num_targets: int
    facts: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """The checked content of a manifest; `values` is its JSON without the lists of shards,
    `fingerprint` the sha256 of its canonical JSON with them, wherever they stand.
    """

    path: Path
    block_length: int  # states (tokens, frames) per sample = context_length + group_size
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

    @property
    def context_length(self) -> int:
        """Observed states per sample, which are as many as its targets."""
        return self.block_length - self.content.group_size

    @property
    def scored_share(self) -> float | None:
        """Share of the targets that are scored, of training where there is any; None where samples
        have no mask.
        """
        if not self.content.is_marked:
            return None
        split = self.splits.get("train") or next(iter(self.splits.values()))
        return split.num_targets / (split.num_samples * self.context_length)


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest (or the manifest of a dataset folder).

    Raises DataError with one line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST_NAME
    try:
        values = parse(read_small(path, MAX_MANIFEST_BYTES))
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the manifest: {error.strerror or error}; data.manifest names the "
            "manifest.json that tools/make_text_shards.py writes"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not a manifest: not JSON ({error}); {_REMAKE}") from None
    problem = other_version(values, "format_version", FORMAT_VERSION)
    if problem is not None:
        raise DataError(f"{path}: {problem}; {_REMAKE}")
    take = _Taker(path)
    modality = take(values, "modality", str)
    if modality not in _FACTS:
        raise DataError(
            f"{path}: modality is {shown(modality)}: this release reads {' and '.join(_FACTS)}"
        )
    block_length = take(values, "block_length", int)
    content = (_text_content if modality == "text" else _video_content)(take, values)
    if block_length < 2 or content.size < 1:
        raise DataError(
            f"{path}: block_length is {block_length} and {content.size_name} {content.size}: "
            f"must be at least 2 and 1; {_REMAKE}"
        )
    if block_length % content.group_size or block_length < 2 * content.group_size:
        raise take.wrong(
            "block_length",
            block_length,
            f"a multiple of group_size {content.group_size}, and at least two groups",
        )
    source = take(values, "source", dict)
    splits, fingerprint = _read_splits(take, values, _FACTS[modality])
    if content.is_marked:
        _check_scored(take, splits, block_length - content.group_size)
    return Manifest(
        path=path,
        block_length=block_length,
        content=content,
        source=source,
        splits=splits,
        values=values,
        fingerprint=fingerprint,
    )


def _read_splits(
    take: _Taker, values: dict, facts: dict[str, type]
) -> tuple[dict[str, SplitInfo], str]:
    """(the splits, the manifest's fingerprint); takes the lists of shards out of `values`.

    The fingerprint is that of the manifest with all lists in it, hashed piece by piece, so that it
    does not depend on where they stand and no second copy of them is made.
    """
    splits, lists = take(values, "splits", dict), {}
    mark = secrets.token_hex(16)  # stands in the canonical JSON where a list of shards does
    for name, split in splits.items():
        if not isinstance(split, dict):
            raise take.wrong(f"splits.{name}", split, "an object")
        prefix = f"splits.{name}."
        if "parts" in split and "shards" in split:
            raise take.wrong(f"{prefix}parts", split["parts"], "either parts or shards")
        lists[name] = (
            "parts" in split,
            take(split, "parts" if "parts" in split else "shards", list, prefix),
        )
        split.pop("parts", None)
        split["shards"] = mark
    try:
        *pieces, last = canonical_json(values).split(b'"' + mark.encode() + b'"')
    except (ValueError, RecursionError) as error:
        raise take.wrong("a value in it", str(error), "JSON of finite numbers and text") from None
    digest, infos = hashlib.sha256(), {}
    for piece, name in zip(pieces, sorted(splits), strict=True):
        digest.update(piece)
        del splits[name]["shards"]
        in_files, entries = lists.pop(name)
        infos[name] = _split_info(take, splits[name], name, entries, in_files, digest.update, facts)
    digest.update(last)
    return {name: infos[name] for name in splits}, digest.hexdigest()


def _text_content(take: _Taker, values: dict) -> TextContent:
    tokenizer = take(values, "tokenizer", dict)
    group_size, grid = _groups(take, values)
    return TextContent(
        vocabulary_size=take(values, "vocabulary_size", int),
        eos_id=take(values, "eos_id", int),
        tokenizer_path=take.path.parent / take.relative(tokenizer, "path", "tokenizer."),
        tokenizer_sha256=take(tokenizer, "sha256", str, "tokenizer."),
        group_size=group_size,
        grid=grid,
        members=_listed(take, values, "members", MEMBERS),
        is_padded=_is_padded(take, values),
        mask_documents=_flag(take, values, "mask_documents"),
    )


def _is_padded(take: _Taker, values: dict) -> bool:
    """Whether blocks hold padding: where they are packed by best fit."""
    packing = values.get("packing", "consecutive")
    if packing not in PACKINGS:
        raise take.wrong("packing", packing, f"one of {', '.join(PACKINGS)}")
    return packing == "best_fit"


def _flag(take: _Taker, values: dict, key: str) -> bool:
    """true or false; false where the manifest does not say."""
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise take.wrong(key, value, "true or false")
    return value


def _groups(take: _Taker, values: dict) -> tuple[int, tuple[int, int] | None]:
    """(group_size, grid): 1 and None where the manifest does not give them."""
    group_size = take(values, "group_size", int) if "group_size" in values else 1
    if group_size < 1:
        raise take.wrong("group_size", group_size, "1 or more")
    grid = None
    if "grid" in values:
        sides = take(values, "grid", list)
        is_grid = len(sides) == 2 and all(is_whole(side) and side > 0 for side in sides)
        if not is_grid or sides[0] * sides[1] != group_size:
            expected = f"[rows, columns] with group_size {group_size} cells"
            raise take.wrong("grid", sides, expected)
        grid = (sides[0], sides[1])
    return group_size, grid


def _listed(take: _Taker, values: dict, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Names of what lies beside the states of a sample: none where the manifest gives none."""
    names = take(values, key, list) if key in values else []
    if names != [name for name in allowed if name in names]:
        expected = f"some of {', '.join(allowed)}, once each and in this order"
        raise take.wrong(key, names, expected)
    return tuple(names)


def _check_scored(take: _Taker, splits: dict[str, SplitInfo], context_length: int) -> None:
    """DataError for a split that scores no target, or more than it has: losses are scaled by it."""
    for name, split in splits.items():
        highest = split.num_samples * context_length
        if not 1 <= split.num_targets <= highest:
            raise take.wrong(f"splits.{name}.num_targets", split.num_targets, f"1 to {highest}")


def _video_content(take: _Taker, values: dict) -> VideoContent:
    frames, statistics, encoder = (
        take(values, key, dict) for key in ("frames", "statistics", "encoder")
    )
    stored = take(frames, "stored", str, "frames.")
    if stored not in STORED:
        raise take.wrong("frames.stored", stored, f"one of {', '.join(STORED)}")
    mean, std = (take(statistics, key, list, "statistics.") for key in ("mean", "std"))
    dimension = take(values, "dimension", int)
    numbers = all(is_whole(v) or type(v) is float for v in mean + std)
    largest = float(np.finfo(np.float32).max)
    in_range = numbers and all(abs(v) <= largest for v in mean + std)
    if not in_range or len(mean) != dimension or len(std) != dimension or min(std) < _SMALLEST_STD:
        raise take.wrong(
            "statistics",
            f"{len(mean)} and {len(std)} values",
            f"{dimension} numbers for mean and std each, std above 0",
        )
    file, sha256 = None, None
    if "file" in encoder:
        file = take.path.parent / take.relative(encoder, "file", "encoder.")
        sha256 = take(encoder, "sha256", str, "encoder.")
    group_size, grid = _groups(take, values)
    if group_size > 1 and grid is None:
        raise take.wrong("grid", None, "[rows, columns] of the patches, with group_size above 1")
    entries = take(values, "conditions", list) if "conditions" in values else []
    try:
        conditions = read_conditions(entries)
    except ValueError as error:
        raise DataError(f"{take.path}: conditions{error}; {_REMAKE}") from None
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
        group_size=group_size,
        grid=grid,
        conditions=conditions,
        outcomes=_listed(take, values, "outcomes", OUTCOMES),
    )


def already_there(output: Path, values: dict[str, Any], *, digest: str) -> bool:
    """Whether a dataset folder is complete and made of the same things as `values`; DataError if
    complete and made of other things.

    digest: the key of `source` that says what it was made of; the other values must be equal where
    they are given.
    """
    if not (output / MANIFEST_NAME).exists():
        return False
    try:
        manifest = load_manifest(output)
    except DataError:
        return False
    files: dict[str, int | None] = {path.name: None for path in manifest.content.files()}
    for split in manifest.splits.values():
        for shard in split.shards:
            files[shard.path], files[shard.index_path] = shard.size, None
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
            f"{output}: already holds a dataset that differs in {', '.join(different)}; name "
            "another folder, or delete this one first"
        )
    return True


class _Taker:
    """Takes typed values out of the manifest; what is absent or of another type is a DataError that
    names the field.
    """

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, values: dict, key: str, kind: type, prefix: str = "") -> Any:
        value: Any = values.get(key)
        number = kind in (int, float) and is_whole(value)
        if kind is float and isinstance(value, float):
            number = True
        if not number and (kind in (int, float) or not isinstance(value, kind)):
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
        if not inside_folder(text):
            raise DataError(
                f"{self.path}: {prefix}{key} is {shown(text)}: refused, a path must be relative "
                f"and stay inside the dataset folder; {_REMAKE}"
            )
        return text

    def wrong(self, field: str, value: Any, expected: str) -> DataError:
        return DataError(
            f"{self.path}: {shorten(field)} is {shown(value)}: expected {expected}; {_REMAKE}"
        )


def _split_info(
    take: _Taker,
    split: dict,
    name: str,
    entries: list,
    in_files: bool,
    feed: Callable[[bytes], None],
    facts: dict[str, type],
) -> SplitInfo:
    """entries: of its shards, or of the files that list them.

    feed: is given the canonical JSON of the list of shards.
    """
    prefix = f"splits.{name}."
    if in_files:
        files = [_part_info(take, entry, f"{prefix}parts[{i}]") for i, entry in enumerate(entries)]
        shards = ShardTable.of_files(take.path, files, feed=feed)
    else:
        try:
            shards = ShardTable.of_manifest(
                take.path, entries, where=f"{shorten(prefix)}shards", feed=feed
            )
        except ValueError as error:
            raise DataError(f"{take.path}: {error}; {_REMAKE}") from None
    num_samples = take(split, "num_samples", int, prefix)
    found = sum(shards.num_samples.tolist())
    if num_samples != found or num_samples == 0:
        raise DataError(
            f"{take.path}: split {shorten(name)} has {num_samples} samples and its {len(shards)} "
            f"shards {found}: must be equal and above 0 (empty split?); {_REMAKE}"
        )
    return SplitInfo(
        shards=shards,
        num_samples=num_samples,
        num_targets=take(split, "num_targets", int, prefix),
        facts={key: take(split, key, kind, prefix) for key, kind in facts.items()},
    )


def _part_info(take: _Taker, entry: Any, where: str) -> PartInfo:
    if not isinstance(entry, dict):
        raise take.wrong(where, entry, "an object")
    prefix = f"{where}."
    numbers = {
        key: take(entry, key, int, prefix)
        for key in ("num_shards", "num_samples", "num_targets", "size")
    }
    return PartInfo(
        path=take.relative(entry, "path", prefix),
        sha256=take(entry, "sha256", str, prefix),
        **numbers,
    )
