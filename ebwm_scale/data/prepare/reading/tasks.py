"""Sources cut and gathered into tasks of about equal size, so that all cores have work.

Large files of lines are cut by bytes, large parquet files by row groups; small files are gathered.
A task is known by what it reads: a task that was done before a kill is found again by that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.prepare.reading.columns import parquet_row_groups
from ebwm_scale.data.prepare.reading.source import LINES, PARQUET, Source

TASK_BYTES = 64 * 2**20  # of input, as it lies on disk
_TASK_FILES = 4096


@dataclass(frozen=True)
class Task:
    """Sources that one process reads, one after the other."""

    sources: tuple[Source, ...]
    size: int  # bytes

    def key(self, how: list, payload: str) -> str:
        """What it reads, how, and what is made of it, in 32 hexadecimal digits."""
        identity = [[source.identity for source in self.sources], how, payload]
        return hashlib.sha256(canonical_json(identity)).hexdigest()[:32]


def tasks_of(sources: Sequence[Source]) -> list[Task]:
    """All sources, in their order, in tasks of about TASK_BYTES."""
    tasks: list[Task] = []
    waiting: list[Source] = []
    size = 0
    for source, source_size in parts_of(sources):
        if waiting and (size + source_size > TASK_BYTES or len(waiting) == _TASK_FILES):
            tasks.append(Task(tuple(waiting), size))
            waiting, size = [], 0
        waiting.append(source)
        size += source_size
    if waiting:
        tasks.append(Task(tuple(waiting), size))
    return tasks


def parts_of(sources: Sequence[Source]) -> Iterator[tuple[Source, int]]:
    """(source, bytes) of every source, or of each part of a large one."""
    for source in sources:
        if source.size < 2 * TASK_BYTES or source.compression:
            yield source, source.size
        elif source.kind == LINES:
            for first in range(0, source.size, TASK_BYTES):
                end = min(first + TASK_BYTES, source.size)
                yield replace(source, part=(first, end)), end - first
        elif source.kind == PARQUET:
            yield from _parts_of_parquet(source)
        else:
            yield source, source.size


def _parts_of_parquet(source: Source) -> Iterator[tuple[Source, int]]:
    first, size = 0, 0
    sizes = parquet_row_groups(source)
    for number, group_size in enumerate(sizes):
        if size and size + group_size > TASK_BYTES:
            yield replace(source, part=(first, number)), size
            first, size = number, 0
        size += group_size
    yield replace(source, part=(first, len(sizes))), size
