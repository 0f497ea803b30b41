"""Loading the newest checkpoint, also where another process removes it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ebwm_scale.checkpoint.reader import CheckpointInfo, verify
from ebwm_scale.core.errors import CheckpointError, UserError
from ebwm_scale.core.world import World

if TYPE_CHECKING:
    from ebwm_scale.training.trainer import Trainer

MOST_TRIES = 5  # a run that publishes faster than this one reads is not over


def load_newest(
    trainer: Trainer,
    saved: CheckpointInfo | None,
    newest: Callable[[], CheckpointInfo | None],
    world: World,
    say: Callable[[str], None],
) -> CheckpointInfo | None:
    """Load the checkpoint that rank 0 has found; the one that all ranks have loaded, or None.

    A checkpoint that is not there any more was rotated away by a run that publishes newer ones: the
    newest one there is then is taken. Every rank must call it; raises on all ranks if one cannot
    load. newest: looks again, on rank 0.
    """
    for _ in range(MOST_TRIES):
        name = world.broadcast_object("" if saved is None else saved.folder.name)
        if not name:
            return None
        problem = None
        try:
            saved = _the_same(saved, name, trainer)
            trainer.load(saved)
        except (UserError, OSError) as error:
            problem = error
        problems = world.all_gather_object(None if problem is None else str(problem))
        first = next((text for text in problems if text is not None), None)
        if first is None:
            return saved
        if not world.any(
            problem is not None and not (trainer.run_folder.checkpoints / name).exists()
        ):
            if isinstance(problem, UserError):
                raise problem
            raise CheckpointError(f"{name} could not be loaded: {first}")
        say(f"{name} was removed while it was read; taking the newest checkpoint there is now")
        saved = newest() if world.is_main else saved
    raise CheckpointError(
        f"{trainer.run_folder.path}: {MOST_TRIES} checkpoints were removed while they were read: "
        "another process trains there; end it, or name another folder with --run-dir"
    )


def _the_same(saved: CheckpointInfo | None, name: str, trainer: Trainer) -> CheckpointInfo:
    """Rank 0's checkpoint on this rank, which may have found another one."""
    if saved is not None and saved.folder.name == name:
        return saved
    return verify(trainer.run_folder.checkpoints / name)
