"""LeRobot datasets, as folders: a table of numbers (parquet) and a video of each camera (mp4).

              v2.0, v2.1                                    v3.0
    info      meta/info.json: codebase_version, fps, features, and the paths of the files below
    episodes  meta/episodes.jsonl                           meta/episodes/*/*.parquet
    numbers   data/chunk-000/episode_000000.parquet         data/chunk-000/file-000.parquet
    pictures  videos/chunk-000/CAMERA/episode_000000.mp4    videos/CAMERA/chunk-000/file-000.mp4
    a file    holds one episode                             holds several, one after the other

Row t of the table belongs to frame t: observation.* is what was sensed there, action what was done
there, next.reward and next.done what came of it. A frame of an episode is the picture on screen at
its place in the file, t / fps after the episode's first. Cameras of dtype "image" stand in the
table itself. Read with pyarrow and PyAV, without the package lerobot; nothing is downloaded.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import read_small
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.strict_json import is_whole, parse
from ebwm_scale.data.format.content import decode_image
from ebwm_scale.data.format.shard_table import inside_folder
from ebwm_scale.data.prepare.decoding import pictures
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.worlds.columns import RawEpisode
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted, files_digest, needed

_USUAL = {
    "action": ("action",),
    "proprio": ("observation.state",),
    "reward": ("next.reward", "reward"),
    "terminated": ("next.done", "next.terminated"),
}
_PICTURES = ("video", "image")
_MAX_JSON_BYTES = 2**28
_VERSIONS = ("v2.", "v3.")


@dataclass(frozen=True)
class _Place:
    """Where an episode lies: its table, and its pictures from a time on in a video."""

    index: int
    length: int  # frames
    table: Path
    video: Path | None  # None: the pictures stand in the table
    from_s: float


class LeRobotSource:
    """See data/prepare/worlds/source.py: Source."""

    kind = "lerobot"

    def __init__(self, folder: Path, wanted: Wanted):
        self.folder = folder
        self.name = folder.resolve().name
        self.parquet: Any = needed("pyarrow.parquet", "pyarrow", "reading LeRobot datasets")
        self.info = self._read_info()
        self.fps: float | None = float(self.info["fps"])
        self.is_v3 = self.info["codebase_version"].startswith("v3.")
        features = self.info["features"]
        cameras = [key for key, of in features.items() if of.get("dtype") in _PICTURES]
        self.camera = str(wanted.key(FRAMES, cameras, cameras[:1], str(folder)))
        if len(cameras) > 1 and FRAMES not in wanted.keys:
            raise DataError(
                f"{folder}: has several cameras, {', '.join(cameras)}: name one with --camera"
            )
        self.is_video = features[self.camera]["dtype"] == "video"
        vectors = [key for key in features if key not in cameras]
        self.keys: dict[str, str] = {}
        for name in wanted.names[1:]:
            key = wanted.key(name, vectors, _USUAL.get(name, (name,)), str(folder))
            if key is not None:
                self.keys[name] = key
        self._kept: tuple[tuple[Path, tuple[str, ...]], Any] | None = None
        self.places = self._places()
        groups: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            groups.setdefault(place.video or place.table, []).append(name)
        self.groups = list(groups.values())
        files = {place.table for place in self.places.values()}
        files |= {place.video for place in self.places.values() if place.video is not None}
        self.digest = files_digest([*files, *self._meta_files()], folder)

    def read(self, group: list[str], moved: Callable[[], None]) -> Iterator[RawEpisode]:
        places = [self.places[name] for name in group]
        frames = self._frames_of_table if places[0].video is None else self._frames_of_video
        for place, shot in frames(places, moved):
            columns = self._columns(place)
            where = f"{self.folder}: episode {place.index}"
            for name, values in columns.items():
                if len(values) != place.length:
                    raise DataError(
                        f"{where}: its table has {len(values)} rows of {name}, its list of "
                        f"episodes says {place.length}"
                    )
            yield RawEpisode(_episode_name(place.index), shot, columns)

    def _frames_of_video(
        self, places: list[_Place], moved: Callable[[], None]
    ) -> Iterator[tuple[_Place, np.ndarray]]:
        """The frames of each episode in a video file, in the order of their times."""
        path = places[0].video
        assert path is not None, "the places of a video"
        fps = self.fps or 1.0  # _read_info has checked it
        findings = Findings()
        film = pictures(path, findings, moved)
        picture = next(film, None)
        for place in sorted(places, key=lambda one: one.from_s):
            frames: list[np.ndarray] = []
            between = 0  # pictures that no row of the table asks for
            while picture is not None and len(frames) < place.length:
                # Half a step later, where no rounding of times matters.
                due_s = place.from_s + (len(frames) + 0.5) / fps
                if due_s < picture.begin_s:
                    break  # a hole: no picture at this time
                if due_s < picture.end_s:
                    frames.append(picture.pixels())
                else:
                    between += bool(frames)
                picture = next(film, None)
            found = len(frames) + between
            if not self.is_v3 and picture is not None:
                found += 1 + sum(1 for _ in film)
            if found != place.length:
                about = "; ".join(["", *findings.phrases()])
                raise DataError(
                    f"{path}: episode {place.index} has {found} frames in its video at "
                    f"{fps:g} a second, {place.length} rows in its table{about}"
                )
            yield place, np.stack(frames)

    def _frames_of_table(
        self, places: list[_Place], moved: Callable[[], None]
    ) -> Iterator[tuple[_Place, np.ndarray]]:
        for place in places:
            column = self._table(place, [self.camera])[self.camera].to_pylist()
            where = f"{place.table}: episode {place.index}"
            frames = []
            for step, entry in enumerate(column):
                content = entry.get("bytes") if isinstance(entry, dict) else None
                if content is None:
                    raise DataError(f"{where}, step {step}: {self.camera} holds no picture")
                try:
                    frames.append(decode_image(content))
                except ValueError as error:
                    raise DataError(f"{where}, step {step}: {self.camera}: {error}") from None
                moved()
            if len(frames) != place.length or len({frame.shape for frame in frames}) > 1:
                raise DataError(
                    f"{where}: {len(frames)} pictures for {place.length} frames, or of several "
                    "sizes"
                )
            yield place, np.stack(frames)

    def _columns(self, place: _Place) -> dict[str, np.ndarray]:
        table = self._table(place, sorted(set(self.keys.values())))
        columns = {}
        for name, key in self.keys.items():
            try:
                columns[name] = np.array(table[key].to_pylist())
                if columns[name].dtype == object:
                    raise ValueError("rows of several lengths, or none")
            except ValueError as error:
                raise DataError(f"{place.table}: episode {place.index}: {key}: {error}") from None
        return columns

    def _table(self, place: _Place, keys: list[str]) -> Any:
        """The rows of an episode, in the order of its frames."""
        table = self._whole_table(place.table, tuple(keys))
        if "episode_index" in table.column_names:
            compute: Any = needed("pyarrow.compute", "pyarrow", "reading LeRobot datasets")
            table = table.filter(compute.equal(table["episode_index"], place.index))
        return table.sort_by("frame_index") if "frame_index" in table.column_names else table

    def _whole_table(self, path: Path, keys: tuple[str, ...]) -> Any:
        """A file's columns; the last one is kept, since a file may hold many episodes."""
        if self._kept is not None and self._kept[0] == (path, keys):
            return self._kept[1]
        try:
            there = self.parquet.read_schema(path).names
            missing = [key for key in keys if key not in there]
            if missing:
                raise DataError(
                    f"{path}: has no column {missing[0]}; it has {', '.join(sorted(there))}"
                )
            index = [key for key in ("episode_index", "frame_index") if key in there]
            table = self.parquet.read_table(path, columns=[*keys, *index], partitioning=None)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {_line(error)}") from None
        self._kept = ((path, keys), table)
        return table

    def _read_info(self) -> dict[str, Any]:
        path = self.folder / "meta" / "info.json"
        try:
            info = parse(read_small(path, _MAX_JSON_BYTES))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no LeRobot dataset: {_line(error)}") from None
        version = info.get("codebase_version")
        if not isinstance(version, str) or not version.startswith(_VERSIONS):
            raise DataError(
                f"{path}: codebase_version is {shown(version)}: versions 2.0, 2.1 and 3.0 are read"
            )
        fps, features = info.get("fps"), info.get("features")
        if type(fps) not in (int, float) or not 0 < fps < 1e6:
            raise DataError(f"{path}: fps is {shown(fps)}: expected a number above 0")
        if not isinstance(features, dict) or any(type(f) is not dict for f in features.values()):
            raise DataError(f"{path}: features is {shown(features)}: expected an object")
        return info

    def _meta_files(self) -> list[Path]:
        meta = self.folder / "meta"
        return [meta / "info.json", *sorted(meta.glob("episodes*.jsonl")), *self._episode_tables()]

    def _episode_tables(self) -> list[Path]:
        return sorted((self.folder / "meta" / "episodes").glob("*/*.parquet"))

    def _places(self) -> dict[str, _Place]:
        """Every episode by its name, in order; DataError for none, or for a path that leads out."""
        rows = self._rows_v3() if self.is_v3 else self._rows_v2()
        if not rows:
            raise DataError(f"{self.folder}: lists no episodes")
        places = {}
        for row in sorted(rows, key=lambda one: one["episode_index"]):
            place = self._place(row)
            name = _episode_name(place.index)
            if name in places:
                raise DataError(f"{self.folder}: lists episode {place.index} twice")
            places[name] = place
        return places

    def _rows_v2(self) -> list[dict[str, Any]]:
        path = self.folder / "meta" / "episodes.jsonl"
        try:
            lines = read_small(path, _MAX_JSON_BYTES).splitlines()
            rows = [parse(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {_line(error)}") from None
        chunk = self.info.get("chunks_size")
        if not is_whole(chunk) or chunk < 1:
            raise DataError(f"{self.folder}: chunks_size is {shown(chunk)}: expected 1 or more")
        for row in rows:
            self._check(row, path)
            row["episode_chunk"] = row["episode_index"] // chunk
        return rows

    def _rows_v3(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        video = f"videos/{self.camera}"
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if self.is_video:
            names += [f"{video}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        for path in self._episode_tables():
            try:
                there = self.parquet.read_schema(path).names
                missing = [name for name in names if name not in there]
                if missing:
                    raise DataError(f"{path}: has no column {missing[0]}")
                table = self.parquet.read_table(path, columns=names, partitioning=None)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read: {_line(error)}") from None
            for row in table.to_pylist():
                self._check(row, path)
                rows.append(row)
        return rows

    def _check(self, row: Any, path: Path) -> None:
        numbers = [row.get(key) for key in ("episode_index", "length")] if row else []
        if not numbers or not all(is_whole(n) and n >= 0 for n in numbers) or numbers[1] < 1:
            raise DataError(f"{path}: an episode without episode_index and length: {shown(row)}")

    def _place(self, row: dict[str, Any]) -> _Place:
        index, video, from_s = row["episode_index"], None, 0.0
        if self.is_v3:
            table = self._path("data_path", _numbers(row, "data"))
            if self.is_video:
                key = f"videos/{self.camera}"
                video = self._path("video_path", _numbers(row, key) | {"video_key": self.camera})
                from_s = float(row[f"{key}/from_timestamp"])
        else:
            values = {key: row[key] for key in ("episode_index", "episode_chunk")}
            table = self._path("data_path", values)
            if self.is_video:
                video = self._path("video_path", values | {"video_key": self.camera})
        return _Place(index, row["length"], table, video, from_s)

    def _path(self, template: str, values: dict[str, Any]) -> Path:
        """A file that the templates of info.json name."""
        text = self.info.get(template)
        where = f"{self.folder}: {template} is {shown(text)}"
        if not isinstance(text, str):
            raise DataError(f"{where}: expected a path with places for numbers")
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            if not fields <= values.keys():
                raise ValueError(f"places for {', '.join(sorted(fields))}")
            relative = text.format(**values)
        except (ValueError, IndexError, TypeError) as error:
            known = ", ".join(sorted(values))
            raise DataError(f"{where}: {_line(error)}; known are {known}") from None
        path = self.folder / relative
        if not inside_folder(relative):
            raise DataError(f"{where}: refused, it leads out of the dataset")
        if not path.is_file():
            raise DataError(f"{path}: is missing; copy the dataset again")
        return path


def _numbers(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key: row[f"{prefix}/{key}"] for key in ("chunk_index", "file_index")}


def _episode_name(index: int) -> str:
    return f"episode_{index:06d}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
