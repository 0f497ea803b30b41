"""Walking a tar archive strictly: every member in order, or one DataError that says where the
archive stops being sound.

Python's tarfile, and what is built on it, ends quietly when an archive is cut between members or a
header is damaged; a reader of training data must not. Headers are parsed by tarfile; this file only
refuses what it would let pass: cuts, missing end marks, links and devices, absolute paths and `..`,
repeated names, sizes beyond the archive or beyond any sensible sample. Time and memory are
proportional to the bytes read, and no more than one sample is held.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten, shown

BLOCK = 512
MAX_MEMBER_BYTES = 2**30  # of a member, and of all members of a sample together
MAX_EXTENDED_BYTES = 2**20  # of a header that holds a long name or other attributes
_READ_BYTES = 2**20
_EXTENDED = {tarfile.XHDTYPE: "pax", tarfile.GNUTYPE_LONGNAME: "gnu", tarfile.XGLTYPE: "global"}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True)
class Member:
    """A regular file: key.field is its name, offset where its `size` bytes begin in the archive."""

    key: str
    field: str
    offset: int
    content: bytes
    size: int


def walk(
    stream: BinaryIO,
    name: str,
    *,
    wanted: Callable[[str], bool] = lambda path: True,
    largest: int = MAX_MEMBER_BYTES,
) -> Iterator[Member]:
    """The members of an archive that is read once, front to back.

    name: for messages. wanted: whether a member of that path is held; others are read past, and
    given without content. largest: bytes that a member may have. Raises DataError at the first
    unsoundness.

    All members yielded before the error are whole; the sample that was being read is not, so a
    caller drops it (see `samples`).
    """
    offset = 0
    seen = set()
    long_name = None
    long_size = None
    while True:
        at = offset
        header = _take(stream, BLOCK, name, at, "a header")
        offset += BLOCK
        if not any(header):
            if any(_take(stream, BLOCK, name, offset, "the end mark")):
                raise DataError(f"{name}: offset {at}: one zero block inside the archive: damaged")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(
                f"{name}: offset {at}: no tar header ({shorten(str(error))}): damaged"
            ) from None
        extended = info.type in _EXTENDED
        size = info.size if extended or long_size is None else long_size
        allowed = MAX_EXTENDED_BYTES if extended else largest
        if not 0 <= size <= allowed:
            what = "an extended header" if extended else "a member"
            raise DataError(
                f"{name}: offset {at}: member {shown(info.name)} claims {size} bytes; {what} has "
                f"at most {allowed}"
            )
        if extended:
            content = _content(stream, size, name, offset, info.name)
            offset += _padded(size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(content, name, at)
                long_name = records.get("path", long_name)
                long_size = _number(records["size"]) if "size" in records else None
            continue
        path = long_name or info.name
        long_name = None
        long_size = None
        if info.type == tarfile.DIRTYPE:
            continue
        if info.type not in _REGULAR:
            raise DataError(
                f"{name}: offset {at}: member {shown(path)} is a link or a device: refused; a "
                "shard holds regular files only"
            )
        inside = PurePosixPath(path)
        if inside.is_absolute() or ".." in inside.parts or "\\" in path or "\0" in path:
            raise DataError(
                f"{name}: offset {at}: member {shown(path)} leads out of the archive: refused"
            )
        if not path.isprintable() and any(ord(c) < 32 or ord(c) == 127 for c in path):
            raise DataError(
                f"{name}: offset {at}: member {shown(path)} has control characters: refused"
            )
        path = inside.as_posix()
        if path in seen:
            raise DataError(
                f"{name}: offset {at}: member {shown(path)} is there twice: which one is meant "
                "cannot be said"
            )
        seen.add(path)
        folder, _, file = path.rpartition("/")
        key, _, field = file.partition(".")
        read = _content if wanted(path) else _no_content
        yield Member(
            f"{folder}/{key}" if folder else key,
            field,
            offset,
            read(stream, size, name, offset, path),
            size,
        )
        offset += _padded(size)


def samples(stream: BinaryIO, name: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {field: member}) of each whole sample: members of one key that follow each other.

    A sample is handed out when the next one begins or the archive ends as it should; so one that a
    cut leaves incomplete never is. Raises DataError like walk, and for a key whose members do not
    stand together.
    """
    key = None
    fields = {}
    finished = set()
    held = 0
    for member in walk(stream, name):
        held = len(member.content) + (held if member.key == key else 0)
        if held > MAX_MEMBER_BYTES:
            raise DataError(
                f"{name}: offset {member.offset}: sample {shown(member.key)} has more than "
                f"{MAX_MEMBER_BYTES} bytes: refused"
            )
        if member.key != key:
            if key is not None:
                finished.add(key)
                yield key, fields
            if member.key in finished:
                raise DataError(
                    f"{name}: offset {member.offset}: sample {shown(member.key)} appears a second "
                    "time"
                )
            key, fields = member.key, {}
        fields[member.field] = member
    if key is not None:
        yield key, fields


def _take(stream: BinaryIO, size: int, name: str, offset: int, what: str) -> bytes:
    """Exactly `size` bytes; pipes and sockets hand out what they have."""
    pieces, got = [], 0
    while got < size:
        piece = stream.read(min(size - got, _READ_BYTES))
        if not piece:
            raise DataError(
                f"{name}: offset {offset}: the archive ends where {what} should be ({got} of "
                f"{size} bytes): cut off"
            )
        pieces.append(piece)
        got += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _content(stream: BinaryIO, size: int, name: str, offset: int, path: str) -> bytes:
    content = _take(stream, size, name, offset, f"the content of {shown(path)}")
    _take(stream, _padded(size) - size, name, offset + size, f"the padding of {shown(path)}")
    return content


def _no_content(stream: BinaryIO, size: int, name: str, offset: int, path: str) -> bytes:
    """Past the content of a member, which must be whole all the same."""
    left = _padded(size)
    while left:
        piece = min(left, _READ_BYTES)
        _take(stream, piece, name, offset + _padded(size) - left, f"the content of {shown(path)}")
        left -= piece
    return b""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax_records(content: bytes, name: str, offset: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    records, at = {}, 0
    try:
        while at < len(content):
            space = content.index(b" ", at, at + 20)
            end = at + _number(content[at:space].decode("ascii"))
            if not space < end <= len(content) or content[end - 1 : end] != b"\n":
                raise ValueError(f"a record at byte {at} that does not end in it")
            key, equals, value = content[space + 1 : end - 1].partition(b"=")
            if not key or not equals:
                raise ValueError(f"a record at byte {at} without a key")
            if key.startswith(b"GNU.sparse"):
                raise ValueError("a file with holes, whose content is not its own")
            records[key.decode("utf-8")] = value.decode("utf-8", "surrogateescape")
            at = end
        _number(records.get("size", "0"))
    except ValueError as error:
        reason = shorten(str(error))
        raise DataError(f"{name}: offset {offset}: damaged extended header ({reason})") from None
    return records


def _number(text: str) -> int:
    """Decimal digits and nothing else, which int() alone would let pass."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ValueError(f"{shown(text)} is no number")
    return int(text)
