"""Are the files of a split those that the manifest describes? Sizes, hashes, and which sample of a
damaged shard is the first.
"""

from __future__ import annotations

import os
import stat
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_hashes
from ebwm_scale.data.format.index import REMAKE, load_index
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shard_table import ShardInfo

_TRIED = 32  # files asked for one after the other, to see how long an answer takes
_SLOW_ANSWER_S = 1e-4  # above this, as over a network, many are asked for at a time


def split_problems(manifest: Manifest, split: str, *, hashes: bool) -> list[str]:
    """One line for each file of a split that is missing, or has another size or (hashes=True)
    another hash than the manifest says.
    """
    problems = []
    sound = []
    table = manifest.splits[split].shards
    for first, paths, expected in table.listing():
        sizes = _sizes([f"{manifest.folder}/{path}" for path in paths])
        if sizes[::2] == expected and None not in sizes and not hashes:
            continue
        for row, (size, index_size) in enumerate(zip(sizes[::2], sizes[1::2])):
            shard = table[first + row]
            problem = _file_problem(manifest, shard, size, index_size)
            if problem is not None:
                problems.append(problem)
            elif hashes:
                sound.append(shard)
    if hashes:
        for shard, found in zip(
            sound, file_hashes([manifest.folder / shard.path for shard in sound])
        ):
            if isinstance(found, OSError):
                problems.append(
                    f"{manifest.folder / shard.path}: the shard cannot be read: {found.strerror}; "
                    f"{REMAKE}"
                )
            elif found != shard.sha256:
                problems.append(
                    f"{manifest.folder / shard.path}: sha256 of the shard is {found[:12]}..., the "
                    f"manifest says {shard.sha256[:12]}...: "
                    f"damaged{_first_damage(manifest, shard)}; {REMAKE}"
                )
        for shard in sound:
            try:
                load_index(manifest, shard)
            except DataError as error:
                problems.append(str(error))
    return problems


def _file_problem(
    manifest: Manifest, shard: ShardInfo, size: int | None, index_size: int | None
) -> str | None:
    """What is wrong with the files of a shard as their sizes show it; None for a size: there is no
    such file.
    """
    path = manifest.folder / shard.path
    if size is None:
        return f"{path}: the shard is missing; {REMAKE}"
    if index_size is None:
        return (
            f"{manifest.folder / shard.index_path}: the index of shard {shard.path} is missing; "
            f"{REMAKE}"
        )
    if size != shard.size:
        what = "truncated" if size < shard.size else "too long"
        return (
            f"{path}: the shard has {size} bytes, the manifest says {shard.size}: "
            f"{what}{_first_damage(manifest, shard)}; {REMAKE}"
        )
    return None


def _sizes(paths: list[str]) -> list[int | None]:
    """Bytes of each file, None where there is none; in threads where the file system takes its time
    to answer.
    """
    start = time.perf_counter()
    sizes = _sizes_of(paths[:_TRIED])
    waited_s = (time.perf_counter() - start) / _TRIED
    rest = paths[_TRIED:]
    if waited_s < _SLOW_ANSWER_S or not rest:
        return sizes + _sizes_of(rest)
    pieces = [rest[first : first + _TRIED] for first in range(0, len(rest), _TRIED)]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return [*sizes, *(size for piece in pool.map(_sizes_of, pieces) for size in piece)]


def _sizes_of(paths: list[str]) -> list[int | None]:
    sizes: list[int | None] = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            sizes.append(None)
        else:
            sizes.append(status.st_size if stat.S_ISREG(status.st_mode) else None)
    return sizes


def sample_problems(manifest: Manifest, shard: ShardInfo) -> list[str]:
    """One line for each sample of a shard that is cut off or has another checksum than its index
    says; DataError for the index.
    """
    index, problems = load_index(manifest, shard), []
    with (manifest.folder / shard.path).open("rb") as file:
        for name, field in index.fields.items():
            for row, key in enumerate(index.keys):
                offset, size = int(field.offsets[row]), int(field.sizes[row])
                file.seek(offset)
                content = file.read(size)
                if len(content) != size or zlib.crc32(content) != int(field.crc32[row]):
                    what = "cut off" if len(content) != size else "another checksum"
                    problems.append(
                        f"{manifest.folder / shard.path}: sample {key} ({name}, offset {offset}, "
                        f"{size} bytes): {what}"
                    )
    return problems


def _first_damage(manifest: Manifest, shard: ShardInfo) -> str:
    """Names the first damaged sample of a shard that is known to be damaged."""
    try:
        problems = sample_problems(manifest, shard)
    except (DataError, OSError) as error:
        return f" (which samples cannot be said: {error})"
    if not problems:
        return ", outside of its samples"
    first = problems[0].split(": ", 1)[1]
    return f", {len(problems)} samples, the first is {first}"
