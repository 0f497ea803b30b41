"""Checkpoints: what one is, and reading them. checkpoint/writer.py writes them.

    checkpoints/step_000100/       there completely, or not at all
        state-00000-of-00002.safetensors
                                   a rank's shards of weights and optimizer state
                                   (training/deepspeed/zero_state.py)
        replay_rank_0.pt           replay buffer, where there is one
        config.yaml                resolved configuration
        trainer.json               step, data position, metrics, world size, code version
        manifest.json              size and sha256 of each of these files, and its own
                                   (checkpoint/files.py)
    checkpoints/latest             the name of the newest one, for people and tools;
                                   a resume looks at the folders
    checkpoints/best               the same for the lowest validation loss

Loading verifies sizes and hashes, and takes the newest checkpoint that passes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebwm_scale.checkpoint.files import VERSION, check_files
from ebwm_scale.checkpoint.parameter_shard import AVERAGE, KINDS, OF_WEIGHTS, TrainingState
from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.plain_text import cut, shorten, shown
from ebwm_scale.core.redaction import redacted
from ebwm_scale.core.strict_json import is_whole, parse
from ebwm_scale.core.tensor_files import TensorFile

NAME = re.compile(r"step_(\d{6,})")


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(name: str) -> int:
    """The step of a checkpoint folder's name; ValueError for any other name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no checkpoint's name")
    return int(match[1])


@dataclass(frozen=True)
class CheckpointInfo:
    """A verified checkpoint: its folder and trainer.json."""

    folder: Path
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return self.trainer["step"]


def published(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    folders = [path for path in root.glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: step_of(path.name), reverse=True)


def verify(folder: Path) -> CheckpointInfo:
    """The checkpoint in `folder` after checking that its files are exactly those that were saved.

    Raises CheckpointError naming the first file that is wrong, whatever is wrong with it.
    """
    check_files(folder)
    CheckpointReader(
        folder
    )  # its headers must describe the same parameters; nothing of them is read yet
    return CheckpointInfo(folder, _trainer_values(folder / "trainer.json"))


def _trainer_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))  # a loss in it may be NaN
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {shorten(str(error))}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds {shown(values)}")
    for key, lowest in (("step", 0), ("world_size", 1)):
        value = values.get(key)
        if not is_whole(value) or value < lowest:
            raise CheckpointError(
                f"{path} is damaged: {key} is {shown(value)}, expected a whole number from {lowest}"
            )
    if type(values.get("updates")) not in (int, float):
        raise CheckpointError(f"{path} is damaged: updates is {shown(values.get('updates'))}")
    return values


def find_latest(
    root: Path, warn: Callable[[str], None], *, strict: bool = False
) -> CheckpointInfo | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Damaged ones are passed over with one line each.

    strict: the newest one, or CheckpointError.
    """
    folders, problems = published(root), []
    for folder in folders:
        try:
            return verify(folder)
        except CheckpointError as error:
            # rotated away meanwhile: a newer one has been published; a link to nothing stays
            if not os.path.lexists(folder):
                return find_latest(root, warn, strict=strict)
            if strict:
                raise CheckpointError(
                    f"{error}; --strict takes no earlier checkpoint in its place: restore this "
                    "one, or leave --strict out"
                ) from None
            problems.append(str(error))
            warn(f"{error}; trying the checkpoint before it")
    if problems:
        raise CheckpointError(
            f"{root}: none of {len(folders)} checkpoints can be used; start a new run folder, or "
            "restore one from a copy"
        )
    return None


class CheckpointReader:
    """Whole float32 tensors of a checkpoint, whatever number of processes wrote it; one at a time,
    read from disk when asked for.
    """

    def __init__(self, folder: Path):
        self.files = [TensorFile(path) for path in sorted(folder.glob("state-*.safetensors"))]
        if not self.files:
            raise CheckpointError(
                f"{folder} holds no state-*.safetensors: it was written by another release; this "
                f"one reads version {VERSION}"
            )
        described = [_described(file) for file in self.files]
        self.ranges = [ranges for ranges, _ in described]
        self.shapes: dict[str, list[int]] = described[0][1]
        for file, (_, shapes) in zip(self.files, described):
            if shapes != self.shapes:
                raise CheckpointError(
                    f"{file.path}: its parameters are not those of {self.files[0].path.name}: "
                    "damaged"
                )
        self.held = [set(file.names()) for file in self.files]

    def read(self, name: str, kind: str = "weight") -> torch.Tensor:
        """Flattened; zeros where a moment does not exist yet, the weights where they have no
        average: those of a frozen parameter, and all of a run without train.ema.

        CheckpointError where the shards do not cover the parameter.
        """
        if name not in self.shapes:
            raise CheckpointError(
                f"the checkpoint has no parameter {name}: it belongs to another model"
            )
        size = torch.Size(self.shapes[name]).numel()
        parts = [
            (file, held, ranges[name][0], ranges[name][1])
            for file, held, ranges in zip(self.files, self.held, self.ranges)
            if name in ranges and ranges[name][1]
        ]
        covered = sum(count for _, _, _, count in parts)
        if covered != size:
            raise CheckpointError(
                f"the checkpoint holds {covered} of {size} numbers of {name}: a process's file is "
                "missing"
            )
        if kind in OF_WEIGHTS:
            have_it = [f"{kind}/{name}" in held for _, held, _, _ in parts]
            if not any(have_it):
                kind = "weight"
            elif not all(have_it):
                raise CheckpointError(
                    f"the checkpoint holds only a part of the average of {name}: a process's file "
                    "is damaged"
                )
        if len(parts) == 1 and f"{kind}/{name}" in parts[0][1]:
            return parts[0][0].read(f"{kind}/{name}").float().view(-1)
        whole = torch.zeros(size)
        for file, held, start, count in parts:
            if kind == "weight" or f"{kind}/{name}" in held:
                whole[start : start + count] = file.read(f"{kind}/{name}").view(-1).float()
        return whole

    def weights(self, kind: str = "weight") -> dict[str, torch.Tensor]:
        """kind: weight, or ema for their average."""
        return {name: self.read(name, kind).view(shape) for name, shape in self.shapes.items()}

    def holds(self, kind: str) -> bool:
        """Whether a parameter has numbers of this kind: ema where there is an average."""
        return any(name.startswith(f"{kind}/") for held in self.held for name in held)

    def refuse_without_average(self, where: Path) -> None:
        """CheckpointError where there is no average of the weights."""
        if not self.holds(AVERAGE):
            raise CheckpointError(
                f"{where} holds no average of the weights (--weights ema): it is kept by a run "
                "with train.ema or optimizer.name schedule_free; leave the option out"
            )


def _described(file: TensorFile) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(ranges, shapes) of a state file: {parameter: [start, count]} that it holds, {parameter:
    shape} of all there are.
    """
    try:
        ranges = parse(file.metadata["ranges"].encode())
        shapes = parse(file.metadata["shapes"].encode())
        for name, (start, count) in ranges.items():
            size = torch.Size(shapes[name]).numel()
            if not (is_whole(start) and is_whole(count) and 0 <= start <= start + count <= size):
                raise ValueError(f"{shown(name)} begins at {shown(start)} and has {shown(count)}")
        if not {f"weight/{name}" for name in ranges} <= set(file.names()):
            raise ValueError("weights are missing")
        for name in file.names():
            kind, _, parameter = name.partition("/")
            if kind not in KINDS or file.shape(name) != (ranges[parameter][1],):
                raise ValueError(f"{shown(name)} has the shape {shown(file.shape(name))}")
        for shape in shapes.values():
            if not all(is_whole(size) and size >= 0 for size in shape):
                raise ValueError(f"a parameter has the shape {shown(shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{file.path}: its metadata do not describe a checkpoint ({shorten(str(error))}): "
            "damaged"
        ) from None
    return ranges, shapes


def load_into(saved: CheckpointInfo, state: TrainingState) -> None:
    """Weights and optimizer state of a verified checkpoint into a fresh engine of any world size
    and ZeRO stage.
    """
    source = CheckpointReader(saved.folder)
    for name, p in state.module.named_parameters():
        shape = list(getattr(p, "ds_shape", p.shape))
        if source.shapes.get(name) != shape:
            raise CheckpointError(
                f"{saved.folder}: {name} has shape {source.shapes.get(name)}, the model has {shape}"
            )
    state.load(source.read, saved.trainer["updates"])


def load_replay(saved: CheckpointInfo) -> dict | None:
    """The replay buffer of all ranks, merged; None if the checkpoint has none."""
    parts = []
    for path in sorted(saved.folder.glob("replay_rank_*.pt")):
        try:
            part = torch.load(path, weights_only=True)
            parts.append((part, part["queues"].items()))
        # torch and pickle raise whatever their parsers run into
        except Exception as error:  # noqa: BLE001
            reason = shorten(str(error) or type(error).__name__)
            raise CheckpointError(f"{path}: no replay buffer ({reason}): damaged") from None
    if not parts:
        return None
    return {
        **parts[0][0],
        "queues": {pair: queue for _, queues in parts for pair, queue in queues},
    }


def saved_config(folder: Path) -> Config:
    """The resolved configuration beside a checkpoint or in a run folder."""
    return load_config(folder / "config.yaml")


NEVER = {"optimizer.name"}  # what one has summed up is not what another goes on from
# sections
FREE_TO_CHANGE = {"logging", "evaluation", "checkpoint", "optimizer", "schedule", "parallel"}
FREE_KEYS = {
    "data.num_workers",
    "data.verify",
    "data.manifest",
    "data.tokenizer_sha256",  # absent in older runs; the place in the data knows the dataset
    "train.max_minutes",
    "train.micro_batch_size",
    "train.max_steps",
    "train.spike_deviations",
    "train.spike_window",
    "train.spike_skip_steps",
    "train.max_rollbacks",
    "train.ema",  # an average that is new begins with the weights as they are
    "model.attention_backend",
    "model.observed_backend",
    "refinement.recompute",
    "refinement.tile_rows",
    "refinement.compile",
    "refinement.cuda_graph",
    "deepspeed.zero_stage",
    "deepspeed.offload",
    "deepspeed.raw",
}


def check_same_run(saved: Config, current: Config) -> list[str]:
    """Differences that are allowed, as lines to print; raises CheckpointError for those that would
    make it another run.
    """
    allowed, refused = [], []
    for section, values in current.to_dict().items():
        for key, value in values.items():
            before, name = saved.to_dict()[section][key], f"{section}.{key}"
            if before != value:
                is_free = section in FREE_TO_CHANGE or name in FREE_KEYS
                (allowed if is_free and name not in NEVER else refused).append(
                    redacted(f"{name} was {cut(before)}, is {cut(value)}")
                )
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to another configuration: "
            + "; ".join(refused)
            + ". Resume with the saved one (config.yaml in the run folder), or start another run "
            "with --run-dir"
        )
    return allowed
