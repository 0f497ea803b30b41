"""Saves of a run, written while training goes on.

    checkpoints/.staging-step_000100-1f3a9c20/   every rank writes its files here
    checkpoints/step_000100/                     the same folder, renamed once all of it is on disk

A save copies its state in memory; a thread of each rank writes it. What became of its part a rank
says over the process group's store, which needs no room on any disk; rank 0 publishes when all have
said that theirs is written. So a slow disk delays nobody until the next save, and a failed write
leaves the checkpoints before it as they were.

The rename is the publication. What comes after it (the names in `latest` and `best`, removing what
the rules do not keep) can fail and is tried again at the next save; it changes no outcome. Each
save has a staging folder of its own name, so that one which cannot be removed is in nobody's way.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ebwm_scale.checkpoint.files import VERSION, manifest_text
from ebwm_scale.checkpoint.parameter_shard import TrainingState
from ebwm_scale.checkpoint.reader import NAME, checkpoint_name, published, step_of
from ebwm_scale.config.rate_schedule import rate_schedule
from ebwm_scale.config.schema import Config
from ebwm_scale.core.disk import replace_text, sync
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.world import World

PATIENCE = datetime.timedelta(minutes=30)  # for the other ranks' parts
REPLACED = ".staging-replaced-"
SHORT_OF_SPACE = re.compile("no space left|quota|os error 28|os error 122", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """What became of a save. problem: why it is not on disk; None where it is.

    notes: what failed after the publication, one sentence each.
    """

    step: int
    validated: bool
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_short_of_space(self) -> bool:
        return self.problem is not None and bool(SHORT_OF_SPACE.search(self.problem))


class CheckpointWriter:
    """Saves of one run. Every rank has one, and calls save and wait at the same steps.

    still_ours: called before a publication; does not return if another process has taken the run.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        config: Config,
        faults: Faults,
        still_ours: Callable[[], None],
    ):
        self.root = root
        self.world = world
        self.config = config
        self.last_stable = rate_schedule(config).last_stable
        self.faults = faults
        self.still_ours = still_ours
        self.store = world.store()
        self.thread: threading.Thread | None = None
        self.outcome: Outcome | None = None  # of the last save, on rank 0, once its thread is done
        self.newest: int | None = None  # the step published last, or resumed from
        self.told = True  # whether finished() has given the outcome away
        self.notes: list[str] = []  # of the save in progress
        self.noted: set[str] = set()  # kinds of notes that were ever made

    def save(self, state: TrainingState, trainer: dict[str, Any], replay: dict | None) -> None:
        """Begin to save step trainer["step"]. The save before it must have been waited for."""
        tensors, ranges = {}, {}
        for shard in state.shards():
            ranges[shard.name] = [shard.start, shard.values["weight"].numel()]
            for kind, values in shard.values.items():
                tensors[f"{kind}/{shard.name}"] = values.detach().to("cpu", copy=True)
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
        self.outcome = None
        self.told = False
        self.notes = []
        staging, problem = self._stage(trainer["step"])  # no rank writes before the folder is there
        validated = trainer.get("validation_loss") is not None
        begun = Outcome(trainer["step"], validated, problem)
        if problem is not None:
            self.outcome = dataclasses.replace(begun, notes=tuple(self.notes))
            return
        self.thread = threading.Thread(
            target=self._write,
            args=(begun, staging, tensors, ranges, shapes, trainer, replay),
            daemon=True,
            name="checkpoint",
        )
        self.thread.start()

    def finished(self) -> Outcome | None:
        """On rank 0, once: the outcome of a save that has ended meanwhile."""
        if self.told or (self.thread is not None and self.thread.is_alive()):
            return None
        self.told = True
        return self.outcome

    def wait(self) -> Outcome | None:
        """Wait for the save in progress; on every rank what rank 0 knows of the last one."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        values = None if self.outcome is None else dataclasses.asdict(self.outcome)
        values = json.loads(self.world.broadcast_object(json.dumps(values)))
        if values is None:
            return None
        self.outcome = Outcome(**{**values, "notes": tuple(values["notes"])})
        if self.outcome.problem is None:
            self.newest = self.outcome.step
        return self.outcome

    def newest_on_disk(self) -> str:
        """In words: the step of the checkpoint that a resume would take."""
        if self.newest is not None and (self.root / checkpoint_name(self.newest)).is_dir():
            return f"newest checkpoint is step {self.newest}"
        found = published(self.root)
        if not found:
            return "there is no checkpoint yet"
        return f"newest checkpoint is step {step_of(found[0].name)}"

    def make_room(self) -> None:
        """Remove the checkpoints that the one to be written would push out; never the newest."""
        if self.world.is_main:
            newest = None if self.newest is None else checkpoint_name(self.newest)
            self._prune(max(1, self.config.checkpoint.keep_last - 1), besides=newest)

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: a run that has gone back must not go on there."""
        if self.world.is_main:
            for folder in published(self.root):
                if step_of(folder.name) > step:
                    self._discard(folder)
        self.newest = step

    def _stage(self, step: int) -> tuple[Path, str | None]:
        """(a fresh staging folder, why it could not be made), the same on every rank."""
        name, problem = f".staging-{checkpoint_name(step)}-{uuid.uuid4().hex[:8]}", None
        if self.world.is_main:
            try:
                self._io(self.root.mkdir, parents=True, exist_ok=True)
                self._clear_staging()
                self._io((self.root / name).mkdir)
            except OSError as error:
                problem = str(error)
        name, problem = json.loads(self.world.broadcast_object(json.dumps([name, problem])))
        return self.root / name, problem

    def _write(
        self,
        begun: Outcome,
        staging: Path,
        tensors: dict,
        ranges: dict,
        shapes: dict,
        trainer: dict,
        replay: dict | None,
    ) -> None:
        said = self._write_part(staging, tensors, ranges, shapes, replay)
        if not self.world.is_main:
            assert self.store is not None, "several processes have a store"
            try:
                self.store.set(f"{staging.name}/{self.world.rank}", json.dumps(said))
            except dist.DistError:
                pass  # rank 0 is gone, which the next collective says
            return
        try:
            entries = self._collect(staging, said)
            folder = self._publish(staging, entries, trainer)
        # whatever it is, the run goes on and says it
        except Exception as error:  # noqa: BLE001
            begun = dataclasses.replace(begun, problem=str(error) or type(error).__name__)
            self._remove(staging)
        else:
            try:
                self._tidy(folder, trainer)
            # whatever it is, the checkpoint is published
            except Exception as error:  # noqa: BLE001
                self._note("tidy", f"{self.root} could not be tidied up ({error})")
        self.outcome = dataclasses.replace(begun, notes=tuple(self.notes))

    def _write_part(
        self, staging: Path, tensors: dict, ranges: dict, shapes: dict, replay: dict | None
    ) -> dict[str, Any]:
        """Write this rank's files; {"files": their entries} or {"problem": why not}."""
        rank, size = self.world.rank, self.world.size
        try:
            self.faults.at("save")
            files = [f"state-{rank:05d}-of-{size:05d}.safetensors"]
            self._io(
                save_file,
                tensors,
                staging / files[0],
                metadata={"ranges": json.dumps(ranges), "shapes": json.dumps(shapes)},
            )
            if replay is not None:
                files.append(f"replay_rank_{rank}.pt")
                self._io(_save_object, replay, staging / files[-1])
            return {"files": {name: self._finish_file(staging / name) for name in files}}
        # whatever it is, the others must hear of it
        except Exception as error:  # noqa: BLE001
            return {"problem": str(error) or type(error).__name__}

    def _collect(self, staging: Path, mine: dict[str, Any]) -> dict[str, dict]:
        """File entries of all ranks, when all have ended; OSError with the first problem."""
        said = [mine]
        for rank in range(1, self.world.size):
            key = f"{staging.name}/{rank}"
            assert self.store is not None, "several processes have a store"
            try:
                self.store.wait([key], PATIENCE)
                said.append(json.loads(self.store.get(key)))
                self.store.delete_key(key)
            except dist.DistError as error:
                raise OSError(
                    f"rank {rank} has not said that its part is written: {error}"
                ) from None
        for rank, words in enumerate(said):
            if "problem" in words:
                where = f"rank {rank}: " if self.world.size > 1 else ""
                raise OSError(f"{where}{words['problem']}")
        return {name: entry for words in said for name, entry in words["files"].items()}

    def _publish(self, staging: Path, entries: dict[str, dict], trainer: dict[str, Any]) -> Path:
        for name, text in (
            ("config.yaml", self.config.to_yaml()),
            ("trainer.json", json.dumps(trainer, indent=1)),
        ):
            self._io((staging / name).write_text, text, encoding="utf-8")
            entries[name] = self._finish_file(staging / name)
        self._io(
            (staging / "manifest.json").write_text,
            manifest_text(entries),
            encoding="utf-8",
        )
        self._io(sync, staging / "manifest.json")
        self._io(sync, staging)
        self.still_ours()
        folder = self.root / checkpoint_name(trainer["step"])
        if not folder.exists():
            self._io(os.replace, staging, folder)
            return folder
        # the same step again: after its evaluation was made up, or a fall-back to an earlier one
        replaced = self.root / f"{REPLACED}{folder.name}-{uuid.uuid4().hex[:8]}"
        self._io(os.replace, folder, replaced)
        try:
            self._io(os.replace, staging, folder)
        except OSError:
            os.replace(replaced, folder)
            raise
        return folder

    def _tidy(self, folder: Path, trainer: dict[str, Any]) -> None:
        """After the publication: names, and removing what is neither recent, nor best, nor a
        milestone. What cannot be done is noted, and tried again after the next save."""
        self._try("sync", sync, self.root)
        self._try("latest", replace_text, self.root / "latest", folder.name + "\n")
        if self.config.checkpoint.keep_best and self._is_best(trainer):
            self._try("best", replace_text, self.root / "best", folder.name + "\n")
        self._prune(self.config.checkpoint.keep_last, besides=folder.name)
        self._clear_staging()

    def _is_best(self, trainer: dict[str, Any]) -> bool:
        """By checkpoint.best, whose best step trainer.json holds; else by the validation loss."""
        if self.config.checkpoint.best is not None:
            return trainer.get("best", {}).get("step") == trainer["step"]
        loss = trainer.get("validation_loss")
        if loss is None:
            return False
        best = self._best()
        known = None if best is None else _loss_of(self.root / best)
        return known is None or loss < known

    def restore_best(self, step: int | None) -> list[str]:
        """Name the best one again, as the checkpoint that a run goes on from knows it: a kill
        behind a publication leaves the name of the one before. On rank 0 only; what failed.
        """
        self.notes = []
        name = None if step is None else checkpoint_name(step)
        if name is not None and name != self._best() and (self.root / name).is_dir():
            self._try("best", replace_text, self.root / "best", f"{name}\n")
        return self.notes

    def _try(self, kind: str, function: Callable, path: Path, *arguments: Any) -> None:
        try:
            self._io(function, path, *arguments)
        except OSError as error:
            self._note(kind, f"{path} could not be written ({error})")

    def _prune(self, keep: int, *, besides: str | None) -> None:
        """Remove all published ones but the newest `keep`, the best, milestones and `besides`.

        The last one before the decay of a wsd schedule is a milestone: a longer run begins there.
        """
        best, every = self._best(), self.config.checkpoint.milestone_every_steps
        for old in published(self.root)[keep:]:
            step = step_of(old.name)
            is_milestone = step == self.last_stable or (every > 0 and step % every == 0)
            if not is_milestone and old.name not in (best, besides):
                self._discard(old)

    def _clear_staging(self) -> None:
        """Remove what earlier saves have left, as far as that can be."""
        put_back_replaced(self.root)
        for left_over in self.root.glob(".staging-*"):
            if left_over.name.startswith(REPLACED):
                self._discard(left_over)
            else:
                self._remove(left_over)

    def _discard(self, checkpoint: Path) -> None:
        """Remove a whole one; half a folder never has a name under which it would be used."""
        doomed = self.root / f".staging-pruned-{uuid.uuid4().hex[:8]}"
        try:
            self._io(os.replace, checkpoint, doomed)
        except OSError as error:
            self._note_undeletable(checkpoint, error)
        else:
            self._remove(doomed)

    def _remove(self, folder: Path) -> None:
        """As many of its files as can be."""
        try:
            self.faults.at("io")
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(folder)  # says why it is still there
        except OSError as error:
            self._note_undeletable(folder, error)

    def _note_undeletable(self, folder: Path, error: OSError) -> None:
        self._note(
            "remove",
            f"{folder} could not be removed ({error}); saving goes on, and what cannot be removed "
            "takes space until somebody does it",
        )

    def _note(self, kind: str, text: str) -> None:
        """For the warning that is given with the outcome; the first of its kind only."""
        if kind not in self.noted:
            self.noted.add(kind)
            self.notes.append(text)

    def _best(self) -> str | None:
        try:
            return (self.root / "best").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def _finish_file(self, path: Path) -> dict[str, Any]:
        """Its manifest entry, once its content is on disk."""
        self._io(sync, path)
        return {"size": path.stat().st_size, "sha256": file_sha256(path)}

    def _io(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        return self.faults.through("io", function, *arguments, **options)


def put_back_replaced(root: Path) -> None:
    """A checkpoint that was moved aside for its successor, which a kill or an error then kept from
    coming, is put back under its name; best effort."""
    for aside in sorted(root.glob(f"{REPLACED}*")):
        name = aside.name.removeprefix(REPLACED).rpartition("-")[0]
        if NAME.fullmatch(name) and not (root / name).exists():
            try:
                os.replace(aside, root / name)
            except OSError:
                pass


def _save_object(value: Any, path: Path) -> None:
    """torch.save through a file of Python's, whose errors name their cause."""
    with open(path, "wb") as file:
        torch.save(value, file)


def _loss_of(folder: Path) -> float | None:
    try:
        text = (folder / "trainer.json").read_text(encoding="utf-8")
        return json.loads(text).get("validation_loss")
    except (OSError, ValueError, AttributeError):
        return None
