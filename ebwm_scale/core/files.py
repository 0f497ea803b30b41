"""Reading files: their hashes, and small ones whole."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_hashes(paths: list[Path]) -> list[str | OSError]:
    """file_sha256 of several files, or why one cannot be read.

    In parallel threads: hashing releases the interpreter lock.
    """

    def hash_or_error(path: Path) -> str | OSError:
        try:
            return file_sha256(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_or_error, paths))


def read_small(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    OSError where it cannot be read, and for what is no regular file: a named pipe would be waited
    for, a device may never end. ValueError for a larger one.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > most:
        raise ValueError(f"it has {status.st_size} bytes, at most {most} are read")
    return path.read_bytes()
