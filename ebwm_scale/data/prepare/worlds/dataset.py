"""Episodes of a source -> a dataset folder of clips with their conditions.

    source ==processes==> one part file an episode (parts.py)
           ==> split by episode ==> encoder, statistics of the training split ==> shards
           ==> the episodes of the validation split, whole (data/format/episodes.py)

A clip lies inside an episode, and an episode is in training or in validation as a whole, decided by
the hash of its content. Episodes of the same content are taken once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.format.conditions import OUTCOMES, Condition
from ebwm_scale.data.format.content import CLIP_FIELD, VideoContent, encode_image, field_names
from ebwm_scale.data.format.episodes import (
    EPISODES_FOLDER,
    Episode,
    episode_bytes,
    episodes_of,
)
from ebwm_scale.data.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    already_there,
    load_manifest,
)
from ebwm_scale.data.format.writer import (
    DATASET_FILES,
    ShardWriter,
    refuse_foreign_files,
    staged_folder,
    write_manifest,
)
from ebwm_scale.data.prepare.encoding import (
    BATCH,
    ENCODER_FILE,
    MAX_FITTED_FRAMES,
    FittedEncoder,
    encoder_of,
    fit_encoder,
)
from ebwm_scale.data.prepare.splitting import split_documents
from ebwm_scale.data.prepare.workers import STILL_S
from ebwm_scale.data.prepare.worlds.columns import Kind
from ebwm_scale.data.prepare.worlds.config import DEFAULT_FPS, WorldDatasetConfig
from ebwm_scale.data.prepare.worlds.parts import (
    Dropped,
    Part,
    common_kinds,
    make_parts,
    stored_episode,
)
from ebwm_scale.data.prepare.worlds.source import FRAMES, Source, Wanted
from ebwm_scale.data.walking import Report

_OURS = (*DATASET_FILES, ENCODER_FILE, EPISODES_FOLDER)
Parts = Sequence[Part]


def make_world_dataset(
    source: Source,
    wanted: Wanted,
    output: str | Path,
    config: WorldDatasetConfig,
    *,
    like: str | Path | None = None,
    workers: int | None = None,
    still_s: float = STILL_S,
    report: Report = print,
    progress: Progress = no_progress,
) -> Path:
    """Read, split, encode and write a dataset folder; returns the path of its manifest.

    like: a world's dataset whose encoder, statistics and frame size to use, so that the two can be
    mixed. Read episodes are kept beside the output until it is complete: a killed run goes on. A
    complete dataset of the same source and settings is kept; one of others is refused. Raises
    DataError; then nothing is written.
    """
    output = Path(output).resolve()
    other = None if like is None else load_manifest(like)
    if other is not None:
        config = _like(other, config)
    refuse_foreign_files(output, ours=_OURS)
    about: dict[str, Any] = {
        "kind": source.kind,
        "name": source.name,
        "keys": {**source.keys, **wanted.keys},
        "like": None if other is None else other.fingerprint,
        "episodes_sha256": source.digest,
    }
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "modality": "video",
        "source": about,
        "settings": json.loads(json.dumps(config.settings())),
    }
    parts_folder = output.with_name(f".{output.name}.parts")
    with staged_folder(output) as staging:
        if already_there(output, values, digest="episodes_sha256") and _has_episodes(output):
            shutil.rmtree(staging)
            report(f"already there: {output / MANIFEST_NAME}")
        else:
            dropped = Dropped()
            parts = make_parts(
                source,
                wanted,
                config,
                parts_folder,
                workers=workers or os.cpu_count() or 1,
                still_s=still_s,
                dropped=dropped,
                report=report,
                progress=progress,
            )
            parts = _usable(parts, config, dropped, report)
            about["dropped"] = dict(sorted(dropped.reasons.items()))
            _say_shifted(parts, report)
            maker = _Maker(staging, parts, config, other, source, report, progress)
            values |= maker.write()
            write_manifest(staging, values)
    shutil.rmtree(parts_folder, ignore_errors=True)
    manifest = load_manifest(output)
    _summarize(manifest, config, report)
    return manifest.path


def _has_episodes(output: Path) -> bool:
    """Whether the held-out episodes of a complete dataset are all there."""
    infos = episodes_of(load_manifest(output))
    paths = [(output / info.path, info.size) for info in infos]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _like(other: Manifest, config: WorldDatasetConfig) -> WorldDatasetConfig:
    content = other.content
    if not isinstance(content, VideoContent):
        raise DataError(f"{other.path}: holds {other.modality}; --like takes a world's dataset")
    return dataclasses.replace(
        config,
        height=content.height,
        width=content.width,
        encoder=content.encoder_name,
        encoder_settings=dict(content.encoder_settings),
        patches=content.grid is not None,
    )


def _usable(
    parts: Parts, config: WorldDatasetConfig, dropped: Dropped, report: Report
) -> list[Part]:
    """Episodes of at least a clip, one of each content."""
    usable: dict[str, Part] = {}
    for part in parts:
        if part.num_steps < config.span:
            why = (
                f"{part.num_steps} steps: shorter than a clip of {config.context_length} + 1 "
                f"frames, {config.span} steps"
            )
            dropped.add(part.name, "shorter than a clip", why, report)
        elif part.digest in usable:
            why = f"the same as {usable[part.digest].name}"
            dropped.add(part.name, "the same as another", why, report)
        else:
            usable[part.digest] = part
    if len(usable) < 2:
        longest = max((part.num_steps for part in parts), default=0)
        raise DataError(
            f"{len(usable)} of {len(parts)} episodes can be used ({'; '.join(dropped.phrases())}; "
            f"the longest has {longest} steps, a clip {config.span}): validation takes whole "
            "episodes, so at least 2 are needed; give more or longer ones, or a smaller "
            "--context-length or --frame-skip"
        )
    return list(usable.values())


def _say_shifted(parts: Parts, report: Report) -> None:
    """Says which columns stand one row later than their step, since that is easily wrong."""
    for name in sorted({name for part in parts for name in part.shifted}):
        count = sum(name in part.shifted for part in parts)
        report(
            f"{name}: in {count} of {len(parts)} episodes the row beside the first frame belongs "
            "to no step: row t + 1 is taken for step t"
        )


class _Maker:
    """Writes the shards and the held-out episodes of a dataset."""

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        config: WorldDatasetConfig,
        other: Manifest | None,
        source: Source,
        report: Report,
        progress: Progress,
    ):
        self.folder = folder
        self.config = config
        self.other = other
        self.report = report
        self.progress = progress
        self.fps = self._rate(source)
        self.kinds = common_kinds(parts, config.columns.conditions)
        chosen = split_documents(
            list(parts), validation_fraction=config.validation_fraction, seed=config.seed
        )
        self.splits: dict[str, list[Part]] = chosen
        self.outcomes = self._common_outcomes(parts)

    def write(self) -> dict[str, Any]:
        """The manifest's values."""
        config = self.config
        conditions = self._conditions()
        encoder = self._encoder()
        described = encoder.describe(
            self.folder,
            stored=config.stored,
            height=config.height,
            width=config.width,
            interval_s=config.frame_skip / self.fps,
        )
        splits = {name: self._write_split(name, encoder) for name in self.splits}
        return described | {
            "block_length": (config.context_length + 1) * encoder.num_patches,
            "conditions": [condition.describe() for condition in conditions],
            "outcomes": self.outcomes,
            "episodes": self._write_episodes(),
            "splits": splits,
        }

    def _rate(self, source: Source) -> float:
        """Frames a second of the source."""
        if self.config.fps is not None or source.fps is not None:
            return self.config.fps or source.fps or DEFAULT_FPS
        self.report(
            f"{source.name} does not say how many frames a second it has: taken as "
            f"{DEFAULT_FPS:g} (--fps)"
        )
        return DEFAULT_FPS

    def _episodes(self, parts: Parts) -> Iterator[tuple[Part, Episode]]:
        for part in parts:
            episode = stored_episode(part, self.kinds)
            outcomes = {name: episode.outcomes[name] for name in self.outcomes}
            yield part, dataclasses.replace(episode, outcomes=outcomes)

    def _common_outcomes(self, parts: Parts) -> list[str]:
        """What every episode has; says of what only some have."""
        counts = {name: sum(name in part.outcomes for part in parts) for name in OUTCOMES}
        for name, count in counts.items():
            if 0 < count < len(parts):
                self.report(f"{name}: only {count} of {len(parts)} episodes have it: left out")
        return [name for name, count in counts.items() if count == len(parts)]

    def _conditions(self) -> list[Condition]:
        """The dataset's conditions, with the statistics of the training episodes."""
        sums = {name: _Sums() for name, kind in self.kinds.items() if not kind.is_discrete}
        if self.other is None:
            for _, episode in self._episodes(self.splits["train"]):
                for name, of_column in sums.items():
                    of_column.add(episode.conditions[name])
        conditions = [self._condition(name, kind, sums) for name, kind in self.kinds.items()]
        if self.other is not None:
            _check_like(self.other, conditions)
            return list(self.other.content.conditions)
        return conditions

    def _condition(self, name: str, kind: Kind, sums: dict[str, _Sums]) -> Condition:
        copies = self.config.frame_skip if name in self.config.dense else 1
        width = kind.width * copies
        nothing = np.zeros(0, np.float32)
        if kind.is_discrete:
            return Condition(name, "discrete", width, kind.num_values, nothing, nothing)
        if self.other is not None:
            return Condition(name, "continuous", width, 0, nothing, nothing)
        mean, std = sums[name].statistics()
        return Condition(name, "continuous", width, 0, np.tile(mean, copies), np.tile(std, copies))

    def _encoder(self) -> FittedEncoder:
        if self.other is not None:
            content = self.other.content
            assert isinstance(content, VideoContent), "checked when it was opened"
            return encoder_of(content)
        return fit_encoder(
            self.config.encoder,
            self.config.encoder_settings,
            self._training_frames,
            height=self.config.height,
            width=self.config.width,
            patches=self.config.patches,
            report=self.report,
        )

    def _training_frames(self) -> Iterator[np.ndarray]:
        """Frames that clips of the training split show, in batches; every so many-th where there
        are more than MAX_FITTED_FRAMES.
        """
        train = self.splits["train"]
        step = max(1, -(-sum(part.num_steps + 1 for part in train) // MAX_FITTED_FRAMES))
        for _, episode in self._episodes(train):
            frames = episode.frames[::step]
            for first in range(0, len(frames), BATCH):
                yield frames[first : first + BATCH]

    def _write_split(self, name: str, encoder: FittedEncoder) -> dict[str, Any]:
        config, parts = self.config, self.splits[name]
        writer = ShardWriter(self.folder, name, samples_per_shard=config.samples_per_shard)
        num_targets = config.context_length * encoder.num_patches
        try:
            episodes = tracked(
                self._episodes(parts),
                f"{name}: episodes encoded",
                self.progress,
                total=len(parts),
            )
            for _, episode in episodes:
                for fields in self._clips(episode, encoder):
                    writer.add(fields, num_targets=num_targets)
            shards = writer.close()
        finally:
            writer.abandon()
        return {
            "shards": shards,
            "num_videos": len(parts),
            "num_steps": sum(part.num_steps for part in parts),
            "num_samples": writer.num_samples,
            "num_targets": writer.num_samples * num_targets,
        }

    def _clips(
        self, episode: Episode, encoder: FittedEncoder
    ) -> Iterator[dict[str, np.ndarray | bytes]]:
        """The fields of each clip of an episode."""
        config = self.config
        names = field_names(config.stored, config.context_length + 1)[:-1]
        if config.stored == "embedding":
            pictures: Any = encoder.encode(episode.frames)
        else:
            pictures = [
                encode_image(frame, config.stored, config.quality) for frame in episode.frames
            ]
        for start in range(0, episode.num_steps - config.span + 1, config.clip_stride):
            clip = episode.steps(
                start, config.context_length, skip=config.frame_skip, dense=config.dense
            )
            shown = pictures[start : start + config.span + 1 : config.frame_skip]
            fields: dict[str, np.ndarray | bytes] = {}
            if config.stored == "embedding":
                fields[names[0]] = shown.reshape(-1, shown.shape[-1])
            else:
                fields = dict(zip(names, shown))
            for members in (clip.conditions, clip.outcomes):
                fields |= {f"{name}.npy": values for name, values in members.items()}
            about = {
                "video": episode.name,
                "start_s": round(start / self.fps, 6),
                "episode": episode.name,
                "start_step": start,
                "source": episode.source,
            }
            yield fields | {CLIP_FIELD: json.dumps(about).encode()}

    def _write_episodes(self) -> dict[str, Any]:
        """Writes the held-out episodes, and lists them."""
        folder = self.folder / EPISODES_FOLDER
        folder.mkdir()
        entries = []
        for number, (part, episode) in enumerate(self._episodes(self.splits["validation"])):
            path, content = folder / f"{number:06d}.npz", episode_bytes(episode)
            path.write_bytes(content)
            entries.append(
                {
                    "name": part.name,
                    "path": f"{EPISODES_FOLDER}/{path.name}",
                    "size": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "num_steps": part.num_steps // self.config.frame_skip,
                }
            )
        skip, dense = self.config.frame_skip, list(self.config.dense)
        return {"frame_skip": skip, "dense": dense, "validation": entries}


class _Sums:
    """Sums over the rows of a column, in float64."""

    def __init__(self):
        self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: np.ndarray) -> None:
        numbers = rows.astype(np.float64)
        self.count += len(numbers)
        self.total = self.total + numbers.sum(0)
        self.squares = self.squares + np.square(numbers).sum(0)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 (mean, std); 1 for what is constant, so that it stays what it is."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - np.square(mean), 0.0))
        constant = std <= 1e-6 * np.maximum(1e-3, np.abs(mean))
        return mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)


def _check_like(other: Manifest, found: Sequence[Condition]) -> None:
    """DataError if a dataset has other conditions than the one it is to be like."""

    def words(conditions: Sequence[Condition]) -> str:
        return ", ".join(f"{c.name} ({c.kind}, {c.width})" for c in conditions)

    theirs = other.content.conditions
    fits = words(theirs) == words(found) and all(
        mine.num_values <= their.num_values for mine, their in zip(found, theirs)
    )
    if not fits:
        raise DataError(
            f"{other.path}: has the conditions {words(theirs) or 'none'}, these episodes have "
            f"{words(found) or 'none'}: --like takes a dataset with the same"
        )


def _summarize(manifest: Manifest, config: WorldDatasetConfig, report: Report) -> None:
    content = manifest.content
    for name, split in manifest.splits.items():
        num_steps = manifest.values["splits"][name]["num_steps"]
        size = sum(shard.size for shard in split.shards) / 2**20
        report(
            f"{name}: {split.facts['num_videos']} episodes of {num_steps} steps, "
            f"{split.num_samples} clips of {config.context_length} + 1 frames"
            f"{f' x {content.group_size} patches' if content.grid else ''}, in "
            f"{len(split.shards)} shards of {size:.1f} MiB"
        )
    if FRAMES in manifest.source["keys"]:
        report(f"frames: {manifest.source['keys'][FRAMES]}")
    words = [
        f"{c.name} ({f'{c.num_values} values' if c.is_discrete else f'{c.width} numbers'})"
        for c in content.conditions
    ]
    report(f"conditions: {', '.join(words) or 'none'}; kept: {', '.join(content.outcomes)}")
    dropped = manifest.source.get("dropped") or {}
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    report(f"episodes left out: {left_out or 'none'}")
