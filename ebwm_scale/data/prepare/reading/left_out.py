"""What was found and is no document: counted while reading, said at the end, never dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ebwm_scale.core.plain_text import printable

_SHOWN_KINDS = 10
_SHOWN_WARNINGS = 100  # lines about single files; more are counted
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz")


@dataclass
class LeftOut:
    """Of one input, or of many once they are added up."""

    kinds: Counter[str] = field(default_factory=Counter)  # of files that are not read
    warnings: list[str] = field(default_factory=list)  # one line for each file
    num_warnings: int = 0
    num_files: int = 0  # that were read, or should have been
    num_unreadable: int = 0  # files
    num_invisible: int = 0  # documents
    first_invisible: str = ""
    num_filtered: int = 0  # records for which a filter does not hold
    num_unfilterable: int = 0  # records without the value that a filter looks at
    first_unfilterable: str = ""
    num_bytes: int = 0  # read, as they lie on disk

    def warn(self, line: str) -> None:
        self.num_warnings += 1
        if len(self.warnings) < _SHOWN_WARNINGS:
            self.warnings.append(line)

    def unreadable(self, place: str, reason: object) -> None:
        self.num_unreadable += 1
        self.warn(f"warning: {printable(place)}: skipped: {reason}")

    def invisible(self, name: str) -> None:
        self.first_invisible = self.first_invisible or name
        self.num_invisible += 1

    def unfilterable(self, name: str) -> None:
        self.first_unfilterable = self.first_unfilterable or name
        self.num_unfilterable += 1

    def add(self, other: LeftOut) -> None:
        """Take in what was left out of another input, which comes after this one."""
        self.kinds += other.kinds
        room = _SHOWN_WARNINGS - len(self.warnings)
        self.warnings += other.warnings[: max(room, 0)]
        self.first_invisible = self.first_invisible or other.first_invisible
        self.first_unfilterable = self.first_unfilterable or other.first_unfilterable
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def lines(self) -> Iterator[str]:
        """What is said of it."""
        yield from self.warnings
        if self.num_warnings > len(self.warnings):
            yield f"warning: {self.num_warnings - len(self.warnings)} more warnings of this kind"
        if self.kinds:
            yield f"ignored: {self.other_kinds()}"
        if self.num_filtered:
            yield f"ignored: {self.num_filtered} records for which the filters do not hold"
        if self.num_unfilterable:
            yield (
                f"ignored: {self.num_unfilterable} records without the value that a filter looks "
                f"at, the first is {printable(self.first_unfilterable)}"
            )
        if self.num_invisible:
            yield (
                f"ignored: {self.num_invisible} documents of nothing but white space or zero-width "
                f"characters, the first is {printable(self.first_invisible)}"
            )

    def nothing_but(self) -> str:
        """What there is where there is no text."""
        found = []
        if self.num_files:
            found.append(
                f"{self.num_files} files, {self.num_unreadable} of them not readable as UTF-8 "
                "text, the others empty"
            )
        if self.num_filtered or self.num_unfilterable:
            found.append(f"{self.num_filtered + self.num_unfilterable} records filtered out")
        found += self.warnings[:1]
        if self.kinds:
            found.append(self.other_kinds())
        return "; ".join(found) or "no files"

    def other_kinds(self) -> str:
        """For example "3 files of other kinds (.csv x 2, .jsonl.gz)"."""
        ranked = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        shown = [kind if count == 1 else f"{kind} x {count}" for kind, count in ranked]
        if len(shown) > _SHOWN_KINDS:
            shown[_SHOWN_KINDS:] = [f"and {len(shown) - _SHOWN_KINDS} other kinds"]
        return f"{self.kinds.total()} files of other kinds ({', '.join(shown)})"

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LeftOut:
        return cls(**{**values, "kinds": Counter(values["kinds"])})


_COUNTS = (
    "num_warnings",
    "num_files",
    "num_unreadable",
    "num_invisible",
    "num_filtered",
    "num_unfilterable",
    "num_bytes",
)


def kind_of(path: PurePosixPath) -> str:
    """The kind of a file by its name: ".csv", ".jsonl.gz", "no suffix"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not suffixes or not re.fullmatch(r"\.[a-z0-9_+-]{1,12}", suffixes[-1]):
        return "no suffix"
    inner = suffixes[-2] if len(suffixes) > 1 else ""
    if suffixes[-1] in PACKED and re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", inner):
        return inner + suffixes[-1]
    return suffixes[-1]
