"""Checkpoints: what one is, and reading them. checkpoint_writer.py writes them.

    checkpoints/step_000100/            there completely, or not at all
        state-00000-of-00002.safetensors    a rank's pieces of weights and optimizer state (pieces.py)
        replay_rank_0.pt                replay buffer, where there is one
        config.yaml, trainer.json       resolved configuration; step, data position, metrics, world size, code version
        manifest.json                   size and sha256 of each of these files
    checkpoints/latest                  the name of the newest one, for people and tools; a resume looks at the folders
    checkpoints/best                    the same for the lowest validation loss

Loading verifies sizes and hashes, and takes the newest checkpoint that passes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from ..config import Config, config_from_dict
from ..data.manifest import file_sha256
from ..errors import CheckpointError
from ..tensor_files import TensorFile
from .pieces import EngineState

VERSION = 2
NAME = re.compile(r"step_(\d{6,})")


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: its folder and trainer.json."""

    folder: Path
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return self.trainer["step"]


def published(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(
        (p for p in root.glob("step_*") if NAME.fullmatch(p.name)),
        key=lambda p: int(NAME.fullmatch(p.name)[1]),
        reverse=True,
    )


def verify(folder: Path) -> Saved:
    """The checkpoint in `folder` after checking every size and hash; CheckpointError names the first file that is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = manifest["files"].items()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no manifest.json, so this is no complete checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/manifest.json is damaged: {error}") from None
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint format {manifest.get('version')!r}; this release reads {VERSION}"
        )
    for name, entry in entries:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {entry['size']}: truncated"
            )
        if file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its hash: damaged")
    return Saved(folder, json.loads((folder / "trainer.json").read_text(encoding="utf-8")))


def find_latest(root: Path, warn: Callable[[str], None], *, strict: bool = False) -> Saved | None:
    """The newest checkpoint that verifies; None if there is none at all. Damaged ones are passed over with one line each.

    strict: the newest one, or CheckpointError.
    """
    folders, problems = published(root), []
    for folder in folders:
        try:
            return verify(folder)
        except CheckpointError as error:
            if not folder.exists():  # rotated away meanwhile: a newer one has been published
                return find_latest(root, warn, strict=strict)
            if strict:
                raise CheckpointError(
                    f"{error}; --strict takes no earlier checkpoint in its place: restore this one, or leave --strict out"
                ) from None
            problems.append(str(error))
            warn(f"{error}; trying the checkpoint before it")
    if problems:
        raise CheckpointError(
            f"{root}: none of {len(folders)} checkpoints can be used; start a new run folder, or restore one from a copy"
        )
    return None


class SavedState:
    """Whole float32 tensors of a checkpoint, whatever number of processes wrote it; one at a time, read from disk when asked for."""

    def __init__(self, folder: Path):
        self.files = [TensorFile(path) for path in sorted(folder.glob("state-*.safetensors"))]
        if not self.files:
            raise CheckpointError(
                f"{folder} holds no state-*.safetensors: it was written by another release; this one reads version {VERSION}"
            )
        self.ranges = [json.loads(file.metadata["ranges"]) for file in self.files]
        self.shapes: dict[str, list[int]] = json.loads(self.files[0].metadata["shapes"])
        self.held = [set(file.names()) for file in self.files]

    def read(self, name: str, kind: str = "weight") -> torch.Tensor:
        """Flattened; zeros where a moment does not exist yet. CheckpointError where the pieces do not cover the parameter."""
        if name not in self.shapes:
            raise CheckpointError(
                f"the checkpoint has no parameter {name}: it belongs to another model"
            )
        size = torch.Size(self.shapes[name]).numel()
        parts = [
            (file, held, *ranges[name])
            for file, held, ranges in zip(self.files, self.held, self.ranges)
            if name in ranges and ranges[name][1]
        ]
        covered = sum(count for *_, count in parts)
        if covered != size:
            raise CheckpointError(
                f"the checkpoint holds {covered} of {size} numbers of {name}: a process's file is missing"
            )
        if len(parts) == 1 and f"{kind}/{name}" in parts[0][1]:
            return parts[0][0].read(f"{kind}/{name}").float().view(-1)
        whole = torch.zeros(size)
        for file, held, start, count in parts:
            if kind == "weight" or f"{kind}/{name}" in held:
                whole[start : start + count] = file.read(f"{kind}/{name}").view(-1).float()
        return whole

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: self.read(name).view(shape) for name, shape in self.shapes.items()}


def load_into(saved: Saved, state: EngineState) -> None:
    """Weights and optimizer state of a verified checkpoint into a fresh engine of any world size and ZeRO stage."""
    source = SavedState(saved.folder)
    for name, p in state.module.named_parameters():
        shape = list(getattr(p, "ds_shape", p.shape))
        if source.shapes.get(name) != shape:
            raise CheckpointError(
                f"{saved.folder}: {name} has shape {source.shapes.get(name)}, the model has {shape}"
            )
    state.load(source.read, saved.trainer["updates"])


def load_replay(saved: Saved) -> dict | None:
    """The replay buffer of all ranks, merged; None if the checkpoint has none."""
    parts = [
        torch.load(path, weights_only=True)
        for path in sorted(saved.folder.glob("replay_rank_*.pt"))
    ]
    if not parts:
        return None
    return {
        **parts[0],
        "queues": {pair: queue for part in parts for pair, queue in part["queues"].items()},
    }


def saved_config(folder: Path) -> Config:
    """The resolved configuration beside a checkpoint or in a run folder."""
    import yaml

    return config_from_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))


FREE_TO_CHANGE = {"logging", "evaluation", "checkpoint", "optimizer", "schedule"}  # sections
FREE_KEYS = {
    "data.num_workers",
    "data.verify",
    "data.manifest",
    "train.max_minutes",
    "train.micro_batch_size",
    "train.max_steps",
    "model.attention_backend",
    "model.observed_backend",
    "refinement.checkpoint",
    "refinement.tile_rows",
    "refinement.compile",
    "deepspeed.zero_stage",
    "deepspeed.offload",
    "deepspeed.raw",
}


def check_same_run(saved: Config, current: Config) -> list[str]:
    """Differences that are allowed, as lines to print; raises CheckpointError for those that would make it another run."""
    allowed, refused = [], []
    for section, values in current.to_dict().items():
        for key, value in values.items():
            before, name = saved.to_dict()[section][key], f"{section}.{key}"
            if before != value:
                (allowed if section in FREE_TO_CHANGE or name in FREE_KEYS else refused).append(
                    f"{name} was {before}, is {value}"
                )
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to another configuration: "
            + "; ".join(refused)
            + ". Resume with the saved one (config.yaml in the run folder), or start another run with --run-dir"
        )
    return allowed
