"""Parquet and Arrow: the columns that are needed, a batch of rows at a time.

Arrow comes as a file (.arrow, .feather) or as a stream (what Hugging Face datasets save); which of
the two it is, its first bytes say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label, open_seekable, what_it_says
from ebwm_scale.data.prepare.reading.selection import NoSuchField, Selection
from ebwm_scale.data.prepare.reading.source import Source
from ebwm_scale.data.prepare.reading.taking import Document, Taker

_BATCH_ROWS = 512
_BUFFER_BYTES = 2**20
_FILE_MARK = b"ARROW1"
_OLD_FEATHER = b"FEA1"


def read_parquet(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """The rows of the source's row groups; DataError where the field is absent or no text."""
    taker = Taker(source, selection, left_out, "rows")
    with _arrow_errors(source), open_parquet(source) as file:
        columns = _columns(file.schema_arrow, source, selection)
        groups = range(file.num_row_groups) if source.part is None else range(*source.part)
        row = sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
        batches = file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=list(groups), columns=columns, use_threads=False
        )
        for batch in batches:
            yield from _documents(batch, row, taker)
            row += batch.num_rows
    taker.finish()


@contextlib.contextmanager
def open_parquet(source: Source) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile that reads pages, not whole column chunks."""
    parquet = _pyarrow("parquet")
    with open_seekable(source) as stream:
        file = parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        with contextlib.closing(file):
            yield file


def parquet_row_groups(source: Source) -> list[int]:
    """Bytes of each row group, as they lie in the file."""
    with _arrow_errors(source), open_parquet(source) as file:
        sizes = []
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            columns = range(group.num_columns)
            sizes.append(sum(group.column(i).total_compressed_size for i in columns))
        return sizes


def read_arrow(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """The rows of an Arrow file or stream."""
    taker = Taker(source, selection, left_out, "rows")
    with _arrow_errors(source), open_seekable(source) as stream:
        row = 0
        for batch in _arrow_batches(stream, source, selection):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield from _documents(batch.slice(start, _BATCH_ROWS), row + start, taker)
            row += batch.num_rows
    taker.finish()


def _arrow_batches(stream: Any, source: Source, selection: Selection) -> Iterator[Any]:
    ipc = _pyarrow("ipc")
    mark = stream.read(len(_FILE_MARK))
    stream.seek(0)
    if mark.startswith(_OLD_FEATHER):
        raise DataError(
            f"{label(source)}: an old Feather file (version 1), which cannot be read in parts; "
            "write it again as .parquet"
        )
    if mark == _FILE_MARK:
        reader = ipc.open_file(stream)
        columns = _columns(reader.schema, source, selection)
        for number in range(reader.num_record_batches):
            yield _flat(reader.get_batch(number), columns)
        return
    reader = ipc.open_stream(stream)
    columns = _columns(reader.schema, source, selection)
    for batch in reader:
        yield _flat(batch, columns)


def _flat(batch: Any, columns: list[str]) -> Any:
    """Only the top-level columns in which the fields are."""
    return batch.select(list(dict.fromkeys(_top(batch.schema, name) for name in columns)))


def _documents(batch: Any, first_row: int, taker: Taker) -> Iterator[Document]:
    """Of a batch; a record is built only where something else than the text is looked at."""
    selection = taker.selection
    if selection.columns == (selection.field,) and selection.field in batch.schema.names:
        name = taker.source.name
        for number, text in enumerate(_texts(batch.column(selection.field)), start=first_row):
            where = str(number)
            if text is None:
                taker.bad(where, f'its field "{selection.field}" is null')
                continue
            if isinstance(text, ValueError):
                taker.bad(where, str(text))
                continue
            document = taker.text(where, text, f"{name}#{where}")
            if document is not None:
                yield document
        return
    for number, record in enumerate(_records(batch), start=first_row):
        if isinstance(record, ValueError):
            taker.bad(str(number), str(record))
            continue
        document = taker.record(str(number), record)
        if document is not None:
            yield document


def _texts(column: Any) -> list[Any]:
    """The values; where some are no UTF-8, which a column may hold, errors in their place."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_or_error(value) for value in column]


def _records(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        rows = (batch.slice(number, 1) for number in range(batch.num_rows))
        return [_or_error(row, first=True) for row in rows]


def _or_error(value: Any, *, first: bool = False) -> Any:
    try:
        return value.to_pylist()[0] if first else value.as_py()
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start}")


def _columns(schema: Any, source: Source, selection: Selection) -> list[str]:
    """The names of the columns to read; DataError for one that is absent, or text that is none."""
    types = _pyarrow("types")
    for name in selection.columns:
        kind = _type_of(schema, name)
        if kind is None:
            raise DataError(f"{label(source)}: {NoSuchField(name, schema.names)}")
        if name == selection.field and not _is_text(types, kind):
            raise DataError(
                f'{label(source)}: its field "{name}" is {shorten(kind)}, not a text; name one '
                f"with one text a row with --field: {', '.join(schema.names)}"
            )
    return list(selection.columns)


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_view = getattr(types, "is_string_view", lambda _: False)
    return types.is_string(kind) or types.is_large_string(kind) or is_view(kind)


def _type_of(schema: Any, name: str) -> Any:
    """The type of a field; with dots, of one in a struct. None where there is none."""
    if name in schema.names:
        return schema.field(name).type
    types = _pyarrow("types")
    first, *rest = name.split(".")
    if first not in schema.names:
        return None
    kind = schema.field(first).type
    for part in rest:
        if not types.is_struct(kind) or kind.get_field_index(part) < 0:
            return kind if types.is_list(kind) or types.is_large_list(kind) else None
        kind = kind.field(part).type
    return kind


def _top(schema: Any, name: str) -> str:
    return name if name in schema.names else name.partition(".")[0]


@contextlib.contextmanager
def _arrow_errors(source: Source) -> Iterator[None]:
    """What pyarrow finds wrong with a file, in one line."""
    library = _pyarrow("lib")
    try:
        yield
    except library.ArrowException as error:
        raise DataError(
            f"{label(source)}: not a sound {source.kind} file ({what_it_says(error, source)}); "
            "copy it again, or leave it out"
        ) from None
    except OSError as error:  # pyarrow's own word for damaged data
        raise DataError(
            f"{label(source)}: cannot be read as {source.kind} ({what_it_says(error, source)}); "
            "copy it again, or leave it out"
        ) from None


def _pyarrow(part: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"pyarrow.{part}")
    except ImportError:
        raise DataError(
            "reading .parquet and .arrow needs the package pyarrow; install it with: "
            "python -m pip install pyarrow"
        ) from None
