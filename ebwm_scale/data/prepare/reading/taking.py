"""From a record, or a text, to a document; what is none is counted with the reason.

A document is known by the hash of its text. So moving, renaming or repacking files changes nothing
in a dataset: not the order, and not the split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label
from ebwm_scale.data.prepare.reading.selection import NoSuchField, Selection
from ebwm_scale.data.prepare.reading.source import Source

# What a reader sees: anything but white space, control characters and what Unicode calls
# default-ignorable (zero-width spaces and joiners, directional marks, variation selectors, fillers
# and tags) or draws as a blank (braille U+2800).
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Document:
    """A text, what it is called in messages, and what it is: sha256 of its UTF-8, hex."""

    name: str
    text: str
    digest: str
    num_bytes: int  # of the text in UTF-8


class Taker:
    """Takes the documents out of one source.

    unit: what the source has many of, in the plural, for messages.
    """

    def __init__(self, source: Source, selection: Selection, left_out: LeftOut, unit: str):
        self.source, self.selection, self.left_out, self.unit = source, selection, left_out, unit
        self._num_good = 0
        self._num_bad = 0
        self._first_bad = ""
        self._fields: tuple[str, ...] | None = None  # of the first record without the field

    def record(self, where: str, record: Any) -> Document | None:
        """The document of a record; None where it is filtered, or is none."""
        name = f"{self.source.name}#{where}"
        if self.selection.filters and isinstance(record, Mapping):
            verdict = self.selection.passes(record)
            if verdict is None:
                self.left_out.unfilterable(name)
                return None
            if not verdict:
                self.left_out.num_filtered += 1
                return None
        try:
            text = self.selection.text_of(record)
        except NoSuchField as error:
            if self._fields is None:
                self._fields = error.fields
            self.bad(where, str(error))
            return None
        except ValueError as error:
            self.bad(where, str(error))
            return None
        if self.selection.id_field is not None:
            name = self.selection.name_of(record) or name
        return self.text(where, text, name)

    def text(self, where: str, text: str, name: str) -> Document | None:
        """The document of a text; None where nothing of it could be seen."""
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError:
            self.bad(where, "has half of a surrogate pair, which is no text")
            return None
        self._num_good += 1
        if not _VISIBLE.search(text):
            self.left_out.invisible(name)
            return None
        return Document(name, text, hashlib.sha256(encoded).hexdigest(), len(encoded))

    def bad(self, where: str, reason: str) -> None:
        self._num_bad += 1
        self._first_bad = self._first_bad or f"{where} ({reason})"

    def finish(self) -> None:
        """Say what was skipped; DataError for a named source in which no record has the field."""
        if not self._num_bad:
            return
        if not self._num_good and self._fields is not None and self.source.given:
            missing = NoSuchField(self.selection.field, self._fields)
            raise DataError(f"{label(self.source)}: {missing}")
        one = self.unit.removesuffix("s")
        self.left_out.warn(
            f"warning: {label(self.source)}: {self._num_bad} {self.unit} skipped, the first is "
            f"{one} {self._first_bad}"
        )


def text_of_bytes(content: bytes) -> str:
    """UTF-8, with or without its mark in front; ValueError says where it is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
