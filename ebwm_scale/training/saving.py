"""Saves of a run as the loop sees them: begun, waited for, and reported truthfully.

begin(state, ...)      a checkpoint is written while training goes on (checkpoint/writer.py)
wait()               wait for it; the event `save`, or a warning with what there is instead
save_for_good(begin)   the last save of a process: a second try, then the truth
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ebwm_scale.checkpoint.parameter_shard import TrainingState
from ebwm_scale.checkpoint.reader import checkpoint_name
from ebwm_scale.checkpoint.remote import RemoteCopies
from ebwm_scale.checkpoint.writer import CheckpointWriter, Outcome
from ebwm_scale.config.schema import Config
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.world import World
from ebwm_scale.training.run_folder import PAUSE_S, RunFolder
from ebwm_scale.training.watchdog import Watchdog


class Saver:
    """Of one run. Every rank has one, and calls everything but `report` at the same steps.

    saved: (step, with validation loss) of the newest checkpoint that is known to be on disk.
    unsaved: the last save of this process has failed.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        run_folder: RunFolder,
        watchdog: Watchdog,
        faults: Faults,
    ):
        self.world = world
        self.run_folder = run_folder
        self.watchdog = watchdog
        self.writer = CheckpointWriter(
            run_folder.checkpoints,
            world,
            config,
            faults,
            still_ours=run_folder.leave_if_taken_over,
        )
        self.saved: tuple[int, bool] | None = None
        self.unsaved = False
        self._best: dict[str, Any] | None = None  # of the save in progress, see best_checkpoint.py
        self._best_on_disk: int | None = None  # step
        self.remote: RemoteCopies | None = None
        if config.checkpoint.remote is not None and world.is_main:
            self.remote = RemoteCopies(config.checkpoint.remote, run_folder.path)

    def resumed_from(self, step: int, *, validated: bool, best: int | None = None) -> None:
        """What is on disk already. best: the step that is best by checkpoint.best."""
        self.saved = (step, validated)
        self.writer.newest = step
        self._best_on_disk = best

    def is_on_disk(self, step: int, *, validated: bool = False) -> bool:
        """Whether a step's state is saved, as far as wait() has said.

        validated: with its validation loss.
        """
        if self.saved is None or self.saved[0] != step:
            return False
        return self.saved[1] or not validated

    def begin(
        self, state: TrainingState, values: dict[str, Any], replay: dict[str, Any] | None
    ) -> None:
        """Begin a checkpoint; the one before it must be waited for. values: trainer.json."""
        self._best = values.get("best")
        self.writer.save(state, values, replay)

    def wait(self, step: int, *, continues: bool, is_last_try: bool = False) -> Outcome | None:
        """Wait for the save in progress and say what became of it.

        step: where training stands. continues: steps follow. is_last_try: no other try follows.
        """
        outcome = self.writer.wait()
        self.report(self.writer.finished(), step, continues=continues, is_last_try=is_last_try)
        if outcome is not None and outcome.problem is None:
            self.saved = (outcome.step, outcome.validated)
        return outcome

    def save_for_good(self, step: int, begin: Callable[[], None]) -> bool:
        """Save this step, the last one of this process, and wait.

        begin: begins the save, unless the step is on disk. A second try comes after making room
        and a pause. Returns whether the step is on disk, the same on every rank.
        """
        begin()
        outcome = self.wait(step, continues=False)
        if not self.is_on_disk(step):
            self.run_folder.warn(
                f"trying once more to save step {step} in {PAUSE_S:g} s", step=step
            )
            self.watchdog.heartbeat("the pause before the save is tried again")
            if outcome is not None and outcome.is_short_of_space:
                self.writer.make_room()
            time.sleep(PAUSE_S)
            begin()
            self.wait(step, continues=False, is_last_try=True)
        self.unsaved = not self.is_on_disk(step)
        return not self.unsaved

    def poll(self, step: int) -> None:
        """Tell of a save that has ended meanwhile; on rank 0 alone, and without waiting."""
        self.report(self.writer.finished(), step)
        if self.remote is not None:
            self._report_copies(self.remote.told())

    def finish_copies(self) -> None:
        """Wait for the copies of checkpoint.remote, and tell of them; on rank 0 alone."""
        if self.remote is not None:
            self._report_copies(self.remote.finish())

    def _report_best(self, step: int) -> None:
        """The event `best`, where the checkpoint of this step has become it."""
        best = self._best
        if best is None or best["step"] != step or self._best_on_disk == step:
            return
        self._best_on_disk = step
        folder = f"checkpoints/{checkpoint_name(step)}"
        self.run_folder.event("best", **best, folder=folder)

    def _report_copies(self, outcomes: list[tuple[int, str | None]]) -> None:
        for step, problem in outcomes:
            if problem is None:
                self.run_folder.event("remote", step=step)
                continue
            self.run_folder.warn(
                f"step {step}: the checkpoint could not be copied to checkpoint.remote "
                f"({problem}); it is on disk here, and the next one is tried again",
                step=step,
            )

    def report(
        self,
        outcome: Outcome | None,
        step: int,
        *,
        continues: bool = True,
        is_last_try: bool = False,
    ) -> None:
        """Put what became of a save on record.

        The event `save` where it is on disk, a warning where it is not.
        """
        if outcome is None or not self.world.is_main:
            return
        newest = self.writer.newest_on_disk()
        if outcome.problem is None:
            self.run_folder.event("save", step=outcome.step)
            self._report_best(outcome.step)
            if self.remote is not None:
                self.remote.begin(self.run_folder.checkpoints / checkpoint_name(outcome.step))
        elif is_last_try:
            self.run_folder.warn(
                f"step {outcome.step} is NOT saved, {newest} ({outcome.problem}); "
                "free some space, and run again with --resume",
                step=step,
            )
        else:
            going_on = "training goes on, " if continues else ""
            self.run_folder.warn(
                f"step {outcome.step}: the checkpoint could not be written ({outcome.problem}); "
                f"{going_on}{newest}; free some space",
                step=step,
            )
        for note in outcome.notes:
            self.run_folder.warn(note, step=step)
