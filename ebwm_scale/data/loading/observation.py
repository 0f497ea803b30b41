"""From what is stored to what a model sees: (observed, targets) on its device, for text and for
video.

text    observed = tokens[:, :-P], targets = tokens[:, P:], P = group_size, 1 for ordinary text;
        targets that are not scored become IGNORE
video   the same of standardised embeddings (data/encoders/space.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.data.encoders.space import FrameSpace
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
        if isinstance(self.content, VideoContent):
            self.space = FrameSpace(self.content, device)
        elif mask_document_starts:
            self.masked_after = self.content.eos_id
        self.group_size = 1
        self.is_marked = False  # whether tokens say that they are not scored
        if isinstance(self.content, TextContent):
            self.group_size = self.content.group_size
            self.is_marked = "scored" in self.content.members

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
