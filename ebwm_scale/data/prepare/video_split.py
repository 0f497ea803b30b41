"""Which clips train and which validate: whole videos, or the last part of each in time."""

from __future__ import annotations

from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.clips import Clip, read_clips
from ebwm_scale.data.prepare.splitting import split_documents
from ebwm_scale.data.prepare.video_config import VideoDatasetConfig
from ebwm_scale.data.prepare.video_sources import Video
from ebwm_scale.data.walking import Report

Clips = list[tuple[Video, Path, list[Clip]]]  # of each video, in order


def split_clips(
    parts: list[tuple[Video, Path]], config: VideoDatasetConfig, report: Report
) -> dict[str, Clips]:
    """The clips of each split; those of validation without the windows that further zooms add to
    training.
    """
    result = _by_video_or_time(parts, config, report)
    result["validation"] = [
        (video, path, [clip for clip in clips if clip.zoom == config.zooms[0]])
        for video, path, clips in result["validation"]
    ]
    return result


def _by_video_or_time(
    parts: list[tuple[Video, Path]], config: VideoDatasetConfig, report: Report
) -> dict[str, Clips]:
    videos = [video for video, _ in parts]
    clips = {video: read_clips(path) for video, path in parts}
    by_time = config.split == "time" or (
        config.split == "auto" and len(videos) == 1 and not config.validation_videos
    )
    if by_time:
        gap = config.clips.span_s if config.gap_s is None else config.gap_s
        report(
            f"split by time: the last {config.validation_fraction:.0%} of each video is "
            f"validation, {gap:g} s before it are left out"
        )
        result: dict[str, Clips] = {"train": [], "validation": []}
        longest_s = 0.0
        for video, path in parts:
            end = max(clip.start_s for clip in clips[video]) + config.clips.span_s
            longest_s = max(longest_s, end)
            border = end * (1 - config.validation_fraction)
            early = [
                clip for clip in clips[video] if clip.start_s + config.clips.span_s <= border - gap
            ]
            late = [clip for clip in clips[video] if clip.start_s >= border]
            result["train"] += [(video, path, early)] * bool(early)
            result["validation"] += [(video, path, late)] * bool(late)
        for name, found in result.items():
            if not found:
                raise DataError(
                    f"split by time leaves the {name} split without a clip: the longest video is "
                    f"{longest_s:g} s, too short for clips of {config.clips.span_s:g} s, a gap of "
                    f"{gap:g} s and a validation fraction of {config.validation_fraction}; change "
                    "one of them, or the stride"
                )
        return result
    if config.validation_videos:
        unknown = set(config.validation_videos) - {video.name for video in videos}
        held_out = [video for video in videos if video.name in config.validation_videos]
        if unknown or len(held_out) == len(videos):
            raise DataError(
                f"validation videos {', '.join(config.validation_videos)}: must be some of "
                f"{', '.join(v.name for v in videos)}, and not all"
            )
        chosen = {"train": [v for v in videos if v not in held_out], "validation": held_out}
    else:
        chosen = split_documents(
            videos, validation_fraction=config.validation_fraction, seed=config.seed
        )
    paths = dict(parts)
    return {
        name: [(video, paths[video], clips[video]) for video in members]
        for name, members in chosen.items()
    }
