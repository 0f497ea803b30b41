"""From what is stored to what a model sees: (observed, targets) on its device, for text and for
video.

text    observed = tokens[:, :-1], targets = tokens[:, 1:]
video   the same of standardised embeddings (data/encoders/space.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.data.encoders.space import FrameSpace
from ebwm_scale.data.format.content import VideoContent
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

    def __call__(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Stored sequences (b, S + 1, ...) -> observed and targets.

        Both are (b, S) int64 or (b, S, dimension) float32.
        """
        states = sequences.to(self.device) if self.space is None else self.space.states(sequences)
        observed, targets = states[:, :-1], states[:, 1:]
        if self.masked_after is not None:
            targets = targets.masked_fill(observed == self.masked_after, IGNORE)
        return observed, targets
