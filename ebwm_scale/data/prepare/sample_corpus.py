"""The sample corpus: English documentation text (640 files, 6.1 MB) out of the source archive of
django 5.2.8.

The archive is fetched with the running interpreter's pip, its sha256 is pinned, and only
docs/**/*.txt and the licence (BSD-3-Clause) are copied out of it. Nothing in it is executed
(data/prepare/fetching.py).
"""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.fetching import Package, folder_from_package
from ebwm_scale.data.walking import Report

VERSION = "5.2.8"
ARCHIVE_NAME = f"django-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
PACKAGE = Package(
    name="django",
    version=VERSION,
    file_name=ARCHIVE_NAME,
    sha256=ARCHIVE_SHA256,
    size="10.8 MB",
    is_source=True,
    instead="skip this corpus: tools/make_text_shards.py takes any folder of text",
)


def fetch_sample_corpus(
    output: str | Path,
    *,
    archive: str | Path | None = None,
    archive_sha256: str = ARCHIVE_SHA256,
    report: Report = print,
) -> Path:
    """The folder with the corpus, made if it is not there yet; then nothing is downloaded.

    archive: a copy of django-5.2.8.tar.gz, or the folder it is in; default: downloaded.
    archive_sha256: the only content accepted.  Raises DataError when the archive cannot be had, has
    another hash or holds unsafe paths.
    """
    output = Path(output).resolve()
    facts = folder_from_package(
        output,
        dataclasses.replace(PACKAGE, sha256=archive_sha256),
        archive=archive,
        ours=("docs", "LICENSE"),
        extract=_extract,
        is_whole=_is_whole,
        report=report,
    )
    if facts is not None:
        report(
            f"{output}: {facts['num_files']} documents, {facts['num_bytes'] / 1e6:.2f} MB of text "
            f"from {ARCHIVE_NAME} (BSD-3-Clause)"
        )
    return output


def _extract(archive: Path, folder: Path) -> dict[str, Any]:
    num_files, num_bytes = extract_documents(archive, folder)
    licence = "BSD-3-Clause, see LICENSE"
    return {"num_files": num_files, "num_bytes": num_bytes, "licence": licence}


def _is_whole(folder: Path, marker: dict[str, Any]) -> bool:
    return len(list((folder / "docs").rglob("*.txt"))) == marker["num_files"]


def extract_documents(archive: Path, folder: Path) -> tuple[int, int]:
    """Copy docs/**/*.txt and LICENSE of a source archive into a folder; (files, bytes).

    Links and other members are ignored.

    Raises DataError for a path that leaves the archive's own folder, for a damaged archive, and
    when no text is inside.
    """
    num_files = num_bytes = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name:
                    raise DataError(
                        f"{archive}: holds the path {member.name!r}, which leads out of the "
                        "archive: refused; nothing was extracted"
                    )
                inside = PurePosixPath(*path.parts[1:])
                is_text = inside.parts[:1] == ("docs",) and inside.suffix == ".txt"
                file = tar.extractfile(member) if member.isfile() else None
                if file is None or not (is_text or str(inside) == "LICENSE"):
                    continue
                content = file.read()
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                num_files, num_bytes = num_files + is_text, num_bytes + len(content) * is_text
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{archive}: cannot be extracted: {error}; fetch it again, or train on any folder of "
            "text of your own"
        ) from None
    if not num_files:
        raise DataError(
            f"{archive}: no docs/**/*.txt inside; expected the source archive {ARCHIVE_NAME}"
        )
    return num_files, num_bytes
