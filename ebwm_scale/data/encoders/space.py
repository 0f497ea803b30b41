"""The space in which a video model lives: an encoder's embeddings, standardised with the statistics
of the training frames.

frames --encode--> embeddings --standardise--> states     in training, evaluation, generation
states --restore--> embeddings --decode--> frames         for people to look at
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ebwm_scale.data.encoders import FrameEncoder, load_encoder
from ebwm_scale.data.format.content import VideoContent


class FrameSpace:
    """Of a video dataset.

    The encoder is loaded when it is first needed: never, where embeddings are stored and nobody
    looks at frames.
    """

    def __init__(self, content: VideoContent, device: torch.device | str = "cpu"):
        self.content, self.device = content, torch.device(device)
        self.mean, self.std = (
            torch.from_numpy(v).to(self.device) for v in (content.mean, content.std)
        )

    @functools.cached_property
    def encoder(self) -> FrameEncoder:
        return load_encoder(self.content, self.device)

    @torch.no_grad()
    def states(self, sequences: Tensor) -> Tensor:
        """Stored sequences -> states float32 (b, S, dimension).

        They are embeddings (b, S, dimension) or uint8 frames (b, F, height, width, 3), where S is
        F times the patches of a frame.
        """
        sequences = sequences.to(self.device)
        if sequences.dtype == torch.uint8:
            embeddings = self.encoder.encode(sequences.flatten(0, 1))
            embeddings = embeddings.reshape(len(sequences), -1, self.content.dimension)
        else:
            embeddings = sequences
        return (embeddings.float() - self.mean) / self.std

    @torch.no_grad()
    def frames(self, states: Tensor) -> Tensor | None:
        """States (b, S, dimension) -> uint8 frames (b, F, height, width, 3), F = S / patches of a
        frame; None where the encoder cannot go back.
        """
        embeddings = (states * self.std + self.mean).flatten(0, 1).float()
        if self.content.grid is not None:
            embeddings = embeddings.view(-1, self.content.group_size, self.content.dimension)
        decoded = self.encoder.decode(embeddings)
        return None if decoded is None else decoded.view(len(states), -1, *decoded.shape[1:])
