"""Opening the data of a run once for all its processes: rank 0 reads and checks, the others are
told what came of it.

A manifest of a million shards is hundreds of megabytes, and checking it asks the file system for
two files a shard. Of that a process needs the number of samples of each shard (8 bytes), and what
is said of the few shards it has open: for these it reads the part of the list they stand in
(data/format/shard_table.py) when it opens one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ebwm_scale.data.format.shards import ShardedSplit, Verify
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.loading.mixture import MixedSplit, open_sources
from ebwm_scale.data.loading.rank_zero import Group, opened_by_rank_0

Splits = dict[str, ShardedSplit | MixedSplit]


def open_splits(
    sources: Sequence[tuple[str | Path, float]],
    names: Sequence[str],
    *,
    verify: Verify,
    report: Callable[[str], None] = print,
    group: Group | None = None,
) -> Splits:
    """The named splits of a dataset or mixture of (manifest, weight), the same on every rank of the
    group.

    Every rank must call it. Raises on all ranks what rank 0 found wrong: DataError or ConfigError.
    """
    return opened_by_rank_0(lambda: _open(sources, names, verify, report), "the data", group)


def _open(
    sources: Sequence[tuple[str | Path, float]],
    names: Sequence[str],
    verify: Verify,
    report: Callable[[str], None],
) -> Splits:
    loaded = [(open_manifest(manifest), weight) for manifest, weight in sources]
    return {name: open_sources(loaded, name, verify=verify, report=report) for name in names}
