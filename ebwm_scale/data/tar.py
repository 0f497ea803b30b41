"""Walking a tar archive strictly: every member in order, or one DataError that says where the archive stops being sound.

Python's tarfile, and what is built on it, ends quietly when an archive is cut between members or a header is damaged; a reader of
training data must not. Headers are parsed by tarfile; this file only refuses what it would let pass: cuts, missing end marks, links and
devices, absolute paths and `..`, repeated names, sizes beyond the archive or beyond any sensible sample.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from ..errors import DataError

BLOCK = 512
MAX_MEMBER_BYTES = 2**30
_EXTENDED = {tarfile.XHDTYPE: "pax", tarfile.GNUTYPE_LONGNAME: "gnu", tarfile.XGLTYPE: "global"}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True)
class Member:
    """A regular file: key.field is its name, offset where its content begins in the archive."""

    key: str
    field: str
    offset: int
    content: bytes


def walk(stream: BinaryIO, name: str) -> Iterator[Member]:
    """The members of an archive that is read once, front to back. name: for messages. Raises DataError at the first unsoundness.

    All members yielded before the error are whole; the sample that was being read is not, so a caller drops it (see `samples`).
    """
    offset, seen, long_name, long_size = 0, set(), None, None
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
            raise DataError(f"{name}: offset {at}: no tar header ({error}): damaged") from None
        size = info.size if long_size is None else long_size
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise DataError(
                f"{name}: offset {at}: member {info.name!r} claims {size} bytes; a member has at most {MAX_MEMBER_BYTES}"
            )
        if info.type in _EXTENDED:
            content = _content(stream, size, name, offset, info.name)
            offset += _padded(size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(content, name, at)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else None
            continue
        path, long_name, long_size = long_name or info.name, None, None
        if info.type == tarfile.DIRTYPE:
            continue
        if info.type not in _REGULAR:
            raise DataError(
                f"{name}: offset {at}: member {path!r} is a link or a device: refused; a shard holds regular files only"
            )
        inside = PurePosixPath(path)
        if inside.is_absolute() or ".." in inside.parts or "\\" in path or "\0" in path:
            raise DataError(
                f"{name}: offset {at}: member {path!r} leads out of the archive: refused"
            )
        path = inside.as_posix()
        if path in seen:
            raise DataError(
                f"{name}: offset {at}: member {path!r} is there twice: which one is meant cannot be said"
            )
        seen.add(path)
        folder, _, file = path.rpartition("/")
        key, _, field = file.partition(".")
        yield Member(
            f"{folder}/{key}" if folder else key,
            field,
            offset,
            _content(stream, size, name, offset, path),
        )
        offset += _padded(size)


def samples(stream: BinaryIO, name: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {field: member}) of each whole sample: members of one key that follow each other.

    A sample is handed out when the next one begins or the archive ends as it should; so one that a cut leaves incomplete never is.
    Raises DataError like walk, and for a key whose members do not stand together.
    """
    key, fields, finished = None, {}, set()
    for member in walk(stream, name):
        if member.key != key:
            if key is not None:
                finished.add(key)
                yield key, fields
            if member.key in finished:
                raise DataError(
                    f"{name}: offset {member.offset}: sample {member.key} appears a second time"
                )
            key, fields = member.key, {}
        fields[member.field] = member
    if key is not None:
        yield key, fields


def _take(stream: BinaryIO, size: int, name: str, offset: int, what: str) -> bytes:
    content = stream.read(size)
    while len(content) < size:  # pipes and sockets hand out what they have
        more = stream.read(size - len(content))
        if not more:
            raise DataError(
                f"{name}: offset {offset}: the archive ends where {what} should be ({len(content)} of {size} bytes): cut off"
            )
        content += more
    return content


def _content(stream: BinaryIO, size: int, name: str, offset: int, path: str) -> bytes:
    content = _take(stream, size, name, offset, f"the content of {path!r}")
    _take(stream, _padded(size) - size, name, offset + size, f"the padding of {path!r}")
    return content


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax_records(content: bytes, name: str, offset: int) -> dict[str, str]:
    records, rest = {}, content
    try:
        while rest:
            length, _, _ = rest.partition(b" ")
            record, rest = rest[len(length) + 1 : int(length) - 1], rest[int(length) :]
            key, _, value = record.partition(b"=")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            if int(length) < 5:
                raise ValueError(f"a record of {int(length)} bytes")
        if "size" in records and int(records["size"]) < 0:
            raise ValueError("a negative size")
    except ValueError as error:
        raise DataError(f"{name}: offset {offset}: damaged extended header ({error})") from None
    return records
