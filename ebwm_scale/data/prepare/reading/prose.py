"""A text file is one document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label, open_source
from ebwm_scale.data.prepare.reading.selection import Selection
from ebwm_scale.data.prepare.reading.source import Source, kind_by_name
from ebwm_scale.data.prepare.reading.taking import Document, Taker, text_of_bytes


def read_prose(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """The file as a whole; ValueError if it is not UTF-8."""
    taker = Taker(source, selection, left_out, "files")
    with open_source(source) as stream:
        text = text_of_bytes(stream.read())
    if kind_by_name(source.name) is None and _is_json(text):
        suffix = PurePosixPath(source.name).suffix
        raise DataError(
            f"{label(source)}: a file of JSON is not read as prose: it would be one document; "
            f"call it .jsonl or .json in the place of {suffix or 'no suffix'}, so that the text "
            "in its records is read"
        )
    document = taker.text(source.name, text, source.name)
    if document is not None:
        yield document
    taker.finish()


def _is_json(text: str) -> bool:
    """Whether a whole text, or its first line, is a JSON list or object."""
    stripped = text.strip("\ufeff \t\r\n")
    if not stripped.startswith(("[", "{")):
        return False
    for candidate in (stripped, stripped.partition("\n")[0]):
        try:
            json.loads(candidate)
            return True
        except RecursionError:
            return True
        except ValueError:
            continue
    return False
