"""Everything that decides what a dataset of clips holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.content import STORED
from ebwm_scale.data.prepare.clips import ClipConfig
from ebwm_scale.data.prepare.video_sources import IMAGE_RATE


@dataclasses.dataclass(frozen=True)
class VideoDatasetConfig:
    """All that decides what a dataset holds; defaults are those of tools/make_video_shards.py."""

    context_length: int = 16
    interval_s: float = 0.25
    # between the starts of clips; default: context_length * interval_s, so that clips share one
    # frame
    stride_s: float | None = None
    height: int = 224
    width: int = 224
    crops: int = 1  # windows along the longer side
    # 2: windows of half the size, and twice as many along each side; validation has the first zoom
    # only
    zooms: tuple[int, ...] = (1,)
    stored: str = "embedding"
    quality: int = 95
    encoder: str = "pca"
    encoder_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    patches: bool = False  # a frame becomes a grid of patches, each a state, not one vector
    split: str = "auto"  # video, time, or auto: by video where there are several
    validation_fraction: float = 0.1
    validation_videos: tuple[str, ...] = ()  # names, instead of a fraction
    # split time: between training and validation; default: a clip's length
    gap_s: float | None = None
    seed: int = 0
    samples_per_shard: int = 512
    stream: int | None = None  # number of the video stream in each file; None: what players show
    image_rate: float = IMAGE_RATE  # images a second, of folders of images

    def __post_init__(self):
        for name in (
            "context_length",
            "interval_s",
            "height",
            "width",
            "crops",
            "samples_per_shard",
        ):
            if getattr(self, name) <= 0:
                raise DataError(
                    f"{name.replace('_', ' ')} is {getattr(self, name)}: must be above 0"
                )
        if not self.zooms or min(self.zooms) < 1:
            raise DataError(f"zooms are {list(self.zooms)}: must be whole numbers from 1 on")
        if self.stride_s is not None and self.stride_s <= 0:
            raise DataError(f"stride is {self.stride_s}: must be above 0 seconds")
        if self.stream is not None and self.stream < 0:
            raise DataError(f"stream is {self.stream}: must be 0 or above")
        if not 0 < self.image_rate <= 1000:
            raise DataError(f"image rate is {self.image_rate}: must be above 0 and at most 1000")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}: must be from 1 to 100")
        if self.stored not in STORED or self.split not in ("auto", "video", "time"):
            raise DataError(
                f"store is {self.stored!r} and split {self.split!r}: allowed are "
                f"{', '.join(STORED)}, and auto, video, time"
            )

    @property
    def clips(self) -> ClipConfig:
        return ClipConfig(
            context_length=self.context_length,
            interval_s=self.interval_s,
            stride_s=self.stride_s or self.context_length * self.interval_s,
            height=self.height,
            width=self.width,
            crops=self.crops,
            zooms=tuple(self.zooms),
            quality=self.quality,
            stored="jpeg" if self.stored == "embedding" else self.stored,
            stream=self.stream,
            image_rate=self.image_rate,
        )
