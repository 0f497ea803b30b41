"""What a stream of raw text reads, and who reads it.

    data.stream -> sources -> strands -> lanes -> processes
    a file, or a part of a large one; where there are fewer than lanes, a share of its documents

    global batch, 8 blocks, 4 lanes    [ lane 0 | lane 1 | lane 2 | lane 3 ]    2 blocks of each
    on 2 processes                     [     rank 0      |     rank 1      ]

A lane is a row of blocks with a place of its own in its strands. The number of lanes belongs to the
run and not to the machine. So a global batch is the same on every number of processes that divides
the lanes, and a place holds on all of them.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass, field
from typing import Any

from ebwm_scale.config.permissions import PIPE
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.format.content import TextContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.rank_zero import Group, opened_by_rank_0
from ebwm_scale.data.loading.streaming import expand
from ebwm_scale.data.order import permutation
from ebwm_scale.data.prepare.reading.inputs import find_sources
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.selection import DEFAULT_FIELD, Selection, parse_filter
from ebwm_scale.data.prepare.reading.source import Source, patterns
from ebwm_scale.data.prepare.reading.taking import Document
from ebwm_scale.data.prepare.reading.tasks import parts_of
from ebwm_scale.data.prepare.splitting import draws_of, threshold_of

USUAL_LANES = 64
_KEY = 0x6562776D5F747874


@dataclass(frozen=True)
class Strand:
    """Documents k of a source with k % every == first, in the source's order."""

    number: int
    source: Source
    size: int  # bytes, about
    every: int = 1
    first: int = 0


@dataclass
class TextStream:
    """The strands of a run, the same on every rank.

    window: documents of a lane that are shuffled together. held_out: draws below it, with
    held_out_seed, are in the validation split of the run's dataset, and are not trained on.
    """

    strands: list[Strand]
    num_lanes: int
    window: int
    selection: Selection
    seed: int
    held_out: int
    held_out_seed: int
    left_out: list[str]  # what was found and is not read, a line each
    _shared: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of what is read and in which order; moved files keep it, changed ones do not."""
        sources = [
            [s.source.name, s.source.kind, s.source.compression, s.source.size, s.source.part]
            for s in self.strands
        ]
        filters = [one.text for one in self.selection.filters]
        how = [self.num_lanes, self.window, self.seed, self.selection.field, filters]
        return hashlib.sha256(canonical_json([sources, how])).hexdigest()

    def describe(self) -> str:
        """For people: what is read, and what is not."""
        sources = {(strand.source.place, strand.source.part) for strand in self.strands}
        megabytes = sum(strand.size for strand in self.strands) / 10**6
        first = (
            f"data.stream: raw text, {len(sources)} files or parts of files, {megabytes:,.1f} MB "
            f"as they lie there, read at {self.num_lanes} places at once; documents of the "
            "validation split are left out"
        )
        return "\n".join([first, *(f"data.stream: {line}" for line in self.left_out)])

    def strands_of(self, lane: int, epoch: int) -> list[Strand]:
        """What a lane reads in a pass, one after the other.

        Every strand is in one lane of a pass. The lanes get about as many bytes each.
        """
        if epoch not in self._shared:
            self._shared = {
                known: shared for known, shared in self._shared.items() if known >= epoch - 1
            }
            self._shared[epoch] = self._share_out(epoch)
        return [self.strands[number] for number in self._shared[epoch][lane]]

    def is_held_out(self, document: Document) -> bool:
        return draws_of(document.digest, self.held_out_seed)[0] < self.held_out

    def _share_out(self, epoch: int) -> list[list[int]]:
        """The numbers of each lane's strands: in a permuted order, each to the lane with least."""
        order = permutation(len(self.strands), self.seed, (0, 0, epoch, 0), key=_KEY)
        lanes: list[list[int]] = [[] for _ in range(self.num_lanes)]
        waiting = [(0.0, lane) for lane in range(self.num_lanes)]
        for number in order.tolist():
            size, lane = heapq.heappop(waiting)
            lanes[lane].append(number)
            strand = self.strands[number]
            heapq.heappush(waiting, (size + max(strand.size, 1), lane))
        return lanes


def open_text_stream(
    config: Config, manifest: Manifest, *, world_size: int, group: Group | None = None
) -> TextStream:
    """The stream that the configuration names: data.stream with data.stream_format text.

    manifest: of the run's dataset, whose tokenizer is used and whose validation documents are left
    out. group: the processes of the run, which must all call this; rank 0 looks for the files.
    Raises ConfigError and DataError, on all ranks what rank 0 found wrong.
    """
    num_lanes = lanes_of(config, world_size)
    return opened_by_rank_0(lambda: _open(config, manifest, num_lanes), "data.stream", group)


def lanes_of(config: Config, world_size: int) -> int:
    """data.stream_lanes, or the largest usual number; ConfigError where it does not fit."""
    total = config.train.global_batch_size
    divisors = [count for count in range(1, total + 1) if total % count == 0]
    lanes = config.data.stream_lanes
    if lanes is None:
        lanes = max(count for count in divisors if count <= USUAL_LANES)
    if lanes not in divisors or lanes % world_size:
        fitting = [str(count) for count in divisors if count % world_size == 0]
        raise ConfigError(
            f"data.stream_lanes is {lanes}: must divide train.global_batch_size {total}, and be a "
            f"multiple of the {world_size} processes: use one of {', '.join(fitting) or 'none'}"
        )
    return lanes


def _open(config: Config, manifest: Manifest, num_lanes: int) -> TextStream:
    content = manifest.content
    if not isinstance(content, TextContent) or content.group_size > 1 or content.members:
        raise ConfigError(
            f"data.stream_format is text, and {manifest.path} is no dataset of plain text: name "
            "one that tools/make_text_shards.py wrote; its tokenizer and validation split are used"
        )
    commands = [text for text in config.data.stream if text.startswith(PIPE)]
    if commands:
        raise ConfigError(
            f"data.stream has the command {shown(commands[0])}, and data.stream_format is text: "
            "commands give prepared shards only; name files, folders, globs or addresses"
        )
    left_out = LeftOut()
    inputs = [name for pattern in config.data.stream for name in expand(pattern)]
    lines: list[str] = []
    sources = find_sources(inputs, left_out, report=lines.append)
    if not sources:
        raise DataError(
            f"data.stream: no text found ({left_out.nothing_but()}); looked for {patterns()}"
        )
    held_out, held_out_seed = _held_out(manifest)
    return TextStream(
        strands=_strands(list(parts_of(sources)), num_lanes),
        num_lanes=num_lanes,
        window=max(1, -(-config.data.stream_buffer // num_lanes)),
        selection=_selection(config),
        seed=config.train.seed,
        held_out=held_out,
        held_out_seed=held_out_seed,
        left_out=[*lines, *left_out.lines()],
    )


def _strands(sources: list[tuple[Source, int]], num_lanes: int) -> list[Strand]:
    """One of each (source, bytes); where there are fewer than lanes, equal shares of each."""
    every = 1
    if len(sources) < num_lanes:
        every = -(-num_lanes // len(sources))
    strands = []
    for source, size in sources:
        for first in range(every):
            strands.append(Strand(len(strands), source, size // every, every, first))
    return strands


def _selection(config: Config) -> Selection:
    field_name = config.data.stream_field
    return Selection(
        field=field_name or DEFAULT_FIELD,
        filters=tuple(parse_filter(text) for text in config.data.stream_filters),
        field_given=field_name is not None,
    )


def _held_out(manifest: Manifest) -> tuple[int, int]:
    """(draws below it are in validation, the seed of the draws), as the dataset was made."""
    settings: Any = manifest.values.get("settings")
    try:
        return threshold_of(float(settings["validation_fraction"])), int(settings["seed"])
    except (TypeError, KeyError, ValueError):
        raise DataError(
            f"{manifest.path}: has no settings.validation_fraction and settings.seed, so the "
            "documents of its validation split cannot be kept out of data.stream; make it with "
            "tools/make_text_shards.py"
        ) from None
