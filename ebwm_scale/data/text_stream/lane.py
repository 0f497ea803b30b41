"""One lane of a stream of raw text: its documents, shuffled in windows, as blocks of tokens.

    documents     d0 d1 d2 d3 | d4 d5 d6 d7 | ...      in the order of the lane's strands; a
                                                       window ends where a pass does
    windows       d2 d0 d3 d1 | d5 d7 d4 d6 | ...      each permuted by (seed, lane, window)
    tokens        a a a E b b E c c ...                E: end of sequence
    blocks        [a a a E b] [b b E c c] ...          neighbours share a token

A cursor says where the next block begins: where its window begins, how many of the window's
documents are used up, and how many tokens of the next. From there a lane goes on as if it had never
stopped: it reads the window again, and gives out no token twice and leaves none out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.redaction import redacted, redacted_error
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.data.order import permutation
from ebwm_scale.data.prepare.packing import token_dtype
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label
from ebwm_scale.data.prepare.reading.readers import documents_of
from ebwm_scale.data.prepare.reading.taking import Document
from ebwm_scale.data.prepare.text import TokenMaker
from ebwm_scale.data.text_stream.strands import Strand, TextStream
from ebwm_scale.data.tokenizer import Tokenizer

MAX_EMPTY_STRANDS = 100  # in a row without a document before giving up
_WINDOW_CHARACTERS = 2**22  # a window ends behind the document that reaches it
_KEY = 0x6562776D5F77696E


@dataclass(frozen=True, order=True)
class Place:
    """Before a document: the pass, the strand in the lane's order, the document in its source."""

    epoch: int = 0
    strand: int = 0
    document: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where the next block of a lane begins.

    start, window: place and number of its window. taken: documents of it that are used up. token:
    tokens of the next one that are. num_blocks: given out so far. ends: (pass, strand, documents)
    of strands that damage ended early, from the window on; read again, they end there too.
    """

    start: Place = Place()
    window: int = 0
    taken: int = 0
    token: int = 0
    num_blocks: int = 0
    ends: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cursor:
        """ValueError, KeyError or TypeError for what is none."""
        numbers = {name: int(values[name]) for name in ("window", "taken", "token", "num_blocks")}
        start = Place(**{name: int(value) for name, value in values["start"].items()})
        ends = tuple((int(a), int(b), int(c)) for a, b, c in values["ends"])
        return cls(start=start, ends=ends, **numbers)


@dataclass(frozen=True)
class _Piece:
    """Tokens of a document, with where it stands: its window, and its number in the window."""

    start: Place
    window: int
    taken: int
    tokens: np.ndarray


class Lane:
    """Endless blocks of a lane, from a cursor on.

    found: what is damaged, since it was last cleared; notes: what else was not read, a line each.
    """

    def __init__(
        self,
        stream: TextStream,
        number: int,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        cursor: Cursor,
    ):
        self.stream = stream
        self.number = number
        self.context_length = context_length
        self.cursor = cursor
        self.found: list[BadSample] = []
        self.notes: list[str] = []
        self.dtype = token_dtype(tokenizer.vocabulary_size)
        self._maker = TokenMaker(tokenizer, self.dtype, 1)
        self._ends = {(epoch, strand): count for epoch, strand, count in cursor.ends}
        self._place = cursor.start  # of the next document to be read
        self._next_window = cursor.window
        self._documents = self._read(cursor.start)
        self._pieces: deque[_Piece] = deque()
        self._num_tokens = 0  # in the pieces
        self._is_placed = False

    def block(self) -> np.ndarray:
        """The next context_length + 1 tokens; DataError if no document is found for long."""
        if not self._is_placed:
            self._go_to_cursor()
        offset = self.cursor.token
        while self._num_tokens - offset < self.context_length + 1:
            self._add_window()
        block = self._tokens(offset, self.context_length + 1)
        self._move(offset + self.context_length)
        return block

    def _go_to_cursor(self) -> None:
        self._is_placed = True
        self._add_window()
        if self.cursor.taken >= len(self._pieces):
            raise DataError(
                f"data.stream: the documents behind the place of the checkpoint are gone (lane "
                f"{self.number}): the files have changed; start a new run"
            )
        for _ in range(self.cursor.taken):
            self._drop()

    def _tokens(self, first: int, count: int) -> np.ndarray:
        """So many tokens of the pieces, copied."""
        parts = []
        for piece in self._pieces:
            part = piece.tokens[first : first + count]
            first = max(0, first - len(piece.tokens))
            count -= len(part)
            parts.append(part)
            if not count:
                break
        return np.concatenate(parts)

    def _move(self, offset: int) -> None:
        """The next block begins so many tokens behind the first piece's start."""
        while offset >= len(self._pieces[0].tokens):
            offset -= len(self._pieces[0].tokens)
            self._drop()
        piece = self._pieces[0]
        first = (piece.start.epoch, piece.start.strand)
        self._ends = {at: count for at, count in self._ends.items() if at >= first}
        self.cursor = Cursor(
            start=piece.start,
            window=piece.window,
            taken=piece.taken,
            token=offset,
            num_blocks=self.cursor.num_blocks + 1,
            ends=tuple((*at, count) for at, count in sorted(self._ends.items())),
        )

    def _drop(self) -> None:
        self._num_tokens -= len(self._pieces.popleft().tokens)

    def _add_window(self) -> None:
        start, documents, num_characters = self._place, [], 0
        while len(documents) < self.stream.window and num_characters < _WINDOW_CHARACTERS:
            document = next(self._documents)
            if document is not None:
                documents.append(document)
                num_characters += len(document.text)
            elif documents:
                break
            else:
                start = self._place
        tokens = [of_one for _, of_one in self._maker(iter(documents))]
        counter = (0, self.number, self._next_window, 0)
        order = permutation(len(tokens), self.stream.seed, counter, key=_KEY)
        for taken, place in enumerate(order.tolist()):
            self._pieces.append(_Piece(start, self._next_window, taken, tokens[place]))
            self._num_tokens += len(tokens[place])
        self._next_window += 1

    def _read(self, place: Place) -> Iterator[Document | None]:
        """The lane's documents from a place on, without end; self._place is behind each.

        None stands between two passes: no window reaches into the next.
        """
        num_empty = 0
        while True:
            strands = self.stream.strands_of(self.number, place.epoch)
            for number in range(place.strand, len(strands)):
                place = replace(place, strand=number)
                is_empty = True
                for document in self._of_strand(strands[number], place):
                    is_empty = False
                    yield document
                place = replace(place, document=0)
                num_empty = num_empty + 1 if is_empty else 0
                if num_empty == MAX_EMPTY_STRANDS:
                    raise DataError(
                        f"data.stream: lane {self.number} of {self.stream.num_lanes} met no "
                        f"document in {num_empty} files or shares of files in a row, the last is "
                        f"{label(strands[number].source)}: check the network and the files, or "
                        "give a lower data.stream_lanes if there are so few documents"
                    )
            self._place = place = Place(place.epoch + 1)
            yield None

    def _of_strand(self, strand: Strand, place: Place) -> Iterator[Document]:
        """The strand's documents from the place on; damage ends it, and goes on the list."""
        known_end = self._ends.get((place.epoch, place.strand))
        if known_end == 0:
            return
        left_out = LeftOut()
        num_read = 0
        reason = None
        try:
            for document in documents_of(strand.source, self.stream.selection, left_out):
                number = num_read
                num_read += 1
                is_mine = number % strand.every == strand.first
                if number >= place.document and is_mine and not self.stream.is_held_out(document):
                    self._place = replace(place, document=num_read)
                    yield document
                if num_read == known_end:
                    return
        except DataError as error:
            reason = str(error)
        if left_out.num_unreadable and reason is None:
            reason = left_out.warnings[-1].removeprefix("warning: ")
        if reason is not None and known_end is None:
            self._end(strand, place, num_read, reason)
        if place.epoch == 0 and strand.first == 0:
            self.notes += left_out.lines()

    def _end(self, strand: Strand, place: Place, num_read: int, reason: str) -> None:
        address = str(strand.source.place)
        reason = redacted_error(reason, address)
        self._ends[place.epoch, place.strand] = num_read
        self.found.append(
            BadSample(
                split="train",
                sample_id=(strand.number << 32) + num_read,
                shard=redacted(address),
                key=None,
                offset=None,
                reason=f"{reason}; its documents from {num_read} on are left out",
                replaced_by=-1,
            )
        )
