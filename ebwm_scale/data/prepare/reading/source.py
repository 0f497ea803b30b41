"""A source: one file to read, local or remote, or a part of one; its kind follows from its name.

news.jsonl.zst   kind "lines", compression "zst"
wiki.parquet     kind "parquet"
shard-0.tgz      kind "tar", compression "gz"
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

PROSE = "prose"
LINES = "lines"
JSON = "json"
COMMAS = "csv"
TABS = "tsv"
PARQUET = "parquet"
ARROW = "arrow"
TAR = "tar"

SUFFIXES = {
    ".txt": PROSE,
    ".md": PROSE,
    ".rst": PROSE,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": JSON,
    ".csv": COMMAS,
    ".tsv": TABS,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
    ".tar": TAR,
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
_TARS = {".tgz": "gz", ".tbz2": "bz2", ".txz": "xz", ".tzst": "zst"}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


@dataclass(frozen=True)
class Source:
    """Where documents are read from.

    name: relative to the input it was found in, for the names of documents. place: path or URL.
    stamp: what changes when the file does. given: by name, and not found in a folder. part: (first,
    end) in bytes of lines, or in row groups; None for the whole. content: of a member of an
    archive, which has no place of its own.
    """

    name: str
    place: str
    kind: str
    compression: str = ""
    size: int = 0
    stamp: str = ""
    given: bool = False
    part: tuple[int, int] | None = None
    content: bytes | None = field(default=None, repr=False)

    @property
    def identity(self) -> list:
        """What tells this source from any other, and from an earlier state of itself."""
        return [
            self.name,
            self.place,
            self.kind,
            self.compression,
            self.size,
            self.stamp,
            self.part,
        ]


def kind_by_name(name: str) -> tuple[str, str] | None:
    """(kind, compression) of a file, None where its name says nothing of what is read."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in _TARS:
        return TAR, _TARS[suffix]
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = PurePosixPath(path.stem).suffix.lower()
    kind = SUFFIXES.get(suffix)
    return None if kind is None else (kind, compression)


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def patterns() -> str:
    """The kinds that are read, for messages."""
    plain = ", ".join("*" + suffix for suffix in SUFFIXES)
    return f"{plain} (each also with {', '.join(dict.fromkeys(COMPRESSIONS))})"
