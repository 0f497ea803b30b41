"""Going back from a loss spike: what the trainer does when spikes.py has found one."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol

from ebwm_scale.checkpoint.reader import CheckpointInfo, published, step_of, verify
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.world import World
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.skipped import position_of
from ebwm_scale.training.run_folder import RunFolder
from ebwm_scale.training.saving import Saver
from ebwm_scale.training.spikes import Spike, SpikeWatch
from ebwm_scale.training.step_log import StepResult
from ebwm_scale.training.training_data import Loader


class StepRecord(NamedTuple):
    """A step that was made: the number of steps with it, its mean loss, and this rank's samples."""

    step: int
    loss: float
    samples: list[int]


class TrainingRun(Protocol):
    """What is read and set of a trainer (trainer.py)."""

    config: Config
    world: World
    run_folder: RunFolder
    saver: Saver
    spikes: SpikeWatch
    recent: deque[StepRecord]
    loader: Loader
    step: int
    first_step: int
    validated_step: int | None
    validation_loss: float | None

    def load(self, saved: CheckpointInfo) -> None: ...
    def truncate_later_metrics(self) -> None: ...
    def open_loader(self) -> Loader: ...


def go_back_from_a_spike(trainer: TrainingRun, result: StepResult) -> bool:
    """Judge the loss of the step that was made; whether the run went back because of it."""
    loss = (trainer.world.all_reduce(result.values[:1].clone()) / trainer.world.size).item()
    trainer.recent.append(StepRecord(trainer.step, loss, result.samples))
    spike = trainer.spikes.judge(loss)
    if spike is None:
        return False
    trainer.saver.wait(trainer.step, continues=True)
    steps = trainer.config.train.spike_skip_steps
    saved = None
    if trainer.spikes.rollbacks < trainer.config.train.max_rollbacks:
        saved = last_before(trainer.run_folder.checkpoints, trainer.step - steps, trainer.world)
    _record(trainer, spike, saved)
    if saved is None:
        return False
    ramp = BatchRamp.of(trainer.config.train)
    start, stop = (ramp.samples_before(trainer.step - back) for back in (steps, 0))
    known = trainer.spikes.skipped
    trainer.spikes.skip(position_of(start, known), position_of(stop - 1, known) + 1)
    trainer.spikes.rollbacks += 1
    kept = SpikeWatch(trainer.config.train)
    kept.load_state_dict(trainer.spikes.state_dict())
    first_step = trainer.first_step
    trainer.load(saved)
    trainer.first_step = first_step  # of this process, which has made a step
    kept.go_back(saved.trainer.get("spikes", {}))
    trainer.spikes = kept
    trainer.saver.writer.forget_after(trainer.step)
    trainer.validation_loss = saved.trainer["validation_loss"]
    trainer.validated_step = None
    trainer.truncate_later_metrics()
    trainer.recent.clear()
    if isinstance(trainer.loader, BatchLoader):
        trainer.loader.close()
    trainer.loader = trainer.open_loader()
    return True


def _record(trainer: TrainingRun, spike: Spike, saved: CheckpointInfo | None) -> None:
    """Put a spike on record, with the samples of its steps and where the run goes on."""
    steps = trainer.config.train.spike_skip_steps
    mine = [record.samples for record in list(trainer.recent)[-steps:]]
    samples: list[int] = []
    for of_rank in trainer.world.all_gather_object(mine if trainer.world.is_first_reader else []):
        samples += [sample for of_step in of_rank for sample in of_step]
    back_to = None if saved is None else saved.step
    undone = [
        [record.step, record.loss]
        for record in trainer.recent
        if back_to is not None and record.step > back_to
    ]
    trainer.run_folder.event(
        "spike",
        step=trainer.step,
        loss=spike.loss,
        mean=spike.mean,
        deviation=spike.deviation,
        samples=sorted(samples),
        back_to=back_to,
        undone=undone,
    )
    number = trainer.spikes.rollbacks + 1
    limit = trainer.config.train.max_rollbacks
    if back_to is not None:
        what = (
            f"going back to step {back_to} ({number} of {limit} times), without the samples of "
            f"the last {steps} steps, which are in events.jsonl"
        )
    elif number > limit:
        what = f"the run has gone back train.max_rollbacks {limit} times, and goes on"
    else:
        what = "there is no checkpoint from before it, and the run goes on"
    trainer.run_folder.warn(
        f"step {trainer.step} is a spike: {spike.describe()}; {what}", step=trainer.step
    )


def last_before(checkpoints: Path, step: int, world: World) -> CheckpointInfo | None:
    """The newest good checkpoint of at most `step` steps, the same on every rank; None without one.

    Every rank must call it.
    """
    name = None
    if world.is_main:
        for folder in published(checkpoints):
            if step_of(folder.name) > step:
                continue
            try:
                name = verify(folder).folder.name
            except CheckpointError:
                continue  # a damaged one: the one before it
            break
    name = world.broadcast_object(name)
    return None if name is None else verify(checkpoints / name)
