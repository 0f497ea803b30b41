"""The files beside a dataset's shards that give its numbers their meaning: tokenizer or encoder.

With another tokenizer every token is another piece of text, and nothing else would notice. So
whoever opens a dataset, or a run by its dataset, does it through `open_manifest`, which compares
the hashes of these files with the manifest's.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .manifest import Manifest, file_sha256, load_manifest


def open_manifest(path: str | Path) -> Manifest:
    """A manifest whose tokenizer or encoder file is the one it was made with; else DataError."""
    manifest = load_manifest(path)
    problems = side_file_problems(manifest)
    if problems:
        raise DataError(
            f"{problems[0]}; bring back the file the dataset was made with, or copy the whole "
            "dataset again"
        )
    return manifest


def side_file_problems(manifest: Manifest) -> list[str]:
    """One line for each such file that is missing, cannot be read, or is another one."""
    problems = []
    for path, expected in manifest.content.files().items():
        if not path.is_file():
            problems.append(f"{path}: is missing")
            continue
        try:
            found = file_sha256(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
            continue
        if found != expected:
            problems.append(
                f"{path}: sha256 is {found[:12]}..., the manifest says {expected[:12]}...: damaged "
                "or another one"
            )
    return problems
