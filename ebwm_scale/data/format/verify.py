"""Check a whole dataset: every file's size and hash, the tars against their indexes, every sample.

Each shard belongs to one split and stands in the manifest once; each sample's checksum and
decoding are tried; the tokenizer is the one the manifest describes; whole episodes are as listed.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.format.content import TextContent
from ebwm_scale.data.format.episodes import episode_problems
from ebwm_scale.data.format.index import ShardIndex, load_index
from ebwm_scale.data.format.manifest import Manifest, load_manifest
from ebwm_scale.data.format.scored import num_scored
from ebwm_scale.data.format.shard_checks import sample_problems, split_problems
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.format.shards import ShardedSplit, ShardError
from ebwm_scale.data.format.side_files import side_file_problems
from ebwm_scale.data.format.writer import read_tar_index
from ebwm_scale.data.tokenizer import open_tokenizer


def verify_dataset(
    manifest_path: str | Path, *, progress: Progress = no_progress
) -> tuple[list[str], int]:
    """(problems, samples checked): a line per problem. Raises DataError for the manifest itself."""
    manifest = load_manifest(manifest_path)
    problems = side_file_problems(manifest)
    problems += vocabulary_problems(manifest, tokenizer_is_sound=not problems)
    places = ShardPlaces(manifest)
    num_samples = 0
    for name, split in manifest.splits.items():
        problems += split_problems(manifest, name, hashes=True)
        reader = ShardedSplit(manifest, name)
        first_id = 0
        for number, shard in enumerate(tracked(split.shards, f"{name}: shards", progress)):
            problems += places.problems(name, number, shard)
            problems += _shard_problems(manifest, shard, reader, first_id)
            first_id += shard.num_samples
            num_samples += shard.num_samples
        reader.close()
    problems += episode_problems(manifest)
    return list(dict.fromkeys(problems)), num_samples


class ShardPlaces:
    """Where each shard was seen first: by its path, by its bytes, and by the keys of its samples.

    A shard that is in the manifest twice is trained on twice as often; one that is in training and
    in validation makes the validation loss a training loss. Either may be a copy by another name.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.seen: dict[tuple[str, str], tuple[str, int, str]] = {}

    def problems(self, split: str, number: int, shard: ShardInfo) -> list[str]:
        identities = [
            ("the same path", posixpath.normpath(shard.path)),
            ("the same sha256", shard.sha256),
        ]
        try:
            keys = load_index(self.manifest, shard).keys
            identities.append(("the same sample keys", _digest(keys)))
        except (DataError, OSError):
            pass  # a problem of the index itself, which is reported as one
        here = f"splits.{split}.shards[{number}]"
        problems: list[str] = []
        for identity in identities:
            earlier = self.seen.setdefault(identity, (split, number, shard.path))
            if earlier[:2] == (split, number) or problems:
                continue
            first_split, first_number, first_path = earlier
            consequence = "its samples count twice"
            if first_split != split:
                consequence = f"the {split} split holds samples of the {first_split} split"
            problems.append(
                f"{self.manifest.path}: {here} ({shard.path}) is splits.{first_split}."
                f"shards[{first_number}] ({first_path}) again: {identity[0]}; {consequence}"
            )
        return problems


def _digest(keys: list[str]) -> str:
    """Of a set of sample keys."""
    return hashlib.sha256("\n".join(sorted(keys)).encode("utf-8", "surrogatepass")).hexdigest()


def _shard_problems(
    manifest: Manifest, shard: ShardInfo, reader: ShardedSplit, first_id: int
) -> list[str]:
    path, index_path = manifest.folder / shard.path, manifest.folder / shard.index_path
    if not os.path.isfile(path) or not os.path.isfile(index_path):
        return []  # in the list already, as missing
    try:
        index = load_index(manifest, shard)
        damaged = sample_problems(manifest, shard)
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: the shard cannot be read: {error.strerror}"]
    if damaged:
        return damaged
    problems = []
    if len(set(index.keys)) < len(index.keys):
        problems.append(f"{path}: its index {shard.index_path} names a sample more than once")
    problems += _sample_problems(index, path, reader, first_id)
    if not problems:
        problems += _target_problems(shard, path, reader, first_id)
    return problems + _tar_problems(index, path)


def _sample_problems(
    index: ShardIndex, path: Path, reader: ShardedSplit, first_id: int
) -> list[str]:
    """Of the decoded samples of a shard."""
    problems = []
    for row, key in enumerate(index.keys):
        try:
            problem = reader.manifest.content.problem(reader.read(first_id + row))
        except ShardError as error:
            return [str(error)]  # the same for every sample
        except DataError as error:
            problems.append(str(error))
            continue
        if problem is not None:
            offset = index.spans[row][0]
            problems.append(f"{path}: sample {key} (offset {offset}): {problem}")
    return problems


def _target_problems(
    shard: ShardInfo, path: Path, reader: ShardedSplit, first_id: int
) -> list[str]:
    """Of the number of scored targets: losses in training are scaled by what the manifest says."""
    content = reader.manifest.content
    if not content.is_marked:
        return []
    found = 0
    for sample_id in range(first_id, first_id + shard.num_samples):
        found += num_scored(reader.read(sample_id), content.group_size)
    if found == shard.num_targets:
        return []
    return [f"{path}: its samples score {found} targets, the manifest says {shard.num_targets}"]


def _tar_problems(index: ShardIndex, path: Path) -> list[str]:
    """Of the tar as other readers see it."""
    try:
        found = read_tar_index(path)
    except DataError as error:
        return [f"{error}: not a sound tar file; other WebDataset readers will lose samples"]
    except OSError as error:
        return [f"{path}: the shard cannot be read: {error.strerror}"]
    expected = {
        name: {"offsets": f.offsets.tolist(), "sizes": f.sizes.tolist(), "crc32": f.crc32.tolist()}
        for name, f in index.fields.items()
    }
    if found["keys"] == index.keys and found["fields"] == expected:
        return []
    return [f"{path}: its index describes other samples than the {len(found['keys'])} in the tar"]


def vocabulary_problems(manifest: Manifest, *, tokenizer_is_sound: bool) -> list[str]:
    """What the manifest of a text dataset says of its vocabulary, against itself and the model."""
    content = manifest.content
    if not isinstance(content, TextContent):
        return []
    problems = []
    if not 0 <= content.eos_id < content.vocabulary_size:
        problems.append(
            f"{manifest.path}: eos_id is {content.eos_id}: must be below vocabulary_size, "
            f"{content.vocabulary_size}"
        )
    if not tokenizer_is_sound:
        return problems
    try:
        tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
    except DataError as error:
        return problems + [str(error)]
    for name in ("vocabulary_size", "eos_id"):
        said, found = getattr(content, name), getattr(tokenizer, name)
        if said != found:
            problems.append(
                f"{manifest.path}: {name} is {said}, its tokenizer {content.tokenizer_path.name} "
                f"has {found}"
            )
    return problems
