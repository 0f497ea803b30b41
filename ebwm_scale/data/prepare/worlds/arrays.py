"""Episodes in HDF5 or .npz files, in one of these layouts:

    flat       KEY (all steps, ...), with ep_len and ep_offset      stable-worldmodel's HDF5
    groups     NAME/KEY or data/NAME/KEY, a group for each episode  robomimic's demo_0, demo_1, ...
    one        KEY (T or T + 1, ...): an episode for each file      .npz files, a folder of them

Keys of nested groups are paths, obs/agentview_image. What is usual:

    frames      frames, pixels, images, observations, observation, obs
    action      action, actions                   proprio     proprio, observation.state, state
    reward      reward, rewards                   terminated  terminated, terminations, dones, done

Other keys are named with --map and --camera. A condition is looked for under its own name.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.prepare.worlds.columns import RawEpisode
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted, files_digest, needed
from ebwm_scale.data.walking import Report, walk_files

_USUAL = {
    FRAMES: ("frames", "pixels", "images", "observations", "observation", "obs"),
    "action": ("action", "actions"),
    "proprio": ("proprio", "observation.state", "state"),
    "reward": ("reward", "rewards"),
    "terminated": ("terminated", "terminations", "dones", "done"),
}
_SUFFIXES = {"hdf5": (".h5", ".hdf5"), "npz": (".npz",)}
_FLAT = ("ep_len", "ep_offset")


@dataclass(frozen=True)
class _Place:
    """Where an episode lies: rows of a file's arrays, below a group. end None: all rows."""

    path: Path
    group: str  # "" or "data/demo_0/"
    start: int
    end: int | None


class ArraySource:
    """See data/prepare/worlds/source.py: Source."""

    fps: float | None = None

    def __init__(self, path: Path, wanted: Wanted, kind: str, *, report: Report = print):
        self.kind = kind
        self.path = path
        self.name = path.resolve().name
        root = path.parent if path.is_file() else path
        files = [path] if path.is_file() else list(walk_files(path, report=report))
        files = [file for file in files if file.suffix in _SUFFIXES[kind]]
        if not files:
            raise DataError(f"{path}: holds no {' or '.join(_SUFFIXES[kind])} file")
        self.places: dict[str, _Place] = {}
        for file in files:
            stem = file.relative_to(root).with_suffix("").as_posix()
            for name, place in self._places(file):
                self.places["/".join(part for part in (stem, name) if part)] = place
        if not self.places:
            raise DataError(f"{path}: holds no episodes")
        first = next(iter(self.places.values()))
        with self._opened(first.path) as arrays:
            there = _keys(arrays, first.group)
        self.keys: dict[str, str] = {}
        for name in wanted.names:
            key = wanted.key(name, there, _USUAL.get(name, (name,)), str(first.path))
            if key is not None:
                self.keys[name] = key
        self.groups = [[name] for name in self.places]
        self.digest = files_digest(files, root)

    def read(self, group: list[str], moved: Callable[[], None]) -> Iterator[RawEpisode]:
        for name in group:
            place = self.places[name]
            columns = {}
            with self._opened(place.path) as arrays:
                there = _keys(arrays, place.group)
                for column, key in self.keys.items():
                    if key not in there:
                        raise DataError(
                            f"{place.path}: {name}: has no {key}, which the first episode has; it "
                            f"has {', '.join(sorted(there))}"
                        )
                    columns[column] = self._rows(arrays, place, key, name)
                    moved()
            yield RawEpisode(name, columns.pop(FRAMES), columns)

    def _rows(self, arrays: Mapping[str, Any], place: _Place, key: str, name: str) -> np.ndarray:
        try:
            array = arrays[place.group + key]
            if place.end is not None and len(array) < place.end:
                raise DataError(
                    f"{place.path}: {name}: {key} has {len(array)} rows, its episodes go to "
                    f"{place.end}"
                )
            return np.asarray(array[place.start : place.end])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            plugin = "; if it is compressed, install hdf5plugin" if self.kind == "hdf5" else ""
            raise DataError(
                f"{place.path}: {name}: {key} cannot be read: {shorten(error, 200)}{plugin}"
            ) from None

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[Mapping[str, Any]]:
        """The arrays of a file by their keys."""
        try:
            if self.kind == "npz":
                opened: Any = np.load(path, allow_pickle=False)
            else:
                h5py: Any = needed("h5py", "h5py", "reading HDF5 files")
                with contextlib.suppress(ImportError):
                    import hdf5plugin  # noqa: F401 (compression of stable-worldmodel's files)
                opened = h5py.File(path, "r")
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be opened: {shorten(error, 200)}") from None
        with opened as file:
            yield file if self.kind == "npz" else _Hdf5(file)

    def _places(self, path: Path) -> list[tuple[str, _Place]]:
        """(name, place) of the episodes of a file, in order."""
        with self._opened(path) as arrays:
            keys = list(arrays)
            if all(key in keys for key in _FLAT):
                lengths, offsets = (np.asarray(arrays[key][()]).reshape(-1) for key in _FLAT)
                return self._flat(path, lengths, offsets)
            if any("/" not in key for key in keys):
                return [("", _Place(path, "", 0, None))]
            # What stands beside robomimic's data/, masks for example, is no episode.
            inside = [key for key in keys if key.startswith("data/") and key.count("/") > 1]
            below = "data/" if inside else ""
            names = dict.fromkeys(key.removeprefix(below).split("/")[0] for key in inside or keys)
            named = [f"{below}{name}/" for name in sorted(names, key=_natural)]
            return [(group.split("/")[-2], _Place(path, group, 0, None)) for group in named]

    def _flat(
        self, path: Path, lengths: np.ndarray, offsets: np.ndarray
    ) -> list[tuple[str, _Place]]:
        kinds = lengths.dtype.kind + offsets.dtype.kind
        if len(lengths) != len(offsets) or set(kinds) - set("iu"):
            raise DataError(f"{path}: ep_len and ep_offset: expected as many whole numbers each")
        end = 0
        places = []
        for number, (length, offset) in enumerate(zip(lengths.tolist(), offsets.tolist())):
            if length < 1 or offset < end:
                raise DataError(
                    f"{path}: episode {number} has ep_len {length} and ep_offset {offset}: "
                    f"expected 1 or more rows, from {end} on"
                )
            end = offset + length
            places.append((f"episode_{number:06d}", _Place(path, "", offset, end)))
        return places


class _Hdf5(Mapping[str, Any]):
    """The datasets of an HDF5 file by their paths."""

    def __init__(self, file: Any):
        self.file = file
        self.names: list[str] = []
        file.visititems(self._see)

    def _see(self, name: str, item: Any) -> None:
        if hasattr(item, "shape"):
            self.names.append(name)

    def __getitem__(self, key: str) -> Any:
        return self.file[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _keys(arrays: Mapping[str, Any], group: str) -> list[str]:
    keys = [key.removeprefix(group) for key in arrays if key.startswith(group)]
    return [key for key in keys if key not in _FLAT]


def _natural(name: str) -> tuple[str, int, str]:
    """demo_2 before demo_10."""
    head = name.rstrip("0123456789")
    digits = name[len(head) :]
    return head, int(digits) if digits else -1, name
