"""Opening sources: local files and fsspec's URLs as streams of bytes, decompressed on the way.

    file or URL -> (again where the network broke) -> .gz .zst .xz .bz2 -> bytes, front to back

A stream that ends too early, or is not what its name says, is a DataError wherever it is read.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable, shorten
from ebwm_scale.core.redaction import redacted, redacted_error
from ebwm_scale.data.prepare.reading.source import Source, is_url

_BUFFER_BYTES = 2**20
_PACKED_BYTES = 2**14  # given to zstd at a time: what comes out of it is in memory at once
_LARGEST_WINDOW = 2**31  # of zstd --long=31, in which large public dumps are packed
_ATTEMPTS = 5  # to go on with a remote file behind an error
_FIRST_WAIT_S = 0.5

# Packages of fsspec that bring no address scheme of their own with them.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "http": "aiohttp", "https": "aiohttp"}


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[BinaryIO]:
    """The source's bytes, decompressed, front to back.

    OSError when a local file cannot be opened; DataError for everything that goes wrong later.
    """
    with contextlib.ExitStack() as stack:
        raw = _open_packed(source)
        stack.callback(raw.close)
        unpacked: Any = raw
        if source.compression:
            unpacked = _UNPACKERS[source.compression](raw)
            stack.callback(unpacked.close)
        checked = io.BufferedReader(_Checked(unpacked, source), _BUFFER_BYTES)
        yield cast(BinaryIO, checked)


@contextlib.contextmanager
def open_seekable(source: Source) -> Iterator[BinaryIO]:
    """The source's bytes for a reader that jumps; a temporary copy where they cannot be sought."""
    if not source.compression:
        raw = _open_packed(source)
        if raw.seekable():
            with contextlib.closing(raw):
                yield raw
            return
        raw.close()
    with tempfile.TemporaryFile() as copy:
        with open_source(source) as stream:
            shutil.copyfileobj(stream, copy, _BUFFER_BYTES)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def label(source: Source) -> str:
    """The source in messages: its place without secrets, on one line."""
    return printable(redacted(source.place))


def what_it_says(error: BaseException, source: Source) -> str:
    """A library's words about the source, without its secrets, on one line."""
    return shorten(redacted_error(error, str(source.place)))


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it; DataError where a package is missing."""
    import fsspec

    scheme = url.partition("://")[0].lower()
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError:
        package = _PACKAGES.get(scheme, f"fsspec with {scheme}")
        raise DataError(
            f"{printable(redacted(url))}: reading {scheme}:// needs the package {package}; "
            f"install it with: python -m pip install {package}"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{printable(redacted(url))}: no such kind of address "
            f"({shorten(redacted_error(error, url))}); give a path, or an address that fsspec "
            "knows, such as s3://, gs://, hf:// or https://"
        ) from None


def remote_error(url: str, error: BaseException) -> DataError:
    """What a file system says of its failure, in one line."""
    said = f"{type(error).__name__}: {shorten(redacted_error(error, url), 160)}"
    return DataError(
        f"{printable(redacted(url))}: cannot be read ({said}); check the address, the network and "
        "the credentials"
    )


def _open_packed(source: Source) -> BinaryIO:
    """The bytes as they lie there."""
    if source.content is not None:
        return io.BytesIO(source.content)
    if is_url(source.place):
        return cast(BinaryIO, io.BufferedReader(_Remote(source.place), _BUFFER_BYTES))
    return open(source.place, "rb")


class _Remote(io.RawIOBase):
    """A remote file that is opened again, where it was, when the network breaks."""

    def __init__(self, url: str):
        self.url = url
        self.position = 0
        self._fs, self._path = file_system(url)
        self._file: Any = None
        self._attempt(self._open)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = int(self._file.seek(offset, whence))
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self._attempt(lambda: self._file.read(len(view)))
        view[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        if self._file is not None and not self.closed:
            with contextlib.suppress(Exception):  # whatever its client raises: it was only read
                self._file.close()
        super().close()

    def _open(self) -> None:
        self._file = self._fs.open(self._path, "rb")

    def _attempt(self, action: Any) -> Any:
        """What the action gives; a broken connection is made again, other errors are final."""
        wait_s = _FIRST_WAIT_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return action()
            except Exception as error:  # noqa: BLE001 (each file system raises what its client does)
                final = isinstance(error, (FileNotFoundError, PermissionError, ValueError))
                # what could not be opened at all is an address that is wrong, not a bad moment
                if final or self._file is None or attempt == _ATTEMPTS:
                    raise remote_error(self.url, error) from None
            time.sleep(wait_s)
            wait_s *= 2
            self._reopen()
        raise AssertionError("the last attempt returns or raises")

    def _reopen(self) -> None:
        with contextlib.suppress(Exception):  # the next read says what is wrong
            self._file.close()
            self._open()
            if self._file.seekable():
                self._file.seek(self.position)
                return
            left = self.position
            while left:
                skipped = len(self._file.read(min(left, _BUFFER_BYTES)))
                left -= skipped
                if not skipped:
                    return


class _Zstandard(io.RawIOBase):
    """Frames of zstd one after the other; EOFError where the last one is cut."""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise DataError(
                "reading .zst needs the package zstandard; install it with: python -m pip install "
                "zstandard"
            ) from None
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._raw = raw
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._packed:
                self._packed = self._raw.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            packed, self._packed = self._packed, b""
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame = None
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


_UNPACKERS: dict[str, Any] = {
    "gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zst": _Zstandard,
}


class _Checked(io.RawIOBase):
    """A stream whose errors name the source and say what to do."""

    def __init__(self, stream: Any, source: Source):
        self._stream, self._source = stream, source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._source.compression and self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            content = self._stream.read(len(view))
        except EOFError:
            raise DataError(
                f"{label(self._source)}: ends in the middle of its .{self._source.compression} "
                "data: truncated; copy or download it again"
            ) from None
        except (OSError, zlib.error, lzma.LZMAError) as error:
            said = what_it_says(error, self._source)
            what = f"its .{self._source.compression} data are damaged"
            if not self._source.compression:
                what = "it cannot be read"
            raise DataError(
                f"{label(self._source)}: {what} ({said}); copy or download it again"
            ) from None
        view[: len(content)] = content
        return len(content)
