"""A trained model from a run folder, a checkpoint folder or a converted one, without an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from ebwm_scale.checkpoint.model_folder import ModelFolder, is_consolidated
from ebwm_scale.checkpoint.parameter_shard import AVERAGE
from ebwm_scale.checkpoint.reader import (
    CheckpointInfo,
    CheckpointReader,
    find_latest,
    saved_config,
    verify,
)
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError, UserError
from ebwm_scale.world_model import WorldModel

Weights = Literal["trained", "ema"]


def load_checkpoint(
    path: str | Path, *, device: torch.device | str = "cpu", weights: Weights = "trained"
) -> tuple[WorldModel, Config]:
    """(model in eval mode, in float32, resolved Config).

    weights: trained, or ema for their average (train.ema). Raises CheckpointError for what is no
    checkpoint, a damaged one, or one without the average.
    """
    folder, warn = Path(path), (lambda text: print(f"warning: {text}", file=sys.stderr))
    if is_consolidated(folder):
        if weights == "ema":
            raise CheckpointError(
                f"{folder} is a converted folder, which holds one set of weights (--weights ema): "
                "convert the run again with --weights ema, and leave the option out here"
            )
        config, source = saved_config(folder), ModelFolder(folder)
        return build(
            config, {name: source.read(name).float() for name in source.files}, where=folder
        ).to(device).eval(), config
    while True:
        saved: CheckpointInfo | None = (
            verify(folder)
            if (folder / "manifest.json").exists()
            else find_latest(folder / "checkpoints", warn)
        )
        if saved is None:
            raise CheckpointError(
                f"{folder}: neither a run folder with checkpoints, nor a checkpoint folder, nor "
                "one of tools/convert_checkpoint.py"
            )
        try:
            config = saved_config(saved.folder)
            reader = CheckpointReader(saved.folder)
            if weights == "ema":
                reader.refuse_without_average(saved.folder)
            chosen = reader.weights(AVERAGE if weights == "ema" else "weight")
            model = build(config, chosen, where=saved.folder)
        except (UserError, OSError):  # whichever of its files was being read
            if saved.folder.exists():
                raise
            warn(f"{saved.folder} was removed by the run that goes on there; looking again")
        else:
            return model.to(device).eval(), config


def build(
    config: Config, weights: dict[str, torch.Tensor], *, where: object = "the weights"
) -> WorldModel:
    """The model of a configuration with these weights, in their precision.

    Raises CheckpointError with every mismatch.
    """
    refuse_mismatches(
        expected_shapes(config),
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        where,
    )
    with torch.device("meta"):
        model = WorldModel(config)
    model.load_state_dict(weights, assign=True)
    return model


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of the parameters that a configuration means, in their order; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in WorldModel(config).named_parameters()}


def refuse_mismatches(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: object
) -> None:
    """CheckpointError that lists what is missing, what is too much and what has another shape."""
    problems = [
        f"{name} {list(shape)} is missing" for name, shape in expected.items() if name not in found
    ]
    problems += [
        f"{name} {list(shape)} belongs to no parameter"
        for name, shape in found.items()
        if name not in expected
    ]
    problems += [
        f"{name} has shape {list(found[name])}, the configuration means {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{where}: does not fit the configuration:\n  " + "\n  ".join(problems)
        )
