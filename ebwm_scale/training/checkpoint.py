"""Checkpoints that exist completely or not at all, written while training goes on.

    checkpoints/.staging-step_000100/   every rank writes its file here, and says so in rank_00000.done
        state-00000-of-00002.safetensors    its pieces of weights and optimizer state (pieces.py)
        replay_rank_0.pt                replay buffer, where there is one
        config.yaml, trainer.json       resolved configuration; step, data position, metrics, world size, code version
        manifest.json                   size and sha256 of each of these files
    checkpoints/step_000100/            the staging folder, renamed once all are done and on disk
    checkpoints/latest                  the name of the newest one, replaced in one rename
    checkpoints/best                    the same for the lowest validation loss

A save copies its state in memory; a thread of each rank writes it, the one of rank 0 publishes. Ranks meet in the file system, not in a
collective, so a slow disk delays nobody until the next save. A failed write (a full disk) leaves the previous checkpoint as it was, and
training goes on with a warning. Loading verifies sizes and hashes, and takes the newest checkpoint that passes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import save_file

from ..config import CheckpointConfig, Config, load_config
from ..data.manifest import file_sha256
from ..errors import CheckpointError, cut
from ..tensor_files import TensorFile
from .distributed import World
from .faults import Faults
from .pieces import EngineState

VERSION = 2
NAME = re.compile(r"step_(\d{6,})")
PATIENCE_S = 1800  # for the other ranks' parts


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


class CheckpointWriter:
    """Saves of one run. Every rank has one, and calls save at the same steps."""

    def __init__(
        self, root: Path, world: World, config: Config, warn: Callable[[str], None], faults: Faults
    ):
        self.root, self.world, self.config, self.warn, self.faults = (
            root,
            world,
            config,
            warn,
            faults,
        )
        self.thread: threading.Thread | None = None
        self.outcome: tuple[Path | None, str | None] | None = (
            None  # of the last finished save, until it is asked for
        )

    def save(self, state: EngineState, trainer: dict[str, Any], replay: dict | None) -> None:
        """Begin to save step trainer["step"]. Waits for the save before it, and for nothing else."""
        self.wait()
        tensors, ranges = {}, {}
        for piece in state.pieces():
            ranges[piece.name] = [piece.start, piece.values["weight"].numel()]
            for kind, values in piece.values.items():
                tensors[f"{kind}/{piece.name}"] = values.detach().to("cpu", copy=True)
        trainer = {
            "version": VERSION,
            "world_size": self.world.size,
            "updates": state.step_count(),
            **trainer,
        }
        shapes = {
            name: list(getattr(p, "ds_shape", p.shape))
            for name, p in state.module.named_parameters()
        }
        staging = self.root / f".staging-{checkpoint_name(trainer['step'])}"
        problem = None
        if self.world.is_main:
            try:
                self._io(staging.parent.mkdir, parents=True, exist_ok=True)
                for left_over in self.root.glob(".staging-*"):
                    shutil.rmtree(left_over)
                self._io(staging.mkdir)
            except OSError as error:
                problem = str(error)
        if self.world.any(problem is not None):  # also: no rank writes before the folder is there
            self.outcome = (None, self.world.agree(problem or ""))
            return
        self.thread = threading.Thread(
            target=self._write,
            args=(staging, tensors, ranges, shapes, trainer, replay),
            daemon=True,
            name="checkpoint",
        )
        self.thread.start()

    def wait(self) -> None:
        """Until the save in progress is published, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self._report()

    def poll(self) -> None:
        """Report a save that has finished meanwhile."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def _report(self) -> None:
        if self.outcome is not None:
            folder, problem = self.outcome
            self.outcome = None
            if folder is None and self.world.is_main:
                self.warn(
                    f"the checkpoint could not be written ({problem}); training goes on, the previous checkpoint is intact; free some space"
                )

    def _write(
        self,
        staging: Path,
        tensors: dict,
        ranges: dict,
        shapes: dict,
        trainer: dict,
        replay: dict | None,
    ) -> None:
        rank, size = self.world.rank, self.world.size
        problem, files = None, []
        try:
            self.faults.at("save")
            name = f"state-{rank:05d}-of-{size:05d}.safetensors"
            self._io(
                save_file,
                tensors,
                staging / name,
                metadata={"ranges": json.dumps(ranges), "shapes": json.dumps(shapes)},
            )
            files = [name]
            if replay is not None:
                files.append(f"replay_rank_{rank}.pt")
                self._io(torch.save, replay, staging / files[-1])
            entries = {}
            for name in files:
                self._io(_fsync, staging / name)
                entries[name] = {
                    "size": (staging / name).stat().st_size,
                    "sha256": file_sha256(staging / name),
                }
        except Exception as error:  # whatever it is, the others must hear of it
            problem = str(error) or type(error).__name__
        try:
            _replace_text(
                staging / f"rank_{rank:05d}.done",
                json.dumps({"problem": problem} if problem else {"files": entries}),
            )
        except OSError as error:
            problem = problem or str(error)
        if not self.world.is_main:
            self.outcome = (None if problem else staging, problem)
            return
        try:
            entries = self._collect(staging, size)
            self.outcome = (self._publish(staging, entries, trainer), None)
        except Exception as error:
            self.outcome = (None, str(error) or type(error).__name__)
            shutil.rmtree(staging, ignore_errors=True)

    def _collect(self, staging: Path, size: int) -> dict[str, dict]:
        """File entries of all ranks, when all are done; raises OSError with the first problem."""
        entries, deadline = {}, time.monotonic() + PATIENCE_S
        for rank in range(size):
            done = staging / f"rank_{rank:05d}.done"
            while not done.exists():
                if time.monotonic() > deadline:
                    raise OSError(f"rank {rank} has not written its part within {PATIENCE_S} s")
                time.sleep(0.01)
            said = json.loads(done.read_text())
            if "problem" in said:
                raise OSError(f"rank {rank}: {said['problem']}")
            entries |= said["files"]
        for rank in range(size):
            (staging / f"rank_{rank:05d}.done").unlink()
        return entries

    def _publish(self, staging: Path, entries: dict[str, dict], trainer: dict[str, Any]) -> Path:
        root, folder = self.root, self.root / checkpoint_name(trainer["step"])
        for name, text in (
            ("config.yaml", self.config.to_yaml()),
            ("trainer.json", json.dumps(trainer, indent=1)),
        ):
            self._io((staging / name).write_text, text, encoding="utf-8")
            self._io(_fsync, staging / name)
            entries[name] = {
                "size": (staging / name).stat().st_size,
                "sha256": file_sha256(staging / name),
            }
        self._io(
            (staging / "manifest.json").write_text,
            json.dumps({"version": VERSION, "files": entries}, indent=1),
            encoding="utf-8",
        )
        self._io(_fsync, staging / "manifest.json")
        self._io(_fsync, staging)
        if folder.exists():  # the same step saved again, after a fall-back to an earlier one
            replaced = root / f".staging-replaced-{folder.name}"
            self._io(os.replace, folder, replaced)
            try:
                self._io(os.replace, staging, folder)
            except OSError:
                os.replace(replaced, folder)
                raise
            shutil.rmtree(replaced)
        else:
            self._io(os.replace, staging, folder)
        self._io(_replace_text, root / "latest", folder.name + "\n")
        self._keep(folder, trainer)
        return folder

    def _keep(self, folder: Path, trainer: dict[str, Any]) -> None:
        """Point to the best one, and remove what is neither recent, nor best, nor a milestone."""
        rules, loss = self.config.checkpoint, trainer.get("validation_loss")
        best = _read(self.root / "best")
        if rules.keep_best and loss is not None:
            known = _loss_of(self.root / best) if best else None
            if known is None or loss < known:
                best = folder.name
                self._io(_replace_text, self.root / "best", best + "\n")
        for old in _folders(self.root)[rules.keep_last :]:
            if old.name != best and not _is_milestone(old, rules):
                doomed = self.root / f".staging-pruned-{old.name}"
                os.replace(old, doomed)  # never a half-deleted folder under a checkpoint's name
                shutil.rmtree(doomed)

    def _io(self, function: Callable, *arguments, **options):
        self.faults.at("io")
        return function(*arguments, **options)


def _is_milestone(folder: Path, rules: CheckpointConfig) -> bool:
    step = int(NAME.fullmatch(folder.name)[1])
    return rules.milestone_every_steps > 0 and step % rules.milestone_every_steps == 0


def _loss_of(folder: Path) -> float | None:
    try:
        return json.loads((folder / "trainer.json").read_text(encoding="utf-8")).get(
            "validation_loss"
        )
    except (OSError, ValueError):
        return None


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def _folders(root: Path) -> list[Path]:
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
    folders, problems = _folders(root), []
    for folder in folders:
        try:
            return verify(folder)
        except CheckpointError as error:
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
    return load_config(folder / "config.yaml")


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
    "refinement.recompute",
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
                    f"{name} was {cut(before)}, is {cut(value)}"
                )
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to another configuration: "
            + "; ".join(refused)
            + ". Resume with the saved one (config.yaml in the run folder), or start another run with --run-dir"
        )
    return allowed


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
