"""Which source a text names.

    minari:PATH     a Minari dataset
    lerobot:PATH    a LeRobot dataset, v2.x or v3
    hdf5:PATH       episodes in HDF5 files
    npz:PATH        episodes in .npz files

Without a word in front, the path is looked at.
"""

from __future__ import annotations

from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.worlds.arrays import ArraySource
from ebwm_scale.data.prepare.worlds.lerobot import LeRobotSource
from ebwm_scale.data.prepare.worlds.minari import MinariSource
from ebwm_scale.data.prepare.worlds.source import Source, Wanted
from ebwm_scale.data.walking import Report

KINDS = ("minari", "lerobot", "hdf5", "npz")


def open_source(text: str, wanted: Wanted, *, report: Report = print) -> Source:
    """The source that a text names; DataError for what is none."""
    word, separator, rest = text.partition(":")
    if separator and word in KINDS:
        kind, path = word, Path(rest)
    else:
        kind, path = None, Path(text)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; give minari:PATH, lerobot:PATH, hdf5:PATH or npz:PATH"
        )
    kind = kind or _kind_of(path)
    if kind == "lerobot":
        return LeRobotSource(path, wanted)
    if kind == "minari":
        return MinariSource(path, wanted)
    return ArraySource(path, wanted, kind, report=report)


def _kind_of(path: Path) -> str:
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if any((path / inside).is_file() for inside in ("metadata.json", "data/metadata.json")):
        return "minari"
    suffixes = {p.suffix for p in ([path] if path.is_file() else path.iterdir())}
    if suffixes & {".h5", ".hdf5"}:
        return "hdf5"
    if ".npz" in suffixes:
        return "npz"
    raise DataError(
        f"{path}: no episodes found: no meta/info.json (LeRobot), metadata.json (Minari), *.h5 or "
        "*.hdf5, or *.npz"
    )
