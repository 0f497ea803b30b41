"""Tables of text: .csv and .tsv with the names of the fields in the first line."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label, open_source
from ebwm_scale.data.prepare.reading.selection import NoSuchField, Selection
from ebwm_scale.data.prepare.reading.source import TABS, Source
from ebwm_scale.data.prepare.reading.taking import Document, Taker


def read_table(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """The rows as RFC 4180 has them: quotes around what holds separators or line ends."""
    taker = Taker(source, selection, left_out, "rows")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if source.kind == TABS else ","
    with open_source(source) as stream:
        # Bytes that are no UTF-8 become halves of pairs, which cost their row and not the file.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            _check_header(header, source, selection, left_out)
            if selection.field not in header:
                return
            for number, row in enumerate(rows, start=1):
                if not row:
                    continue
                if len(row) != len(header):
                    taker.bad(str(number), f"has {len(row)} values for {len(header)} fields")
                    continue
                document = taker.record(str(number), dict(zip(header, row)))
                if document is not None:
                    yield document
        except csv.Error as error:
            raise DataError(
                f"{label(source)}: line {rows.line_num}: not a table of this kind ({error}): a "
                "quote that is not closed, or another separator; mend it, or leave the file out"
            ) from None
    taker.finish()


def _check_header(
    header: list[str], source: Source, selection: Selection, left_out: LeftOut
) -> None:
    """DataError for a named table without the field, or with it twice; else a warning."""
    for name in selection.columns:
        if header.count(name) > 1:
            raise DataError(f'{label(source)}: has the field "{name}" twice; rename one')
    if selection.field not in header:
        missing = NoSuchField(selection.field, header)
        if source.given:
            raise DataError(f"{label(source)}: {missing}")
        left_out.unreadable(label(source), missing)
