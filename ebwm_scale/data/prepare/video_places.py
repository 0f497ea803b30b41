"""Where the bytes of a video or picture lie: a file of its own, or a part of a .tar or .zip.

    clips.tar   00017.mp4  00017.json  00017.txt     each: where it begins, how long it is
    clips.zip   a/b.mp4                              each: its name

A decoder seeks, so what lies in an archive is copied out for as long as it is decoded. Nothing is
written under a name that an archive gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable, shorten
from ebwm_scale.data.format import tar

_ARCHIVES = (".tar", ".zip")
_PACKED_TARS = (".tgz", ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2")
_READ_BYTES = 2**20
_MAX_MEMBER_BYTES = 2**40
# Deflate packs zeros to 1/1000, and videos not at all: a member that grows by more is an attack on
# the disk.
_MAX_GROWTH = 200
_NOT_OURS = "__MACOSX"
_ENCRYPTED = 0x1
# What zipfile raises for a member that is damaged, encrypted, or packed in a way it does not know.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Place:
    """A file, or a member of the archive at `path`: of a .zip by its name, of a .tar by its range
    of bytes.
    """

    path: Path
    member: str = ""
    offset: int | None = None
    size: int = 0

    def __str__(self) -> str:
        return printable(self.path / self.member if self.member else self.path)

    @property
    def shown_path(self) -> Path:
        """For messages; of a member no real path."""
        return self.path / self.member if self.member else self.path

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The content, front to back; OSError where it cannot be read, also while reading."""
        with contextlib.ExitStack() as stack:
            file: BinaryIO = stack.enter_context(self.path.open("rb"))
            if self.offset is not None:
                file.seek(self.offset)
                yield cast(BinaryIO, io.BufferedReader(_Part(file, self.size)))
                return
            if not self.member:
                yield file
                return
            try:
                archive = stack.enter_context(zipfile.ZipFile(file))
                yield cast(BinaryIO, stack.enter_context(archive.open(self.member)))
            except (*_UNREADABLE, KeyError, NotImplementedError) as error:
                raise OSError(f"cannot be unpacked: {shorten(str(error))}") from None

    def read(self, limit: int) -> bytes:
        """The whole content; OSError where it cannot be read, or is longer than limit."""
        with self.open() as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(f"has more than {limit:,} bytes")
        return content

    def sha256(self) -> str:
        """Of the content; OSError where it cannot be read."""
        digest = hashlib.sha256()
        with self.open() as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def as_file(self, folder: Path, moved: Callable[[], None]) -> Iterator[Path]:
        """A file with this content: itself, or a copy in `folder` while the block lasts."""
        if not self.member:
            yield self.path
            return
        copy = folder / f".unpacked-{os.getpid()}{PurePosixPath(self.member).suffix.lower()}"
        try:
            with self.open() as file, copy.open("wb") as target:
                while block := file.read(_READ_BYTES):
                    target.write(block)
                    moved()
            yield copy
        finally:
            copy.unlink(missing_ok=True)


class _Part(io.RawIOBase):
    """So many bytes of a file from where it stands; OSError where the file ends before."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: self._left]
        if not view:
            return 0
        content = self._file.read(len(view))
        if not content:
            raise OSError("its archive has become shorter")
        view[: len(content)] = content
        self._left -= len(content)
        return len(content)


def is_archive(path: Path) -> bool:
    """Whether a file is one by its name; `members` refuses a packed tar."""
    return path.name.lower().endswith(_ARCHIVES + _PACKED_TARS)


def members(path: Path, report: Callable[[str], None]) -> dict[str, Place]:
    """Name -> place of each file in an archive; names that begin with a dot are passed over.

    What cannot be used is reported: the rest of a tar that is cut or damaged, and members of a zip
    that are encrypted or absurdly packed. Raises DataError for what is no archive.
    """
    if path.name.lower().endswith(_PACKED_TARS):
        raise DataError(f"{printable(path)}: a packed tar is not read: unpack it to a .tar")
    read = _of_zip if path.suffix.lower() == ".zip" else _of_tar
    found = read(path, report)
    return {name: place for name, place in found.items() if not _is_hidden(name)}


def _of_tar(path: Path, report: Callable[[str], None]) -> dict[str, Place]:
    found: dict[str, Place] = {}
    try:
        with path.open("rb") as file:
            walked = tar.walk(file, str(path), wanted=lambda _: False, largest=_MAX_MEMBER_BYTES)
            for member in walked:
                name = f"{member.key}.{member.field}" if member.field else member.key
                found[name] = Place(path, name, member.offset, member.size)
    except DataError as error:
        if not found:
            raise
        report(f"warning: {error}; the {len(found)} files before it are used")
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    return found


def _of_zip(path: Path, report: Callable[[str], None]) -> dict[str, Place]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (*_UNREADABLE, OSError) as error:
        said = shorten(str(error))
        raise DataError(f"{printable(path)}: is no zip that can be read: {said}") from None
    found: dict[str, Place] = {}
    for entry in entries:
        problem = None
        if entry.is_dir():
            continue
        if entry.flag_bits & _ENCRYPTED:
            problem = "is encrypted"
        elif entry.file_size > _MAX_GROWTH * entry.compress_size + _READ_BYTES:
            problem = f"claims {entry.file_size:,} bytes, packed into {entry.compress_size:,}"
        elif entry.filename in found:
            problem = "is there twice: the first is used"
        place = Place(path, entry.filename, None, entry.file_size)
        if problem is None:
            found[entry.filename] = place
        else:
            report(f"warning: {place}: skipped: {problem}")
    return found


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = [part for part in parts if part.startswith(".") and part != ".."]
    return bool(hidden) or _NOT_OURS in parts
