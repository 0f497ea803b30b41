"""Videos -> a dataset folder of clips, as frames or as a frozen encoder's embeddings.

    videos ==several processes==> one part file each (data/prepare/clips.py)
           ==> split ==> encoder, statistics of the training frames ==> shards

A video goes to training or validation as a whole; a single long video (or `split time`) is cut in
time, with a gap, so that no frame and no neighbour of a training frame is in validation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.format.content import (
    CLIP_FIELD,
    VideoContent,
    decode_image,
    field_names,
)
from ebwm_scale.data.format.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SplitInfo,
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
from ebwm_scale.data.prepare.clips import ClipConfig, make_part, read_findings, read_frames
from ebwm_scale.data.prepare.encoding import (
    BATCH,
    ENCODER_FILE,
    MAX_FITTED_FRAMES,
    FittedEncoder,
    encoder_of,
    fit_encoder,
)
from ebwm_scale.data.prepare.findings import Findings, total
from ebwm_scale.data.prepare.video_config import VideoDatasetConfig
from ebwm_scale.data.prepare.video_sources import Video, find_videos
from ebwm_scale.data.prepare.video_split import Clips, split_clips
from ebwm_scale.data.prepare.workers import LIMIT_S, STILL_S, each_in_a_process
from ebwm_scale.data.walking import Report

_OURS = (*DATASET_FILES, ENCODER_FILE)


def make_video_dataset(
    inputs: Sequence[str | Path],
    output: str | Path,
    config: VideoDatasetConfig,
    *,
    like: str | Path | None = None,
    workers: int | None = None,
    still_s: float = STILL_S,
    limit_s: float = LIMIT_S,
    images: bool = False,
    captions: bool = True,
    report: Report = print,
    progress: Progress = no_progress,
) -> Path:
    """Decode, split, encode and write a dataset folder; returns the path of its manifest.

    like: a video dataset whose encoder, statistics and frame size to use, so that the two can be
    mixed.  still_s: seconds after which a decoder that does not move is ended; limit_s: after which
    any is.  images, captions: see find_videos.  Videos that cannot be decoded are reported and left
    out, as is what is damaged in the others.  Finished videos are
    kept beside the output until it is complete: a killed run goes on.  A complete dataset of the
    same videos and settings is kept; one of others is refused.  Raises DataError.
    """
    output = Path(output).resolve()
    other = None if like is None else load_manifest(like)
    if other is not None:
        content = other.content
        if not isinstance(content, VideoContent):
            raise DataError(f"{other.path}: holds {other.modality}; --like takes a video dataset")
        config = dataclasses.replace(
            config,
            height=content.height,
            width=content.width,
            interval_s=content.interval_s,
            encoder=content.encoder_name,
            patches=content.grid is not None,
        )
    videos = find_videos(inputs, images=images, captions=captions, report=report)
    refuse_foreign_files(output, ours=_OURS)
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("patches", "stream", "image_rate"):
        if getattr(config, name) == getattr(VideoDatasetConfig, name):
            del settings[name]  # as datasets of before have it
    source = {
        "inputs": [Path(i).resolve().name for i in inputs],
        "num_videos": len(videos),
        "like": None if other is None else other.fingerprint,
        "videos_sha256": _hash(videos),
    }
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "modality": "video",
        "source": source,
        "settings": settings,
    }
    with staged_folder(output) as staging:
        if already_there(output, values, digest="videos_sha256"):
            shutil.rmtree(staging)
            report(f"already there: {output / MANIFEST_NAME}")
        else:
            parts = _make_parts(
                videos,
                output.with_name(f".{output.name}.parts"),
                config.clips,
                workers=workers or os.cpu_count() or 1,
                still_s=still_s,
                limit_s=limit_s,
                report=report,
                progress=progress,
            )
            source["num_skipped"] = len(videos) - len(parts)
            source["findings"] = _report_findings(parts, len(videos), report).counts()
            splits = split_clips(parts, config, report)
            encoder = _encoder(other, config, splits["train"], report)
            values["block_length"] = (config.context_length + 1) * encoder.num_patches
            values |= encoder.describe(
                staging,
                stored=config.stored,
                height=config.height,
                width=config.width,
                interval_s=config.interval_s,
            )
            values["splits"] = {
                name: _write_split(staging, name, splits[name], encoder, config, progress)
                for name in splits
            }
            write_manifest(staging, values)
    shutil.rmtree(output.with_name(f".{output.name}.parts"), ignore_errors=True)
    manifest = load_manifest(output)
    for name, split in manifest.splits.items():
        report(_summary(name, split, config))
    return manifest.path


def _hash(videos: Sequence[Video]) -> str:
    return hashlib.sha256("\n".join(video.identity for video in videos).encode()).hexdigest()


def _make_parts(
    videos: Sequence[Video],
    folder: Path,
    config: ClipConfig,
    *,
    workers: int,
    still_s: float,
    limit_s: float,
    report: Report,
    progress: Progress,
) -> list[tuple[Video, Path]]:
    """The part file of every video of which a clip can be had; says what was left out, per video
    and in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {video: folder / f"{video.digest}-{config.identity}.tar" for video in videos}
    waiting = [video for video in videos if not paths[video].exists()]
    if len(waiting) < len(videos):
        report(
            f"{len(videos) - len(waiting)} of {len(videos)} videos were decoded by an earlier run"
        )

    def decode(video: Video, moved: Callable[[], None]) -> None:
        make_part(video, paths[video], config, moved)

    outcomes = each_in_a_process(waiting, decode, workers=workers, still_s=still_s, limit_s=limit_s)
    for outcome in tracked(outcomes, "videos", progress, total=len(waiting)):
        if outcome.problem is not None:
            path = outcome.task.path
            why = outcome.problem.removeprefix(f"{path}: ")
            report(f"warning: {path}: skipped: {why}")
    done = [(video, paths[video]) for video in videos if paths[video].exists()]
    if not done:
        raise DataError(f"none of {len(videos)} videos could be used; the warnings above say why")
    return done


def _report_findings(
    parts: Sequence[tuple[Video, Path]], num_videos: int, report: Report
) -> Findings:
    """Says what is not stored as it stands in the file: per video, and added up."""
    found = {video: read_findings(path) for video, path in parts}
    repaired = {video: findings for video, findings in found.items() if findings.phrases()}
    for video, findings in repaired.items():
        report(f"warning: {video.path}: {'; '.join(findings.phrases())}")
    summary = total(found.values())
    if repaired or len(parts) < num_videos:
        counts = [
            f"{len(parts) - len(repaired)} of {num_videos} videos are stored whole",
            f"{len(repaired)} with something left out or put right",
            f"{num_videos - len(parts)} skipped",
        ]
        report("; ".join([", ".join(counts), *summary.phrases()]))
    return summary


def _encoder(other, config: VideoDatasetConfig, train: Clips, report: Report) -> FittedEncoder:
    """Fitted to the training frames, or that of another dataset."""
    if other is not None:
        return encoder_of(other.content)
    return fit_encoder(
        config.encoder,
        config.encoder_settings,
        lambda: _training_frames(train, config),
        height=config.height,
        width=config.width,
        patches=config.patches,
        report=report,
    )


def _training_frames(train: Clips, config: VideoDatasetConfig) -> Iterator[np.ndarray]:
    """The training frames (n, height, width, 3), in batches, each once; every so many-th where
    there are more than MAX_FITTED_FRAMES.
    """
    numbers = [sorted({i for clip in clips for i in clip.frames}) for _, _, clips in train]
    step = max(1, -(-sum(map(len, numbers)) // MAX_FITTED_FRAMES))
    for (_, path, _), wanted in zip(train, numbers):
        frames = read_frames(path)
        yield from _decoded([frames[i] for i in wanted[::step]], config)


def _decoded(frames: Sequence[bytes], config: VideoDatasetConfig) -> Iterator[np.ndarray]:
    """Frames (n, height, width, 3), BATCH at a time."""
    size = config.height, config.width
    for start in range(0, len(frames), BATCH):
        yield np.stack([decode_image(frame, size) for frame in frames[start : start + BATCH]])


def _write_split(
    folder: Path,
    name: str,
    clips_of: Clips,
    encoder: FittedEncoder,
    config: VideoDatasetConfig,
    progress: Progress,
) -> dict[str, Any]:
    writer = ShardWriter(folder, name, samples_per_shard=config.samples_per_shard)
    try:
        for video, path, clips in tracked(clips_of, f"{name}: videos encoded", progress):
            frames, embeddings = read_frames(path), None
            if config.stored == "embedding":
                batches = [encoder.encode(batch) for batch in _decoded(frames, config)]
                embeddings = np.concatenate(batches)
            for clip in clips:
                if embeddings is not None:
                    taken = embeddings[list(clip.frames)]
                    fields = {"frames.npy": taken.reshape(-1, taken.shape[-1])}
                else:
                    fields = dict(
                        zip(
                            field_names(config.stored, config.context_length + 1),
                            (frames[i] for i in clip.frames),
                        )
                    )
                about = {
                    "video": video.name,
                    "start_s": round(clip.start_s, 6),
                    "zoom": clip.zoom,
                    "crop": clip.crop,
                    **video.about(),
                }
                writer.add(
                    {**fields, CLIP_FIELD: json.dumps(about).encode()},
                    num_targets=config.context_length * encoder.num_patches,
                )
        shards = writer.close()
    finally:
        writer.abandon()
    return {
        "shards": shards,
        "num_videos": len(clips_of),
        "num_samples": writer.num_samples,
        "num_targets": writer.num_samples * config.context_length * encoder.num_patches,
    }


def _summary(name: str, split: SplitInfo, config: VideoDatasetConfig) -> str:
    return (
        f"{name}: {split.facts['num_videos']} videos, {split.num_samples} clips of "
        f"{config.context_length} + 1 frames, {config.interval_s} s apart, "
        f"in {len(split.shards)} shards of {sum(s.size for s in split.shards) / 2**20:.1f} MiB"
    )
