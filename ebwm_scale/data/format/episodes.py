"""Whole episodes beside the shards: what imagination and planning are held against.

    episodes/000007.npz    of every episode of the validation split
        frames             uint8 (T + 1, height, width, 3), as the encoder sees them
        condition.NAME     float32 or uint32 (T, width): row t belongs to frame t
        outcome.NAME       reward float32 (T,), terminated uint8 (T,)
        about              JSON: name, source, digest

Files hold every step of the source. A dataset may take each n-th frame only (`frame_skip`); then
`read_episode` does too, so that an episode's steps are those of the clips: dense conditions
(actions) of the steps between stand side by side, others are taken where the frame is, rewards are
added up, and a step is terminated if one of its own is.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.strict_json import is_whole
from ebwm_scale.data.format.conditions import OUTCOMES, check_outcome, check_values
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shard_table import inside_folder

EPISODES_FOLDER = "episodes"
_REMAKE = "make the dataset again with tools/make_world_shards.py"
_CONDITION, _OUTCOME = "condition.", "outcome."
# what numpy raises for a file that is no archive of arrays
_UNREADABLE = (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Episode:
    """frames: uint8 (T + 1, height, width, 3). conditions: per name (T, width). outcomes: per name
    (T,).
    """

    name: str
    source: str
    frames: np.ndarray
    conditions: dict[str, np.ndarray]
    outcomes: dict[str, np.ndarray]

    @property
    def num_steps(self) -> int:
        return len(self.frames) - 1

    @property
    def digest(self) -> str:
        """sha256 of what it holds, whatever its name is."""
        digest = hashlib.sha256()
        members = {"frames": self.frames, **self.conditions, **self.outcomes}
        for name, values in sorted(members.items()):
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def steps(self, start: int, count: int, *, skip: int, dense: Sequence[str]) -> Episode:
        """`count` steps of `skip` steps each from `start` on, as a clip or a shorter episode."""
        end = start + count * skip
        conditions = {}
        for name, values in self.conditions.items():
            if name in dense:
                conditions[name] = values[start:end].reshape(count, -1)
            else:
                conditions[name] = values[start:end:skip]
        outcomes = {}
        for name, values in self.outcomes.items():
            parts = values[start:end].reshape(count, skip)
            outcomes[name] = parts.sum(1) if name == "reward" else parts.max(1)
        frames = self.frames[start : end + 1 : skip]
        return Episode(self.name, self.source, frames, conditions, outcomes)


@dataclass(frozen=True)
class EpisodeInfo:
    """An episode's file, as the manifest lists it; path relative to the dataset folder.

    num_steps: in steps of the dataset, after frame skip.
    """

    name: str
    path: str
    size: int
    sha256: str
    num_steps: int


def episode_bytes(episode: Episode) -> bytes:
    """The content of an episode's file; the same for the same episode."""
    members = {"frames": episode.frames}
    members |= {_CONDITION + name: values for name, values in episode.conditions.items()}
    members |= {_OUTCOME + name: values for name, values in episode.outcomes.items()}
    about = {"name": episode.name, "source": episode.source, "digest": episode.digest}
    members["about"] = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **members)
    return stream.getvalue()


def parse_episode(content: bytes, where: str) -> Episode:
    """The episode in a file's bytes; DataError for what is none."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            members = {name: file[name] for name in file.files}
        about = json.loads(members["about"].tobytes())
        episode = Episode(
            about["name"],
            about["source"],
            members["frames"],
            _of_prefix(members, _CONDITION),
            _of_prefix(members, _OUTCOME),
        )
        if episode.digest != about["digest"]:
            raise ValueError("it does not hold what it says it does")
    except _UNREADABLE as error:
        raise DataError(f"{where}: not an episode ({error}): damaged; {_REMAKE}") from None
    return episode


def _of_prefix(members: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): values
        for name, values in members.items()
        if name.startswith(prefix)
    }


def episodes_of(manifest: Manifest) -> list[EpisodeInfo]:
    """The held-out episodes of a dataset, in the order of its validation split; none where it keeps
    none.

    Raises DataError for a manifest whose list of them is wrong.
    """
    listed = manifest.values.get("episodes")
    if listed is None:
        return []
    rate_of(manifest)
    entries = listed.get("validation")
    if not isinstance(entries, list):
        raise _wrong(manifest, "episodes.validation", "a list")
    return [_info(manifest, entry, i) for i, entry in enumerate(entries)]


def find_episode(manifest: Manifest, name: str) -> EpisodeInfo:
    """The held-out episode of this name, or with this number; DataError says which there are."""
    infos = episodes_of(manifest)
    for number, info in enumerate(infos):
        if name in (info.name, str(number)):
            return info
    shown = ", ".join(info.name for info in infos[:5])
    there = f"0 to {len(infos) - 1}, or by name: {shown}" if infos else "none"
    raise DataError(f"{manifest.path}: has no held-out episode {name}; it has {there}")


def read_episode(manifest: Manifest, info: EpisodeInfo) -> Episode:
    """A held-out episode in steps of the dataset, checked; DataError if it is damaged."""
    path = manifest.folder / info.path
    content = _content(path, info)
    whole = parse_episode(content, str(path))
    skip, dense = rate_of(manifest)
    episode = whole.steps(0, whole.num_steps // skip, skip=skip, dense=dense)
    problem = _problem(manifest, episode, info)
    if problem is not None:
        raise DataError(f"{path}: {problem}; {_REMAKE}")
    return episode


def episode_problems(manifest: Manifest) -> list[str]:
    """One line for each held-out episode that is not what the manifest says."""
    problems = []
    try:
        infos = episodes_of(manifest)
    except DataError as error:
        return [str(error)]
    for info in infos:
        try:
            read_episode(manifest, info)
        except DataError as error:
            problems.append(str(error))
    return problems


def _content(path: Path, info: EpisodeInfo) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the episode: {error.strerror}; {_REMAKE}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != info.sha256:
        raise DataError(
            f"{path}: sha256 of the episode is {found[:12]}..., the manifest says "
            f"{info.sha256[:12]}...: damaged; {_REMAKE}"
        )
    return content


def _problem(manifest: Manifest, episode: Episode, info: EpisodeInfo) -> str | None:
    """Where an episode is not one of its dataset."""
    content = manifest.content
    assert isinstance(content, VideoContent), "only these list episodes"
    size = (info.num_steps + 1, content.height, content.width, 3)
    if episode.frames.dtype != np.uint8 or episode.frames.shape != size:
        return f"frames are {episode.frames.dtype} {episode.frames.shape}: expected uint8 {size}"
    names = [condition.name for condition in content.conditions]
    if sorted(episode.conditions) != sorted(names) or set(episode.outcomes) != set(
        content.outcomes
    ):
        return f"holds {', '.join([*episode.conditions, *episode.outcomes])}, the dataset others"
    try:
        for condition in content.conditions:
            values = episode.conditions[condition.name]
            shape = (info.num_steps, condition.width)
            if values.dtype.str != condition.dtype or values.shape != shape:
                return f"{condition.name} is {values.dtype} {values.shape}: expected {shape}"
            check_values(condition, values)
        for name in content.outcomes:
            if episode.outcomes[name].shape != (info.num_steps,):
                return f"{name} is {episode.outcomes[name].shape}: expected ({info.num_steps},)"
            check_outcome(name, episode.outcomes[name])
    except ValueError as error:
        return str(error)
    return None


def rate_of(manifest: Manifest) -> tuple[int, list[str]]:
    """(frame_skip, dense) of a dataset that keeps episodes; DataError for a wrong manifest."""
    listed = manifest.values["episodes"]
    if not isinstance(listed, dict) or not isinstance(manifest.content, VideoContent):
        raise _wrong(manifest, "episodes", "an object, in a dataset of video")
    skip, dense = listed.get("frame_skip"), listed.get("dense")
    if not is_whole(skip) or skip < 1:
        raise _wrong(manifest, "episodes.frame_skip", "a whole number from 1 on")
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        raise _wrong(manifest, "episodes.dense", "a list of names")
    return skip, dense


def _info(manifest: Manifest, entry: Any, number: int) -> EpisodeInfo:
    where = f"episodes.validation[{number}]"
    if not isinstance(entry, dict):
        raise _wrong(manifest, where, "an object")
    texts = [entry.get(key) for key in ("name", "path", "sha256")]
    numbers = [entry.get(key) for key in ("size", "num_steps")]
    if not all(isinstance(text, str) for text in texts):
        raise _wrong(manifest, where, "name, path and sha256")
    if not all(is_whole(value) and value > 0 for value in numbers):
        raise _wrong(manifest, where, "size and num_steps above 0")
    if not inside_folder(entry["path"]):
        raise _wrong(manifest, f"{where}.path", "a relative path inside the dataset folder")
    return EpisodeInfo(
        entry["name"], entry["path"], entry["size"], entry["sha256"], entry["num_steps"]
    )


def _wrong(manifest: Manifest, field: str, expected: str) -> DataError:
    return DataError(f"{manifest.path}: {field}: expected {expected}; {_REMAKE}")


__all__ = [
    "EPISODES_FOLDER",
    "OUTCOMES",
    "Episode",
    "EpisodeInfo",
    "episode_bytes",
    "episode_problems",
    "episodes_of",
    "find_episode",
    "parse_episode",
    "rate_of",
    "read_episode",
]
