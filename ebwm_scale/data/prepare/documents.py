"""Documents: what the input files and folders hold, and which split each document belongs to.

A text file is one document, a .jsonl file has one document per line (field "text"). A document is
known by the hash of its content; the split and the order follow from that hash and the seed alone.
So moving, renaming or adding files never moves a document to the other split, and two copies of a
text are never on both sides. Documents are scanned once and read again when they are needed:
memory is proportional to their number, not to their size.

What is no document is said: files of other kinds, by kind and number; files and lines that cannot
be read, by name; texts of which nothing could be seen, by number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.data.walking import Report, walk_files

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz")
# Holds many documents, or none: never to be taken as one document of prose.
TABLES = (".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".pkl", ".npy")
_SHOWN_KINDS = 10

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
    """Where a document is and what it is; `read()` returns its text."""

    name: str  # relative to the input it was found in, with #line for .jsonl
    path: Path
    offset: int  # of its bytes in the file
    size: int
    digest: str  # sha256 of the text, hex

    def read(self) -> str:
        """The text; DataError if it is not what was scanned."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = _text(file.read(self.size), self.path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.name}: cannot be read again ({error}); leave the input alone while it is "
                "used"
            ) from None
        if _digest(text) != self.digest:
            raise DataError(
                f"{self.name}: changed while it was used; leave the input alone and run the "
                "command again"
            )
        return text


def find_documents(inputs: Sequence[str | Path], *, report: Report = print) -> list[Document]:
    """All documents with visible text in the files and folders (recursive), sorted by content hash.

    What is left out is reported, in one line for each file, or for all of a kind. Raises DataError
    for inputs that do not exist, for a named file of another kind, for a cycle of linked folders,
    and when no document is left.
    """
    documents: list[Document] = []
    left_out = _LeftOut()
    seen: set[Path] = set()
    for name, path in _files([Path(i) for i in inputs], left_out, report):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            documents += _documents_of_file(name, path, left_out, report)
        except (OSError, ValueError) as error:
            report(f"warning: {printable(path)}: skipped: {error}")
            left_out.num_unreadable += 1
    if not documents:
        where = ", ".join(printable(i) for i in inputs) or "no input"
        raise DataError(
            f"{where}: no text found ({left_out.nothing_but(len(seen))}); looked for "
            f"{_patterns()}: give files or folders with UTF-8 text"
        )
    for line in left_out.lines():
        report(line)
    return sorted(documents, key=lambda d: (d.digest, d.name))


class Splittable(Protocol):
    """What split_documents needs of a document, or of a video."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=Splittable)


def split_documents(
    documents: Sequence[AnyDocument], *, validation_fraction: float, seed: int
) -> dict[str, list[AnyDocument]]:
    """{"train": [...], "validation": [...]}, each in the shuffled order in which it is packed.

    A document is in validation when the hash of (seed, content) falls below validation_fraction; if
    that leaves a side empty, the lowest (highest) hash moves there. Raises DataError with fewer
    than 2 different documents.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation fraction is {validation_fraction}: must lie between 0 and 1, for example "
            "0.05"
        )
    draws: dict[str, tuple[int, int]] = {}
    for document in documents:
        drawn = hashlib.sha256(f"{seed}:{document.digest}".encode()).digest()
        draws[document.digest] = (
            int.from_bytes(drawn[:8], "big"),
            int.from_bytes(drawn[8:16], "big"),
        )
    if len(draws) < 2:
        raise DataError(
            f"{len(draws)} different documents: the validation split is made of whole documents, "
            "so at least 2 are needed; cut the text into several files, or into the lines of a "
            ".jsonl file"
        )
    ranked = sorted(draws, key=lambda digest: (draws[digest][0], digest))
    num_validation = sum(draws[digest][0] < validation_fraction * 2**64 for digest in ranked)
    held_out = set(ranked[: min(max(num_validation, 1), len(ranked) - 1)])
    shuffled = sorted(documents, key=lambda d: (draws[d.digest][1], d.digest, d.name))
    return {
        "train": [d for d in shuffled if d.digest not in held_out],
        "validation": [d for d in shuffled if d.digest in held_out],
    }


def digest_of(documents: Sequence[Document]) -> str:
    """One sha256 (hex) over the contents of a set of documents; names and places do not matter."""
    return hashlib.sha256("\n".join(sorted(d.digest for d in documents)).encode()).hexdigest()


@dataclass
class _LeftOut:
    """What was found and is no document."""

    kinds: Counter[str] = field(default_factory=Counter)  # of files that are not read
    num_unreadable: int = 0  # files
    num_invisible: int = 0  # documents
    first_invisible: str = ""

    def invisible(self, name: str) -> None:
        self.first_invisible = self.first_invisible or name
        self.num_invisible += 1

    def lines(self) -> Iterator[str]:
        if self.kinds:
            yield f"ignored: {self._other_kinds()}"
        if self.num_invisible:
            yield (
                f"ignored: {self.num_invisible} documents of nothing but white space or zero-width "
                f"characters, the first is {printable(self.first_invisible)}"
            )

    def nothing_but(self, num_files: int) -> str:
        """What there is where there is no text."""
        found = []
        if num_files:
            found.append(
                f"{num_files} files, {self.num_unreadable} of them not readable as UTF-8 text, "
                "the others empty"
            )
        if self.kinds:
            found.append(self._other_kinds())
        return "; ".join(found) or "no files"

    def _other_kinds(self) -> str:
        """For example "3 files of other kinds (.csv x 2, .jsonl.gz)"."""
        ranked = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        shown = [kind if count == 1 else f"{kind} x {count}" for kind, count in ranked]
        if len(shown) > _SHOWN_KINDS:
            shown[_SHOWN_KINDS:] = [f"and {len(shown) - _SHOWN_KINDS} other kinds"]
        return f"{self.kinds.total()} files of other kinds ({', '.join(shown)})"


def kind_of(path: Path) -> str:
    """The kind of a file by its name: ".csv", ".jsonl.gz", "no suffix"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not suffixes or not re.fullmatch(r"\.[a-z0-9_+-]{1,12}", suffixes[-1]):
        return "no suffix"
    inner = suffixes[-2] if len(suffixes) > 1 else ""
    if suffixes[-1] in COMPRESSED and re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", inner):
        return inner + suffixes[-1]
    return suffixes[-1]


def _files(
    inputs: Sequence[Path], left_out: _LeftOut, report: Report
) -> Iterator[tuple[str, Path]]:
    """(name, path) of each file to read; the other kinds in folders are counted."""
    for source in inputs:
        if source.is_dir():
            for path in walk_files(source, report=report):
                if path.suffix.lower() in SUFFIXES:
                    yield path.relative_to(source).as_posix(), path
                else:
                    left_out.kinds[kind_of(path)] += 1
        elif source.is_file():
            if _is_no_prose(source):
                raise _no_prose(source, f"a {kind_of(source)} file")
            yield source.name, source
        else:
            raise DataError(
                f"{printable(source)}: no such file or folder; give files or folders with text "
                f"({_patterns()})"
            )


def _is_no_prose(path: Path) -> bool:
    """Whether a file's name says that it is packed, or that it holds a table or a list."""
    return path.suffix.lower() in (*COMPRESSED, *TABLES)


def _no_prose(path: Path, what: str) -> DataError:
    return DataError(
        f"{printable(path)}: {what} is not read: taken as prose it would be one document; unpack "
        'it, or write its documents as a .jsonl file, one {"text": "..."} a line'
    )


def _patterns() -> str:
    return ", ".join("*" + suffix for suffix in SUFFIXES)


def _documents_of_file(
    name: str, path: Path, left_out: _LeftOut, report: Report
) -> Iterator[Document]:
    if path.suffix.lower() != ".jsonl":
        content = path.read_bytes()
        text = _text(content, path)
        if path.suffix.lower() not in TEXT_SUFFIXES and _is_json(text):
            raise _no_prose(path, "a file of JSON")
        if _VISIBLE.search(text):
            yield Document(name, path, 0, len(content), _digest(text))
        else:
            left_out.invisible(name)
        return
    offset = 0
    num_bad = 0
    first_bad = ""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    text = _text(line, path)
                    if _VISIBLE.search(text):
                        digest = _digest(text)
                        yield Document(f"{name}#{number}", path, offset, len(line), digest)
                    else:
                        left_out.invisible(f"{name}#{number}")
            except ValueError as error:
                num_bad += 1
                first_bad = first_bad or f"{number} ({error})"
            offset += len(line)
    if num_bad:
        report(
            f"warning: {printable(path)}: {num_bad} lines skipped, the first is line {first_bad}"
        )


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


def _text(content: bytes, path: Path) -> str:
    """The text of a file, or of one line of a .jsonl file; ValueError says what it is not."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if path.suffix.lower() != ".jsonl":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError("not JSON") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError('not an object with a "text" field')
    try:
        value["text"].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no text") from None
    return value["text"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
