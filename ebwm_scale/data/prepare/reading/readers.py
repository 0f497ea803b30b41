"""The readers by kind: what each makes of a source is documents, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ebwm_scale.data.prepare.reading import source as kinds
from ebwm_scale.data.prepare.reading.archives import read_tar
from ebwm_scale.data.prepare.reading.columns import read_arrow, read_parquet
from ebwm_scale.data.prepare.reading.inputs import find_sources
from ebwm_scale.data.prepare.reading.json_records import read_json, read_lines
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label
from ebwm_scale.data.prepare.reading.prose import read_prose
from ebwm_scale.data.prepare.reading.selection import EVERYTHING, Selection
from ebwm_scale.data.prepare.reading.separated import read_table
from ebwm_scale.data.prepare.reading.source import Source
from ebwm_scale.data.prepare.reading.taking import Document
from ebwm_scale.data.walking import Report

Reader = Callable[[Source, Selection, LeftOut], Iterator[Document]]


def documents_of(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """The documents of a source, in its order.

    A file that cannot be opened, or is not of its kind, is skipped and named. Raises DataError for
    one that is cut or damaged, or lacks what the selection asks for.
    """
    if source.content is None and (source.part is None or source.part[0] == 0):
        left_out.num_files += 1
    try:
        yield from READERS[source.kind](source, selection, left_out)
    except (OSError, ValueError) as error:
        left_out.unreadable(label(source), error)


class TextInput:
    """Texts of all kinds, as a scan reads them; selection: what is taken of records."""

    def __init__(self, selection: Selection = EVERYTHING):
        self.selection = selection
        filters = [one.text for one in selection.filters]
        self.identity: list[Any] = ["texts", selection.field, selection.id_field, filters]
        self.identity.append(selection.field_given)

    def find(self, inputs: Sequence[str | Path], left_out: LeftOut, report: Report) -> list[Source]:
        return find_sources(inputs, left_out, report=report)

    def read(self, source: Source, left_out: LeftOut) -> Iterator[Document]:
        return documents_of(source, self.selection, left_out)


def _read_archive(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    return read_tar(source, selection, left_out, documents_of)


READERS: dict[str, Reader] = {
    kinds.PROSE: read_prose,
    kinds.LINES: read_lines,
    kinds.JSON: read_json,
    kinds.COMMAS: read_table,
    kinds.TABS: read_table,
    kinds.PARQUET: read_parquet,
    kinds.ARROW: read_arrow,
    kinds.TAR: _read_archive,
}
