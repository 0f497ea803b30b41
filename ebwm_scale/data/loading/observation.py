"""From what is stored to what a model sees: (observed, targets) on its device, for text and for
video.

text    observed = tokens[:, :-P], targets = tokens[:, P:], P = group_size, 1 for ordinary text;
        targets that are not scored become IGNORE
video   the same of standardised embeddings (data/encoders/space.py), P the patches of a frame
        and their conditions beside (data/format/conditions.py): observe.conditions(...)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.data.encoders.space import FrameSpace
from ebwm_scale.data.format.conditions import Condition
from ebwm_scale.data.format.content import TextContent, VideoContent
from ebwm_scale.data.format.manifest import Manifest


class Observation:
    """mask_document_starts: the first token of a document is no target, since nothing before it
    tells of it.
    """

    def __init__(
        self, manifest: Manifest, device: torch.device | str, *, mask_document_starts: bool = False
    ):
        self.content, self.device = manifest.content, torch.device(device)
        self.space: FrameSpace | None = None
        self.masked_after: int | None = None  # the token before a document's first
        self.group_size = 1
        self.is_marked = False  # whether tokens say that they are not scored
        self._conditions: tuple[Condition, ...] = ()
        if isinstance(self.content, VideoContent):
            self.space = FrameSpace(self.content, device)
            self.group_size = self.content.group_size
            self._conditions = self.content.conditions
        elif mask_document_starts:
            self.masked_after = self.content.eos_id
        if isinstance(self.content, TextContent):
            self.group_size = self.content.group_size
            self.is_marked = self.content.is_marked
        self._statistics = {
            condition.name: tuple(
                torch.from_numpy(values).to(self.device)
                for values in (condition.mean, condition.std)
            )
            for condition in self._conditions
            if not condition.is_discrete
        }

    def __call__(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Stored sequences (b, S + group_size, ...) -> observed and targets.

        Both are (b, S) int64 or (b, S, dimension) float32.
        """
        states = sequences.to(self.device) if self.space is None else self.space.states(sequences)
        observed, targets = states[:, : -self.group_size], states[:, self.group_size :]
        if self.is_marked:  # unscored tokens t come as -1 - t (data/format/scored.py)
            observed = torch.where(observed < 0, -1 - observed, observed)
            targets = targets.masked_fill(targets < 0, IGNORE)
        if self.masked_after is not None:
            targets = targets.masked_fill(observed == self.masked_after, IGNORE)
        return observed, targets

    def conditions(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch's conditions as a model takes them, on its device, in the manifest's order.

        stored: (b, steps, width) each, as in Batch.conditions. Continuous ones become float32,
        standardised; the values of discrete ones stay int64.
        """
        conditions = {}
        for condition in self._conditions:
            values = stored[condition.name].to(self.device)
            if not condition.is_discrete:
                mean, std = self._statistics[condition.name]
                values = (values.float() - mean) / std
            conditions[condition.name] = values
        return conditions

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """(mean, std) float32 (width,) of a continuous condition, on the device."""
        mean, std = self._statistics[name]
        return mean, std

    def restored(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back, from a model's conditions to stored ones; differentiable."""
        stored = dict(conditions)
        for name, (mean, std) in self._statistics.items():
            stored[name] = conditions[name] * std + mean
        return stored
