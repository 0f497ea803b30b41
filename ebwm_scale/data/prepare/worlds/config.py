"""Everything that decides what a dataset of a world holds, beside its source."""

from __future__ import annotations

import dataclasses
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.conditions import name_problem
from ebwm_scale.data.format.content import STORED
from ebwm_scale.data.prepare.worlds.columns import ColumnConfig

DEFAULT_FPS = 10.0  # where a source does not say


@dataclasses.dataclass(frozen=True)
class WorldDatasetConfig:
    """Defaults are those of tools/make_world_shards.py.

    context_length: frames observed; a clip has one more. stride: steps of the source between the
    starts of clips; None: a clip's length, so that clips share one frame. frame_skip: steps of the
    source for each of the dataset. dense: conditions that keep all of them, side by side.
    """

    context_length: int = 16
    stride: int | None = None
    frame_skip: int = 1
    height: int = 64
    width: int = 64
    fps: float | None = None  # frames a second of the source, where it does not say
    columns: ColumnConfig = dataclasses.field(default_factory=ColumnConfig)
    dense: tuple[str, ...] = ("action",)
    stored: str = "embedding"
    quality: int = 95
    encoder: str = "pca"
    encoder_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    patches: bool = True  # a frame becomes a grid of patches, each a state
    drop_bad: bool = False  # leave out episodes with something wrong, instead of ending
    validation_fraction: float = 0.1
    seed: int = 0  # of the split
    samples_per_shard: int = 512

    def __post_init__(self):
        names = ("context_length", "frame_skip", "height", "width", "samples_per_shard")
        for name in (*names, "stride", "fps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise DataError(f"{name.replace('_', ' ')} is {value}: must be above 0")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}: must be from 1 to 100")
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation fraction is {self.validation_fraction}: must lie between 0 and 1"
            )
        if self.stored not in STORED:
            raise DataError(f"store is {self.stored}: must be one of {', '.join(STORED)}")
        conditions = self.columns.conditions
        for name in conditions:
            problem = name_problem(name)
            if problem is not None:
                raise DataError(f"condition {name}: {problem}")
        if len(set(conditions)) < len(conditions):
            raise DataError(f"conditions are {', '.join(conditions)}: name each once")

    @property
    def span(self) -> int:
        """Steps of the source from a clip's first frame to its last."""
        return self.context_length * self.frame_skip

    @property
    def clip_stride(self) -> int:
        return self.stride or self.span

    def settings(self) -> dict[str, Any]:
        """For the manifest; without what only decides whether a preparation ends early."""
        values = dataclasses.asdict(self)
        del values["drop_bad"]
        return values
