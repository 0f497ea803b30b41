"""Checkpoints that exist completely or not at all.

    checkpoints/.staging-step_000100/   all ranks write here; agreed complete; hashed; fsynced
        engine/                         DeepSpeed's files: weights, optimizer state (one shard per rank under ZeRO)
        replay_rank_0.pt                replay buffer, where there is one
        config.yaml, trainer.json       resolved configuration; step, data position, world size
        manifest.json                   size and sha256 of each of these files
    checkpoints/step_000100/            the staging folder, renamed
    checkpoints/latest                  the name of the newest one, replaced in one rename

A failed write (a full disk) leaves the previous checkpoint as it was, and training goes on with a warning. Loading verifies sizes and
hashes, and takes the newest checkpoint that passes.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from ..config import Config, config_from_dict
from ..data.manifest import file_hashes, file_sha256
from ..errors import CheckpointError
from .distributed import World
from .engine import Engine

VERSION = 1
NAME = re.compile(r"step_(\d{6,})")
ENGINE_TAG = "engine"


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


class _RecordingWriter:
    """DeepSpeed's checkpoint engine, with write errors kept for afterwards: an exception on one rank would leave the others in a barrier."""

    def __init__(self, inner):
        self.inner, self.error = inner, None

    def save(self, state_dict, path):
        if self.error is None:
            try:
                self.inner.save(state_dict, path)
            except (OSError, RuntimeError) as error:        # torch's writer reports a full disk as RuntimeError
                self.error = error

    def __getattr__(self, name):
        return getattr(self.inner, name)


def save_checkpoint(root: Path, engine: Engine, world: World, *, config: Config, trainer: dict[str, Any], replay: dict | None,
                    keep_last: int, warn: Callable[[str], None]) -> Path | None:
    """Save step trainer["step"]; all ranks call it. Returns the folder, or None after a failed write (which `warn` is told of)."""
    folder = root / checkpoint_name(trainer["step"])
    staging = root / f".staging-{folder.name}"
    error: Exception | None = None
    try:
        if world.is_main:
            root.mkdir(parents=True, exist_ok=True)
            for left_over in root.glob(".staging-*"):
                shutil.rmtree(left_over)
            staging.mkdir()
    except OSError as problem:
        error = problem
    if world.any(error is not None):
        return _give_up(staging, world, error, warn)
    inner = engine.deepspeed.checkpoint_engine
    writer = _RecordingWriter(inner)
    engine.deepspeed.checkpoint_engine = writer
    try:
        engine.deepspeed.save_checkpoint(str(staging), tag=ENGINE_TAG, client_state={}, save_latest=False)
    finally:
        engine.deepspeed.checkpoint_engine = inner
    error = writer.error
    if replay is not None and error is None:
        try:
            torch.save(replay, staging / f"replay_rank_{world.rank}.pt")
        except (OSError, RuntimeError) as problem:
            error = problem
    if world.any(error is not None):
        return _give_up(staging, world, error, warn)
    if world.is_main:
        try:
            _publish(root, staging, folder, config, trainer, world)
            _prune(root, keep_last)
        except OSError as problem:
            error = problem
    if world.any(error is not None):
        return _give_up(staging, world, error, warn)
    return folder


def _publish(root: Path, staging: Path, folder: Path, config: Config, trainer: dict[str, Any], world: World) -> None:
    (staging / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (staging / "trainer.json").write_text(json.dumps({"version": VERSION, "world_size": world.size, **trainer}, indent=1), encoding="utf-8")
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    entries = {str(path.relative_to(staging)): {"size": path.stat().st_size, "sha256": digest} for path, digest in zip(files, file_hashes(files))}
    (staging / "manifest.json").write_text(json.dumps({"version": VERSION, "files": entries}, indent=1), encoding="utf-8")
    for path in [*files, staging / "manifest.json", *(p for p in staging.rglob("*") if p.is_dir()), staging]:
        _fsync(path)
    if folder.exists():                     # the same step saved again, after a fall-back to an earlier one
        replaced = root / f".staging-replaced-{folder.name}"
        os.replace(folder, replaced)
        os.replace(staging, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(staging, folder)
    pointer = root / ".latest"
    pointer.write_text(folder.name + "\n", encoding="utf-8")
    _fsync(pointer)
    os.replace(pointer, root / "latest")
    _fsync(root)


def _give_up(staging: Path, world: World, error: Exception | None, warn: Callable[[str], None]) -> None:
    reason = world.agree("" if error is None else str(error)) or "a rank could not write its part"
    if world.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        warn(f"the checkpoint could not be written ({reason}); training goes on, the previous checkpoint is intact; free some space")
    world.barrier()
    return None


def _prune(root: Path, keep_last: int) -> None:
    for folder in _folders(root)[keep_last:]:
        doomed = root / f".staging-pruned-{folder.name}"
        os.replace(folder, doomed)          # never a half-deleted folder under a checkpoint's name
        shutil.rmtree(doomed)


def _folders(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted((p for p in root.glob("step_*") if NAME.fullmatch(p.name)), key=lambda p: int(NAME.fullmatch(p.name)[1]), reverse=True)


def verify(folder: Path) -> Saved:
    """The checkpoint in `folder` after checking every size and hash; CheckpointError names the first file that is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = manifest["files"].items()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no manifest.json, so this is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/manifest.json is damaged: {error}") from None
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder}: checkpoint format {manifest.get('version')!r}; this release reads {VERSION}")
    for name, entry in entries:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['size']}: truncated")
        if file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its hash: damaged")
    return Saved(folder, json.loads((folder / "trainer.json").read_text(encoding="utf-8")))


def find_latest(root: Path, warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint that verifies; None if there is none at all. Damaged ones are passed over with one line each."""
    folders, problems = _folders(root), []
    for folder in folders:
        try:
            return verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"{error}; trying the checkpoint before it")
    if problems:
        raise CheckpointError(f"{root}: none of {len(folders)} checkpoints can be used; start a new run folder, or restore one from a copy")
    return None


def load_into(saved: Saved, engine: Engine, world: World) -> None:
    """Weights and optimizer state of a verified checkpoint into a fresh engine of the same world size and ZeRO stage."""
    path, _ = engine.deepspeed.load_checkpoint(str(saved.folder), tag=ENGINE_TAG, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{saved.folder}/{ENGINE_TAG}: DeepSpeed found nothing to load")


def load_replay(saved: Saved) -> dict | None:
    """The replay buffer of all ranks, merged; None if the checkpoint has none."""
    parts = [torch.load(path, weights_only=True) for path in sorted(saved.folder.glob("replay_rank_*.pt"))]
    if not parts:
        return None
    return {**parts[0], "queues": {pair: queue for part in parts for pair, queue in part["queues"].items()}}


def saved_config(folder: Path) -> Config:
    """The resolved configuration beside a checkpoint or in a run folder."""
    import yaml
    return config_from_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))


FREE_TO_CHANGE = {"logging", "evaluation", "checkpoint", "optimizer", "schedule"}         # sections
FREE_KEYS = {"data.num_workers", "data.verify", "data.manifest", "train.max_minutes", "train.micro_batch_size", "train.max_steps",
             "model.attention_backend", "model.observed_backend", "refinement.checkpoint", "deepspeed.raw"}


def check_same_run(saved: Config, current: Config) -> list[str]:
    """Differences that are allowed, as lines to print; raises CheckpointError for those that would make it another run."""
    allowed, refused = [], []
    for section, values in current.to_dict().items():
        for key, value in values.items():
            before, name = saved.to_dict()[section][key], f"{section}.{key}"
            if before != value:
                (allowed if section in FREE_TO_CHANGE or name in FREE_KEYS else refused).append(f"{name} was {before}, is {value}")
    if refused:
        raise CheckpointError("the checkpoint belongs to another configuration: " + "; ".join(refused)
                              + ". Resume with the saved one (config.yaml in the run folder), or start another run with --run-dir")
    return allowed


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
