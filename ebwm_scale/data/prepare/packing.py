"""Tokens of documents -> blocks -> shards, on all cores: each process writes whole shards.

documents of a split      [ a a a ] [ b b ] [ c c c c c ] ...   in the split's shuffled order
stream                      a a a E   b b E   c c c c c E ...   E: end of sequence
blocks, context L = 4      [a a a E b]
                                   [b b E c c]
                                           [c c c c E] ...

E is a target like any other. Neighbouring blocks share one token, block i = stream[i L : i L + L +
1], so each token is a target exactly once. The tokens after the last full block are dropped and
counted. A shard of S blocks begins at token S L of its number: where it is in the stream is known
before any other shard is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.disk import replace_text, replacement
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress
from ebwm_scale.data.format.writer import ShardWriter, load_webdataset
from ebwm_scale.data.prepare.runs import Runs, Totals
from ebwm_scale.data.prepare.scanning import STILL_S, num_cores
from ebwm_scale.data.prepare.splitting import SplitRule
from ebwm_scale.data.prepare.workers import each_in_a_process

_GROUP_TOKENS = 2**24  # written by one process before it says so
_MOVE_EVERY = 1024  # blocks


class Packer:
    """Cuts a stream of tokens into overlapping blocks of context_length + 1, and counts targets."""

    def __init__(self, *, context_length: int, vocabulary_size: int):
        self.context_length = context_length
        self.dtype = token_dtype(vocabulary_size)
        self.counts = np.zeros(vocabulary_size, dtype=np.int64)  # of the targets in full blocks
        self.num_tokens = 0  # given in
        self._rest = np.empty(0, dtype=self.dtype)

    def blocks(self, pieces: Iterable[Sequence[int] | np.ndarray]) -> Iterator[np.ndarray]:
        """Blocks (context_length + 1,) of the pieces' concatenation; the rest is left over."""
        length = self.context_length
        for piece in pieces:
            self.num_tokens += len(piece)
            stream = np.concatenate([self._rest, np.asarray(piece, dtype=self.dtype)])
            num_blocks = max(len(stream) - 1, 0) // length
            if num_blocks:
                targets = stream[1 : num_blocks * length + 1]
                self.counts += np.bincount(targets, minlength=len(self.counts))
            for i in range(num_blocks):
                yield stream[i * length : i * length + length + 1]
            self._rest = stream[num_blocks * length :]

    @property
    def num_dropped(self) -> int:
        """Tokens that are no target of any block, except the very first of the stream."""
        return max(len(self._rest) - 1, 0)


def token_dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype("<u2" if vocabulary_size < 65536 else "<u4")


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of the targets under their own frequencies, in nats per token."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@dataclass(frozen=True)
class PackedSplit:
    """A split that is to be written: where its tokens are, and what its shards are like."""

    name: str
    runs: Runs
    rule: SplitRule
    totals: Totals
    context_length: int
    samples_per_shard: int
    vocabulary_size: int

    @property
    def num_tokens(self) -> int:
        return int(self.totals.items.sum())

    @property
    def num_blocks(self) -> int:
        return max(self.num_tokens - 1, 0) // self.context_length

    @property
    def num_targets(self) -> int:
        return self.num_blocks * self.context_length

    def facts(self) -> dict[str, Any]:
        """What else there is to say in the manifest."""
        return {"num_dropped_tokens": self.num_tokens - 1 - self.num_targets}

    def blocks(self, first: int, end: int, counts: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(block, targets in it) of blocks `first` to `end`; counts: how often each token is one,
        added up at the end.
        """
        length = self.context_length
        packer = Packer(context_length=length, vocabulary_size=self.vocabulary_size)
        for block in packer.blocks(self.tokens(first * length, end * length + 1)):
            yield block, length
        counts += packer.counts

    def tokens(self, first: int, end: int) -> Iterator[np.ndarray]:
        """The tokens from `first` to `end` of the split's stream, in pieces."""
        ends = np.cumsum(self.totals.items)
        bucket = int(np.searchsorted(ends, first, side="right"))
        at = int(ends[bucket - 1]) if bucket else 0
        for piece in self.runs.documents(self.rule, self.name, first_bucket=bucket):
            start, at = at, at + len(piece)
            if at > first:
                yield piece[max(first - start, 0) : end - start]
            if at >= end:
                return


def write_split(
    split: PackedSplit, output: Path, work: Path, *, progress: Progress
) -> dict[str, Any]:
    """The split's shards in `output`, and its entry in the manifest.

    work: where shards are written, and stay when the process is killed. Raises DataError for less
    than one block.
    """
    if not split.num_blocks:
        raise DataError(
            f"the {split.name} split has {split.num_tokens} tokens in "
            f"{split.totals.num_documents} documents: one block of context length "
            f"{split.context_length} needs {split.context_length + 1}; give more text, a shorter "
            "context, or another validation fraction or seed"
        )
    folders = _write_groups(split, work, progress)
    shards: list[dict[str, Any]] = []
    counts = np.zeros(split.vocabulary_size, dtype=np.int64)
    for folder in folders:
        entries = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
        counts += np.load(folder / "counts.npy")
        for entry in entries:
            for name in (entry["path"], entry["index_path"]):
                _link(folder / name, output / name)
        shards += entries
    return {
        "shards": shards,
        "num_documents": split.totals.num_documents,
        "num_samples": split.num_blocks,
        "num_targets": split.num_targets,
        "num_dropped_tokens": 0,
        **split.facts(),
        "num_text_bytes": split.totals.num_bytes,
        "unigram_entropy": unigram_entropy(counts),
    }


def _write_groups(split: PackedSplit, work: Path, progress: Progress) -> list[Path]:
    """Folders of finished shards, in the shards' order."""
    num_shards = -(-split.num_blocks // split.samples_per_shard)
    tokens_per_shard = split.samples_per_shard * split.context_length
    size = max(1, _GROUP_TOKENS // tokens_per_shard)
    size = max(1, min(size, -(-num_shards // num_cores())))
    folders = {
        (first, min(first + size, num_shards)): work / f"{split.name}-{first:06d}-{size}"
        for first in range(0, num_shards, size)
    }
    waiting = [group for group, folder in folders.items() if not (folder / "shards.json").is_file()]
    written = sum(end - first for first, end in folders) - sum(e - f for f, e in waiting)

    def write(group: tuple[int, int], moved: Callable[[], None]) -> None:
        _write_shards(split, folders[group], *group, moved)

    load_webdataset()
    workers = min(num_cores(), max(len(waiting), 1))
    for outcome in each_in_a_process(waiting, write, workers=workers, still_s=STILL_S):
        if outcome.problem is not None:
            raise OSError(outcome.problem)  # nothing is wrong with the input: a full disk
        written += outcome.task[1] - outcome.task[0]
        progress(f"{split.name}: shards", written, num_shards)
    return list(folders.values())


def _write_shards(
    split: PackedSplit, folder: Path, first: int, end: int, moved: Callable[[], None]
) -> None:
    """Shards from `first` to `end` in a folder of their own; its list is written last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first_block = first * split.samples_per_shard
    end_block = min(end * split.samples_per_shard, split.num_blocks)
    counts = np.zeros(split.vocabulary_size, dtype=np.int64)
    writer = ShardWriter(
        folder, split.name, samples_per_shard=split.samples_per_shard, first_shard=first
    )
    try:
        blocks = split.blocks(first_block, end_block, counts)
        for number, (block, num_targets) in enumerate(blocks):
            writer.add({"tokens.npy": block}, num_targets=num_targets)
            if number % _MOVE_EVERY == 0:
                moved()
        shards = writer.close()
    finally:
        writer.abandon()
    with replacement(folder / "counts.npy") as temporary, temporary.open("wb") as file:
        np.save(file, counts)
    replace_text(folder / "shards.json", json.dumps(shards))


def _link(source: Path, target: Path) -> None:
    """The same file in a second place, so that a kill in between loses neither."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
