"""Where episodes come from: a recording, or files of others.

    a recording     recording.py    (package gymnasium)
    Minari          minari.py       (minari)
    LeRobot         lerobot.py      (pyarrow, av)
    HDF5, .npz      arrays.py       (h5py)

Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.prepare.worlds.columns import RawEpisode
from ebwm_scale.data.walking import Report, walk_files

FRAMES = "frames"
OPTIONAL = ("reward", "terminated")


@dataclass(frozen=True)
class Wanted:
    """Which columns of a source are taken.

    conditions: their names. keys: name -> key of the source, where it is not the usual one; of
    frames, reward, terminated or a condition.
    """

    conditions: tuple[str, ...] = ("action",)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (FRAMES, *self.conditions, *OPTIONAL)

    def key(self, name: str, there: Sequence[str], usual: Sequence[str], where: str) -> str | None:
        """The key of a name: the one given, or the first of the usual ones that is there.

        None for an outcome that a source does not have. Raises DataError for others, which says
        what there is.
        """
        given = self.keys.get(name)
        if given is not None and given in there:
            return given
        if given is None:
            for candidate in usual:
                if candidate in there:
                    return candidate
            if name in OPTIONAL:
                return None
        asked = f"has no {given}" if given is not None else f"has no {name} by a usual name"
        option = "--camera" if name == FRAMES else f"--map {name}="
        raise DataError(f"{where}: {asked}; {option} takes one of: {', '.join(sorted(there))}")


class Source(Protocol):
    """Episodes in groups: what is read together, as episodes of one video file.

    kind, name: for the manifest. digest: sha256 of all that decides what comes out. fps: frames a
    second, None where nobody says. groups: names of episodes, in order; known without reading them.
    keys: what of the source each column is taken from.
    """

    kind: str
    name: str
    digest: str
    fps: float | None
    groups: list[list[str]]
    keys: dict[str, str]

    def read(self, group: list[str], moved: Callable[[], None]) -> Iterator[RawEpisode]:
        """The episodes of a group, one after the other; `moved` is called at each step. Raises
        DataError, naming the episode.
        """
        ...


def needed(module: str, package: str, what: str) -> ModuleType:
    """A module that only this needs; DataError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            package = error.name
        raise DataError(
            f"{what} needs the package {package}; install it with: python -m pip install "
            f'"{package}"'
        ) from None


def files_digest(files: Iterable[Path], root: Path) -> str:
    """sha256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def folder_digest(folder: Path, report: Report) -> str:
    """sha256 over all files of a folder."""
    return files_digest(walk_files(folder, report=report), folder)
