"""The episodes of a source, each in a part file: read in processes, checked, and kept until the
dataset is complete.

A part is an episode's file as data/format/episodes.py has it. A killed preparation goes on with the
groups of episodes that are not done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, tracked
from ebwm_scale.data.format.episodes import Episode, episode_bytes, parse_episode
from ebwm_scale.data.prepare.workers import each_in_a_process
from ebwm_scale.data.prepare.worlds import columns
from ebwm_scale.data.prepare.worlds.columns import Kind, RawEpisode
from ebwm_scale.data.prepare.worlds.config import WorldDatasetConfig
from ebwm_scale.data.prepare.worlds.images import sized
from ebwm_scale.data.prepare.worlds.source import OPTIONAL, Source, Wanted
from ebwm_scale.data.walking import Report

_FORMAT = 1  # counts changes of what a part of the same source and settings holds


@dataclass(frozen=True)
class Part:
    """What is known of a part without opening it; kinds: of its conditions."""

    name: str
    path: Path
    digest: str  # of the episode's content
    num_steps: int
    kinds: dict[str, Kind]
    outcomes: tuple[str, ...]
    shifted: tuple[str, ...]


@dataclass
class Dropped:
    """Episodes that are left out, and why: a reason and how many, and each of them in words."""

    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, reason: str, why: str, report: Report) -> None:
        self.reasons[reason] += 1
        report(f"warning: {name}: left out: {why}")

    def phrases(self) -> list[str]:
        return [f"{count} {reason}" for reason, count in sorted(self.reasons.items())]


def make_parts(
    source: Source,
    wanted: Wanted,
    config: WorldDatasetConfig,
    folder: Path,
    *,
    workers: int,
    still_s: float,
    dropped: Dropped,
    report: Report,
    progress: Progress,
) -> list[Part]:
    """The parts of all episodes, in the source's order.

    Raises DataError for the first one that has something wrong, or, with config.drop_bad, leaves
    such out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = _identity(source, wanted, config)
    places = {name: folder / f"{_file_name(name)}-{digest}" for g in source.groups for name in g}
    waiting = [group for group in source.groups if not all(_is_done(places[n]) for n in group)]
    if len(waiting) < len(source.groups):
        done = sum(map(len, source.groups)) - sum(map(len, waiting))
        report(f"{done} of {len(places)} episodes were read by an earlier run")

    def read(group: list[str], moved: Callable[[], None]) -> None:
        for raw in source.read(group, moved):
            _write(raw, source, config, places[raw.name])
            moved()

    outcomes = each_in_a_process(
        waiting, read, workers=workers, still_s=still_s, what=f"the reader of {source.name}"
    )
    for outcome in tracked(outcomes, "episodes", progress, total=len(waiting)):
        if outcome.problem is None:
            continue
        if not config.drop_bad:
            if not any(_is_done(path) for path in places.values()):
                shutil.rmtree(folder, ignore_errors=True)
            raise DataError(
                f"{outcome.problem}; --drop-bad leaves out what is wrong, and goes on with the rest"
            )
        missing = [name for name in outcome.task if not _is_done(places[name])]
        for name in missing:
            dropped.add(name, "with something wrong", outcome.problem, report)
    return [_known(name, path) for name, path in places.items() if _is_done(path)]


def read_part(part: Part) -> Episode:
    """The episode of a part."""
    return parse_episode(part.path.with_suffix(".npz").read_bytes(), str(part.path))


def stored_episode(part: Part, kinds: dict[str, Kind]) -> Episode:
    """The episode of a part with its conditions as samples store them."""
    episode = read_part(part)
    conditions = {
        name: columns.stored(values, kinds[name], name, part.name)
        for name, values in episode.conditions.items()
    }
    return dataclasses.replace(episode, conditions=conditions)


def _identity(source: Source, wanted: Wanted, config: WorldDatasetConfig) -> str:
    """Of all that decides what is in a part, beside the episode's name."""
    recipe = getattr(source, "recipe", source.digest)
    values = [
        _FORMAT,
        recipe,
        wanted.names,
        sorted(wanted.keys.items()),
        [config.height, config.width],
        dataclasses.asdict(config.columns),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _file_name(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _is_done(path: Path) -> bool:
    """Whether a part is complete: what is known of it is written last."""
    return path.with_suffix(".json").exists()


def _write(raw: RawEpisode, source: Source, config: WorldDatasetConfig, path: Path) -> None:
    """Align, check and write an episode. Raises DataError with its name."""
    where = f"{source.name}: {raw.name}"
    frames = sized(raw.frames, config.height, config.width, where)
    if len(frames) < 2:
        raise DataError(f"{where}: has {len(frames)} frames: expected at least 2")
    aligned: dict[str, np.ndarray] = {}
    kinds: dict[str, Kind] = {}
    shifted = []
    for name in (*config.columns.conditions, *OPTIONAL):
        if name not in raw.columns:
            continue
        asked = name in config.columns.shifted
        if name == "terminated" and len(raw.columns[name]) == len(frames):
            asked = asked or "reward" in shifted  # both are what a step gave back
        rows, is_shifted = columns.steps_of(
            raw.columns[name], name, len(frames), where, shifted=asked
        )
        if is_shifted:
            shifted.append(name)
        if name in OPTIONAL:
            aligned[name] = columns.outcome(rows, name, where)
            continue
        known = raw.num_values.get(name, 0)
        kinds[name] = columns.kind_of(rows, name, where, config.columns, known)
        aligned[name] = rows
    episode = Episode(
        raw.name,
        source.name,
        frames,
        {name: aligned[name] for name in config.columns.conditions},
        {name: aligned[name] for name in OPTIONAL if name in aligned},
    )
    with replacement(path.with_suffix(".npz")) as temporary:
        temporary.write_bytes(episode_bytes(episode))
    about = {
        "digest": episode.digest,
        "num_steps": episode.num_steps,
        "kinds": {name: dataclasses.asdict(kind) for name, kind in kinds.items()},
        "outcomes": list(episode.outcomes),
        "shifted": shifted,
    }
    with replacement(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(about))


def _known(name: str, path: Path) -> Part:
    about = json.loads(path.with_suffix(".json").read_text())
    kinds = {key: Kind(**kind) for key, kind in about["kinds"].items()}
    names = (tuple(about[key]) for key in ("outcomes", "shifted"))
    return Part(name, path, about["digest"], about["num_steps"], kinds, *names)


def common_kinds(parts: Sequence[Part], names: Sequence[str]) -> dict[str, Kind]:
    """The kind of each condition over all episodes; DataError where they differ."""
    return {
        name: columns.common_kind(name, [(part.name, part.kinds[name]) for part in parts])
        for name in names
    }
