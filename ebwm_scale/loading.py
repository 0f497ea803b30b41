"""A trained model from a run folder or a checkpoint folder, without an engine."""
from __future__ import annotations

from pathlib import Path

import torch

from .config import Config
from .errors import CheckpointError
from .model.world_model import WorldModel
from .training.checkpoint import Saved, SavedState, find_latest, saved_config, verify


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[WorldModel, Config]:
    """(model in eval mode, in float32, resolved Config). Raises CheckpointError for what is no checkpoint, or a damaged one."""
    folder, warn = Path(path), (lambda text: print(f"warning: {text}"))
    saved: Saved | None = verify(folder) if (folder / "manifest.json").exists() else find_latest(folder / "checkpoints", warn)
    if saved is None:
        raise CheckpointError(f"{folder}: neither a run folder with checkpoints nor a checkpoint folder")
    config = saved_config(saved.folder)
    model = WorldModel(config)
    model.load_state_dict(SavedState(saved.folder).weights())
    return model.to(device).eval(), config

