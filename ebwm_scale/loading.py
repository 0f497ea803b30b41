"""A trained model from a run folder or a checkpoint folder, without an engine."""
from __future__ import annotations

from pathlib import Path

import torch

from .config import Config
from .errors import CheckpointError
from .model.world_model import WorldModel
from .training.checkpoint import ENGINE_TAG, Saved, find_latest, saved_config, verify


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[WorldModel, Config]:
    """(model in eval mode, in float32, resolved Config). Raises CheckpointError for what is no checkpoint, or a damaged one.

    A checkpoint is read with pickle, as DeepSpeed writes it: load only those you trust.
    """
    folder, warn = Path(path), (lambda text: print(f"warning: {text}"))
    saved: Saved | None = verify(folder) if (folder / "manifest.json").exists() else find_latest(folder / "checkpoints", warn)
    if saved is None:
        raise CheckpointError(f"{folder}: neither a run folder with checkpoints nor a checkpoint folder")
    config = saved_config(saved.folder)
    model = WorldModel(config)
    model.load_state_dict(_weights(saved, config))
    return model.to(device).eval(), config


def _weights(saved: Saved, config: Config) -> dict[str, torch.Tensor]:
    """The float32 weights: of the optimizer's master copy where training ran in bf16 or sharded, else of the module."""
    if config.deepspeed.zero_stage > 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        return get_fp32_state_dict_from_zero_checkpoint(str(saved.folder), tag=ENGINE_TAG)
    states = torch.load(saved.folder / ENGINE_TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return {name: tensor.float() for name, tensor in states["module"].items()}
