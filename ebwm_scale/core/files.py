"""Hashes of files."""

from __future__ import annotations

import hashlib
import os
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
