"""The videos behind what the user names.

    clips/walk.mp4, walk.txt, walk.json   a file, with its caption and what else is known of it
    clips/dance.gif, wave.webp            animations
    clips/run/1.png, 2.png, ...           a folder of images is a video, in natural order
    clips.tar, clips.zip                  read like folders; WebDataset and video2dataset too

Each is known by a hash of its content, and taken once. A folder of images is one only where the
input holds no other video, or it is asked for: beside videos, images are thumbnails. Of a tar,
images are never taken: there they are samples of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.data.prepare.decoding import not_watched, pictures
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.stills import (
    IMAGE_SUFFIXES,
    is_animated_webp,
    natural_order,
    pictures_of_images,
    pictures_of_webp,
)
from ebwm_scale.data.prepare.video_places import Place, is_archive, members
from ebwm_scale.data.walking import Report, walk_files

VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".ogv",
    ".gif",
)
IMAGE_RATE = 25.0  # images a second, of a folder of them
MAX_BESIDE_BYTES = 2**16  # of a caption, and of what else is known of a video
_CAPTION, _METADATA = ".txt", ".json"
_SHOWN_KINDS = 8
_SHOWN_FOLDERS = 3


class OnScreen(Protocol):
    """What is on screen from begin_s to end_s, in a piece that is shown without a break."""

    @property
    def piece(self) -> int: ...

    @property
    def begin_s(self) -> float: ...

    @property
    def end_s(self) -> float: ...

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3), upright."""
        ...


@dataclass(frozen=True)
class Video:
    """A video, known by the hash of its content.

    path: for messages, and the file itself where there is no place. place: of a member of an
    archive. images: of a folder of images, in order. beside: JSON of its caption and metadata.
    """

    name: str
    path: Path
    digest: str
    place: Place | None = None
    images: tuple[Place, ...] = ()
    beside: str = ""

    @property
    def identity(self) -> str:
        """What a dataset depends on."""
        if not self.beside:
            return self.digest
        return f"{self.digest} {hashlib.sha256(self.beside.encode()).hexdigest()}"

    def about(self) -> dict[str, Any]:
        """Its caption (text) and metadata (whatever JSON lay beside it), as far as there are."""
        return json.loads(self.beside) if self.beside else {}

    @contextlib.contextmanager
    def shown(
        self,
        folder: Path,
        findings: Findings,
        moved: Callable[[], None] = not_watched,
        *,
        stream: int | None = None,
        image_rate: float = IMAGE_RATE,
    ) -> Iterator[Iterable[OnScreen]]:
        """What a player shows of it; folder: for a copy of what lies in an archive.

        Raises DataError, in the block, for what cannot be decoded.
        """
        if self.images:
            yield pictures_of_images(self.images, image_rate, findings, moved)
            return
        place = self.place or Place(self.path)
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(place.as_file(folder, moved))
            except OSError as error:
                raise DataError(f"{self.path}: {error.strerror or error}") from None
            try:
                yield pictures_of_file(path, findings, moved, stream=stream)
            except DataError as error:
                raise DataError(str(error).replace(str(path), str(self.path))) from None


def pictures_of_file(
    path: Path,
    findings: Findings,
    moved: Callable[[], None] = not_watched,
    *,
    stream: int | None = None,
) -> Iterator[OnScreen]:
    """What a player shows of a file; as decoding.pictures, animated WebP too."""
    if is_animated_webp(Place(path)):
        return pictures_of_webp(path, findings, moved)
    return pictures(path, findings, moved, number=stream)


def find_videos(
    inputs: Sequence[str | Path],
    *,
    images: bool = False,
    captions: bool = True,
    report: Report = print,
) -> list[Video]:
    """All videos in the given files and folders (recursive), one of each content, sorted by it.

    images: folders of images are videos also where there are others. captions: keep .txt and .json
    beside a video. Raises DataError when there is none.
    """
    search = _Search(images, captions, report)
    for source in map(Path, inputs):
        if not source.exists():
            raise DataError(
                f"{source}: no such file or folder; give video files, or folders with them"
            )
        search.input(source)
    search.summary()
    if not search.found:
        raise DataError(
            f"{', '.join(map(str, inputs)) or 'no input'}: no video found; looked for "
            f"{', '.join('*' + s for s in VIDEO_SUFFIXES)}, animated .webp, .tar and .zip of them, "
            "and folders of images"
        )
    return sorted(search.found.values(), key=lambda video: video.digest)


class _Search:
    """Collects videos from inputs, and what was left out."""

    def __init__(self, images: bool, captions: bool, report: Report):
        self.found: dict[str, Video] = {}
        self._images = images
        self._captions = captions
        self._report = report
        self._left_out: Counter[str] = Counter()
        self._image_folders: list[str] = []
        self._has_thumbnails = False

    def input(self, source: Path) -> None:
        """Take what is behind one name that the user gave."""
        if source.is_file():
            if is_archive(source):
                self._of_archive(source.name, source)
            else:
                beside = {p.name: Place(p) for p in _siblings(source)}
                self._take(source.name, Place(source), beside, source.name)
            return
        inside = {
            path.relative_to(source).as_posix(): path
            for path in walk_files(source, report=self._report)
        }
        archives = {name: path for name, path in inside.items() if is_archive(path)}
        places = {name: Place(path) for name, path in inside.items() if name not in archives}
        self._of_files("", source, places, alone=not archives)
        for name, path in archives.items():
            try:
                self._of_archive(name, path)
            except DataError as error:
                self._report(f"warning: {path}: skipped: {error}")

    def summary(self) -> None:
        """Say what was not taken, and which folders of images were."""
        if self._image_folders:
            shown = ", ".join(self._image_folders[:_SHOWN_FOLDERS])
            more = ", ..." if len(self._image_folders) > _SHOWN_FOLDERS else ""
            self._report(f"folders of images taken as videos: {shown}{more}")
        if self._has_thumbnails:
            self._report("images beside videos are no video; --images takes each folder of them")
        if self._left_out:
            ranked = sorted(self._left_out.items(), key=lambda kind: (-kind[1], kind[0]))
            kinds = ", ".join(f"{count} x {suffix}" for suffix, count in ranked[:_SHOWN_KINDS])
            self._report(f"no videos, left out: {self._left_out.total()} files ({kinds})")

    def _of_archive(self, name: str, path: Path) -> None:
        self._of_files(
            name, path, members(path, self._report), is_tar=path.suffix.lower() != ".zip"
        )

    def _of_files(
        self,
        prefix: str,
        folder: Path,
        places: dict[str, Place],
        *,
        alone: bool = True,
        is_tar: bool = False,
    ) -> None:
        """Take the videos among files below a folder, or in an archive.

        prefix: of their names. alone: no archive lies beside them, which may hold the videos.
        """
        videos = {name for name, place in places.items() if _is_video(name, place)}
        images = {name for name in places if name not in videos and _suffix(name) in IMAGE_SUFFIXES}
        used = set(videos)
        for name in sorted(videos):
            used |= self._take(_joined(prefix, name), places[name], places, name)
        if not is_tar and (self._images or (alone and not videos)):
            used |= self._image_folders_of(prefix, folder, places, images, videos)
        elif images and not is_tar:
            self._has_thumbnails = True
        self._left_out.update(_suffix(name) or "no suffix" for name in places if name not in used)

    def _image_folders_of(
        self,
        prefix: str,
        folder: Path,
        places: dict[str, Place],
        images: set[str],
        videos: set[str],
    ) -> set[str]:
        """Take each folder that holds images directly, and no video; the names that were used."""
        folders: dict[str, list[str]] = defaultdict(list)
        for name in images:
            folders[name.rpartition("/")[0]].append(name)
        with_videos = {name.rpartition("/")[0] for name in videos}
        used: set[str] = set()
        for inside, names in sorted(folders.items()):
            if inside in with_videos or len(names) < 2:
                continue
            names.sort(key=natural_order)
            listed = [places[name] for name in names]
            name = _joined(prefix, inside) or folder.name
            readable = [(place, digest) for place in listed if (digest := self._sha256(place))]
            if not readable:
                continue
            content = json.dumps([digest for _, digest in readable])
            digest = hashlib.sha256(f"images {content}".encode()).hexdigest()
            video = Video(name, folder / inside, digest)
            video = replace(video, images=tuple(place for place, _ in readable))
            used |= set(names) | self._keep(video, places, inside)
            self._image_folders.append(printable(name))
        return used

    def _take(self, name: str, place: Place, beside: dict[str, Place], own_name: str) -> set[str]:
        """Take one file; the names of what beside it was used. own_name: its name among those."""
        digest = self._sha256(place)
        if digest is None:
            return set()
        video = Video(name, place.shown_path, digest, place if place.member else None)
        return self._keep(video, beside, own_name.removesuffix(PurePosixPath(own_name).suffix))

    def _keep(self, video: Video, beside: dict[str, Place], stem: str) -> set[str]:
        used: set[str] = set()
        if self._captions and stem:
            about, used = self._beside(beside, stem)
            if about:
                video = replace(video, beside=json.dumps(about, sort_keys=True))
        known = self.found.setdefault(video.digest, video)
        if known is not video:
            self._report(f"{video.path}: the same bytes as {known.path}, taken once")
        return used

    def _beside(self, places: dict[str, Place], stem: str) -> tuple[dict[str, Any], set[str]]:
        """(caption and metadata of a video, the names of their files)"""
        about: dict[str, Any] = {}
        used = set()
        for suffix, key in ((_CAPTION, "caption"), (_METADATA, "metadata")):
            place = places.get(stem + suffix)
            if place is None:
                continue
            used.add(stem + suffix)
            try:
                text = place.read(MAX_BESIDE_BYTES).decode("utf-8-sig")
                about[key] = text.strip() if key == "caption" else json.loads(text)
            except OSError as error:
                self._report(f"warning: {place}: not kept: {error.strerror or error}")
            except (ValueError, RecursionError):
                kind = "UTF-8" if key == "caption" else "JSON in UTF-8"
                self._report(f"warning: {place}: not kept: is no {kind}")
        return about, used

    def _sha256(self, place: Place) -> str | None:
        try:
            return place.sha256()
        except OSError as error:
            self._report(f"warning: {place}: skipped: {error.strerror or error}")
            return None


def _siblings(path: Path) -> list[Path]:
    """What may describe a file that was named alone."""
    named = [path.with_suffix(suffix) for suffix in (_CAPTION, _METADATA)]
    return [sibling for sibling in named if sibling != path and sibling.is_file()]


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix and name else prefix or name


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_video(name: str, place: Place) -> bool:
    return _suffix(name) in VIDEO_SUFFIXES or is_animated_webp(place)
