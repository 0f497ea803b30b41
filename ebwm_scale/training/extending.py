"""A run that goes on from another one's checkpoint, in a folder of its own (train.py --extend RUN).

    finished     --peak--------------\\__ step 1000       RUN stays as it is
    extended     --peak--------------+-----------------\\__ step 2000

It begins where both schedules have the same learning rate: with `wsd` at the last step before the
decay, whose checkpoint is kept for this. From there on it is the run that the longer schedule would
have made from the start, with the same samples.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from ebwm_scale.checkpoint.reader import CheckpointInfo, published, saved_config, step_of, verify
from ebwm_scale.config.rate_schedule import is_known
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError, ConfigError
from ebwm_scale.core.world import World
from ebwm_scale.training.run_folder import copy_metrics_until
from ebwm_scale.training.schedule import RateChange


def last_without_a_jump(run: Path, config: Config, warn: Callable[[str], None]) -> CheckpointInfo:
    """The newest good checkpoint of a run at which its learning rate and the one of `config` are
    the same, and steps are left.

    Raises CheckpointError where there is none.
    """
    if not is_known(config):
        raise CheckpointError(f"{run}: the data does not say where its schedule stands")
    folders = published(run / "checkpoints")
    if not folders:
        raise CheckpointError(f"--extend {run}: there is no checkpoint in it; name a run folder")
    jumps = []
    for folder in folders:
        step = step_of(folder.name)
        if step >= config.train.max_steps:
            continue
        try:
            change = RateChange.of(saved_config(folder), config, step)
            if change.changed:
                jumps.append(change)
                continue
            return verify(folder)
        except (CheckpointError, ConfigError) as error:
            warn(f"{error}; trying the checkpoint before it")
    if not jumps:
        raise CheckpointError(
            f"--extend {run}: none of its checkpoints is good and from before train.max_steps "
            f"{config.train.max_steps}; use more steps"
        )
    raise CheckpointError(
        f"--extend {run}: the learning rate jumps at each of its checkpoints "
        f"({jumps[-1].describe()}). Keep the keys of its schedule that come before the decay, or "
        "take the jump with --resume --accept-new-rate"
    )


def begin_from(saved: CheckpointInfo, run_dir: Path, world: World | None) -> CheckpointInfo:
    """Put a checkpoint, and the metrics up to it, into a new run folder; as it stands there.

    Every rank must call it; rank 0 writes, and its failure is a ConfigError on all of them. Nothing
    is copied where a file can have a second name.
    """
    root = run_dir / "checkpoints"
    problem = None
    if world is None or world.is_main:
        try:
            _put(saved, root)
        except OSError as error:
            problem = (
                f"{error.filename or root} cannot be written: {error.strerror or error}; "
                "name another folder with --run-dir"
            )
    if world is not None:
        problem = world.broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)
    return verify(root / saved.folder.name)


def _put(saved: CheckpointInfo, root: Path) -> None:
    """The checkpoint last: until it is there the folder holds nothing to resume."""
    root.mkdir(parents=True, exist_ok=True)
    source = saved.folder.parent.parent / "metrics.jsonl"
    if source.exists():
        copy_metrics_until(source, root.parent / "metrics.jsonl", saved.step)
    staging = root / f".staging-{saved.folder.name}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        for file in sorted(saved.folder.iterdir()):
            _second_name(file, staging / file.name)
        os.replace(staging, root / saved.folder.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _second_name(file: Path, target: Path) -> None:
    """Files of checkpoints are never written again, so two folders can share one."""
    try:
        os.link(file, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, target)
