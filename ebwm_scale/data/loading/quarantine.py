"""Damaged samples while training: set aside, replaced by the same neighbour on every machine,
written down, and counted.

A sample that cannot be read is replaced by the next one of its shard that can (of the next shards,
if the whole shard is gone). So every rank keeps equal counts, and what replaces a sample does not
depend on which process found it, nor on the number of processes. The list of known bad samples is
part of a checkpoint: a resumed run replaces the same ones, even if the disk has recovered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.rows import Rows
from ebwm_scale.data.format.content import Sample
from ebwm_scale.data.format.shards import SampleError, ShardError

QUARANTINE_NAME = "quarantine.jsonl"
MAX_TRIES = 1000  # replacements looked at before giving up


@dataclass(frozen=True)
class BadSample:
    """One line of quarantine.jsonl: where the damage is and which sample stands in."""

    split: str
    sample_id: int
    shard: str
    key: str | None  # None and no offset: the whole shard
    offset: int | None
    reason: str
    replaced_by: int


def read_or_replace(split, sample_id: int, known: dict[int, BadSample]) -> Sample:
    """The sample, or what replaces it; new findings enter `known`.

    Raises DataError when nothing readable is near.
    """
    if sample_id in known:
        return read_or_replace(split, known[sample_id].replaced_by, known)
    found: SampleError | ShardError | None = None
    candidate = sample_id
    for _ in range(MAX_TRIES):
        try:
            sample = split.read_sample(candidate)
        except SampleError as error:
            last, following = error, split.after(candidate)
        except ShardError as error:
            last, following = error, split.after_shard_of(candidate)
        else:
            if found is not None:
                known[sample_id] = _record(split, sample_id, found, candidate)
            return sample
        found, candidate = found or last, following
        if candidate == sample_id:
            break
    raise DataError(f"{found}; and no sample after it can be read either")


def _record(split, sample_id: int, error: SampleError | ShardError, replaced_by: int) -> BadSample:
    return BadSample(
        split=split.split,
        sample_id=sample_id,
        shard=str(error.path),
        key=getattr(error, "key", None),
        offset=getattr(error, "offset", None),
        reason=error.reason,
        replaced_by=replaced_by,
    )


class Quarantine:
    """The bad samples of a run, all ranks together, and the file that lists them.

    write: appends a row to that file; None on ranks other than 0.
    """

    def __init__(self, folder: Path, *, limit: int, write: Callable[[dict], None] | None):
        self.path = folder / QUARANTINE_NAME
        self.limit = limit
        self.write = write
        self.bad: dict[tuple[str, int], BadSample] = {}

    def add(self, found: Iterable[BadSample]) -> list[BadSample]:
        """Those that are new, written down, now or once the disk has room again. Every rank must be
        given the same."""
        new = [
            bad
            for bad in sorted(found, key=lambda b: (b.split, b.sample_id))
            if (bad.split, bad.sample_id) not in self.bad
        ]
        new = list({(bad.split, bad.sample_id): bad for bad in new}.values())
        self.bad.update({(bad.split, bad.sample_id): bad for bad in new})
        if self.write is not None and new:
            written = self._written()
            for bad in new:
                if (bad.split, str(bad.sample_id)) not in written:
                    self.write(asdict(bad))
        return new

    def known(self, split: str) -> dict[int, BadSample]:
        return {sample_id: bad for (name, sample_id), bad in self.bad.items() if name == split}

    @property
    def exceeded(self) -> bool:
        return len(self.bad) > self.limit

    def state_dict(self) -> list[dict]:
        return [asdict(bad) for bad in self.bad.values()]

    def load_state_dict(self, values: list[dict]) -> None:
        self.bad = {(bad["split"], bad["sample_id"]): BadSample(**bad) for bad in values}

    def _written(self) -> set[tuple[str, str]]:
        """(split, id) of what an earlier attempt of this run wrote before it was killed."""
        return {(str(row.get("split")), str(row.get("sample_id"))) for row in Rows(self.path)}
