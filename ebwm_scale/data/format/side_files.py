"""The files beside a dataset's shards that give its numbers their meaning: tokenizer or encoder.

With another tokenizer every token is another piece of text, and nothing else would notice. So
whoever opens a dataset, or a run by its dataset, does it through `open_manifest`, which compares
the hashes of these files with the manifest's. A run remembers its tokenizer's hash: a dataset that
was made again with another one is not the run's (`refuse_another_tokenizer`).
"""

from __future__ import annotations

import os
from pathlib import Path

from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.format.manifest import Manifest, load_manifest


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


def refuse_another_tokenizer(config: Config, manifest: Manifest) -> None:
    """DataError if a run of this configuration was trained with another tokenizer."""
    trained_with = config.data.tokenizer_sha256
    found = getattr(manifest.content, "tokenizer_sha256", None)
    if trained_with is not None and found != trained_with:
        raise DataError(
            f"{manifest.path}: its tokenizer has sha256 {str(found)[:12]}..., the run was trained "
            f"with {trained_with[:12]}... (data.tokenizer_sha256): name a dataset of the run's own "
            "tokenizer with --data, or for a new run leave the key out"
        )


def side_file_problems(manifest: Manifest) -> list[str]:
    """One line for each such file that is missing, cannot be read, or is another one."""
    problems = []
    for path, expected in manifest.content.files().items():
        if not os.path.isfile(path):
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
