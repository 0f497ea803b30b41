"""Documents: what the input files and folders hold, and which split each document belongs to.

A text file is one document, a .jsonl file has one document per line (field "text"). A document is known by the hash of
its content; the split and the order follow from that hash and the seed alone. So moving, renaming or adding files never
moves a document to the other split, and two copies of a text are never on both sides. Documents are scanned once and
read again when they are needed: memory is proportional to their number, not to their size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
Report = Callable[[str], None]


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
                f"{self.name}: cannot be read again ({error}); leave the input alone while it is used"
            ) from None
        if _digest(text) != self.digest:
            raise DataError(
                f"{self.name}: changed while it was used; leave the input alone and run the command again"
            )
        return text


def find_documents(inputs: Sequence[str | Path], *, report: Report = print) -> list[Document]:
    """All documents with any text in the given files and folders (recursive), sorted by content hash.

    Files that are not UTF-8 and lines that are not JSON objects with a text are skipped, each with one reported line.
    Raises DataError for inputs that do not exist and when no document is left.
    """
    documents: list[Document] = []
    num_skipped = 0
    seen: set[Path] = set()
    for name, path in _files([Path(i) for i in inputs]):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            documents += _documents_of_file(name, path, report)
        except (OSError, ValueError) as error:
            report(f"warning: {path}: skipped: {error}")
            num_skipped += 1
    if not documents:
        where = ", ".join(str(i) for i in inputs) or "no input"
        found = (
            f"{len(seen)} files, {num_skipped} of them not readable as UTF-8 text, the others empty"
            if seen
            else "no such files"
        )
        raise DataError(
            f"{where}: no text found ({found}); looked for {', '.join('*' + s for s in SUFFIXES)}: "
            "give files or folders with UTF-8 text"
        )
    return sorted(documents, key=lambda d: (d.digest, d.name))


def split_documents(
    documents: Sequence[Document], *, validation_fraction: float, seed: int
) -> dict[str, list[Document]]:
    """{"train": [...], "validation": [...]}, each in the shuffled order in which it is packed.

    A document is in validation when the hash of (seed, content) falls below validation_fraction; if that leaves a side
    empty, the lowest (highest) hash moves there. Raises DataError with fewer than 2 different documents.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation fraction is {validation_fraction}: must lie between 0 and 1, for example 0.05"
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
            f"{len(draws)} different documents: the validation split is made of whole documents, so at least 2 are needed; "
            "cut the text into several files, or into the lines of a .jsonl file"
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


def _files(inputs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    for source in inputs:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                relative = path.relative_to(source)
                if (
                    path.suffix.lower() in SUFFIXES
                    and path.is_file()
                    and not any(part.startswith(".") for part in relative.parts)
                ):
                    yield relative.as_posix(), path
        elif source.is_file():
            yield source.name, source
        else:
            raise DataError(
                f"{source}: no such file or folder; give files or folders with text ({', '.join('*' + s for s in SUFFIXES)})"
            )


def _documents_of_file(name: str, path: Path, report: Report) -> Iterator[Document]:
    if path.suffix.lower() != ".jsonl":
        content = path.read_bytes()
        text = _text(content, path)
        if text.strip():
            yield Document(name, path, 0, len(content), _digest(text))
        return
    offset, bad_lines = 0, []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = _text(line, path) if line.strip() else ""
                if text.strip():
                    yield Document(f"{name}#{number}", path, offset, len(line), _digest(text))
            except ValueError as error:
                bad_lines.append(f"{number} ({error})")
            offset += len(line)
    if bad_lines:
        report(f"warning: {path}: {len(bad_lines)} lines skipped, the first is line {bad_lines[0]}")


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
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError('not an object with a "text" field')
    try:
        value["text"].encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no text") from None
    return value["text"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
