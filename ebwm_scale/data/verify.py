"""Check a whole dataset: every file's size and hash, the tars against their indexes, every sample's checksum and decoding."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .manifest import Manifest, ShardInfo, file_sha256, load_manifest
from .shards import ShardedSplit, load_index, sample_problems, split_problems
from .writer import read_tar_index


def verify_dataset(manifest_path: str | Path) -> tuple[list[str], int]:
    """(problems, samples checked): one line per problem, naming shard, sample and offset. Raises DataError for the manifest itself."""
    manifest = load_manifest(manifest_path)
    problems = _side_file_problems(manifest)
    num_samples = 0
    for name, split in manifest.splits.items():
        problems += split_problems(manifest, name, hashes=True)
        reader = ShardedSplit(manifest, name)
        first_id = 0
        for shard in split.shards:
            problems += _shard_problems(manifest, shard, reader, first_id)
            first_id += shard.num_samples
            num_samples += shard.num_samples
        reader.close()
    return list(dict.fromkeys(problems)), num_samples


def _shard_problems(
    manifest: Manifest, shard: ShardInfo, reader: ShardedSplit, first_id: int
) -> list[str]:
    path = manifest.folder / shard.path
    try:
        index = load_index(manifest, shard)
        damaged = sample_problems(manifest, shard)
    except DataError as error:
        return [str(error)]
    except OSError:
        return []  # a missing shard is in the list already
    if damaged:
        return damaged
    problems = []
    for row in range(shard.num_samples):
        try:
            problem = manifest.content.problem(reader.read(first_id + row))
            if problem is not None:
                problems.append(
                    f"{path}: sample {index.keys[row]} (offset {index.spans[row][0]}): {problem}"
                )
        except DataError as error:
            problems.append(str(error))
    try:
        found = read_tar_index(path)
    except DataError as error:
        return problems + [
            f"{error}: not a sound tar file; other WebDataset readers will lose samples"
        ]
    expected = {
        name: {"offsets": f.offsets.tolist(), "sizes": f.sizes.tolist(), "crc32": f.crc32.tolist()}
        for name, f in index.fields.items()
    }
    if found["keys"] != index.keys or found["fields"] != expected:
        problems.append(
            f"{path}: its index {shard.index_path} describes other samples than the {len(found['keys'])} in the tar"
        )
    return problems


def _side_file_problems(manifest: Manifest) -> list[str]:
    """Of the tokenizer, or of the encoder's parameters."""
    problems = []
    for path, expected in manifest.content.files().items():
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif (found := file_sha256(path)) != expected:
            problems.append(
                f"{path}: sha256 is {found[:12]}..., the manifest says {expected[:12]}...: damaged"
            )
    return problems
