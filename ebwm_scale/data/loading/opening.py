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
from typing import Any, Protocol

from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.data.format.shards import ShardedSplit, Verify
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.loading.mixture import MixedSplit, open_sources

Splits = dict[str, ShardedSplit | MixedSplit]


class Group(Protocol):
    """The processes of a run (core/world.py: World)."""

    @property
    def is_main(self) -> bool: ...

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        ...


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
    if group is None:
        return _open(sources, names, verify, report)
    outcome: Splits | UserError | None = None
    if group.is_main:
        try:
            outcome = _open(sources, names, verify, report)
        except UserError as error:
            outcome = error
        except Exception:
            group.broadcast_object(
                DataError("rank 0 could not open the data; its own message says why")
            )
            raise
    told: Splits | UserError = group.broadcast_object(outcome)
    if isinstance(told, UserError):
        raise told
    return told


def _open(
    sources: Sequence[tuple[str | Path, float]],
    names: Sequence[str],
    verify: Verify,
    report: Callable[[str], None],
) -> Splits:
    loaded = [(open_manifest(manifest), weight) for manifest, weight in sources]
    return {name: open_sources(loaded, name, verify=verify, report=report) for name in names}
