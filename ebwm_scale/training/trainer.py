"""The training loop.

    observed stream -> K, V -> refinement of a noisy candidate per position
        -> loss -> double backward -> AdamW

One optimizer step: draw this step's point of the schedules, take this rank's micro-batches of the
global batch, let the model refine and score them, step the engine. Everything else (validation,
checkpoints, metrics, stopping) happens between steps and changes no loss.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch

from ebwm_scale.checkpoint.reader import CheckpointInfo, load_into, load_replay
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.rate_schedule import rate_schedule
from ebwm_scale.config.schema import Config
from ebwm_scale.core.code_version import code_version
from ebwm_scale.core.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_NOT_FINITE,
    EXIT_RUN_AGAIN,
    CheckpointError,
)
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.batches import Batch, DataState
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.quarantine import Quarantine
from ebwm_scale.data.loading.skipped import position_of
from ebwm_scale.data.text_stream.strands import TextStream
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.best_checkpoint import BestCheckpoint
from ebwm_scale.training.deepspeed.engine import Engine
from ebwm_scale.training.evaluating import StepEvaluation
from ebwm_scale.training.norms import NormMeter
from ebwm_scale.training.preemption import StopFlag
from ebwm_scale.training.profiling import StepProfile
from ebwm_scale.training.replay import ReplayBuffer
from ebwm_scale.training.rollback import StepRecord, go_back_from_a_spike
from ebwm_scale.training.run_folder import RunFolder
from ebwm_scale.training.saving import Saver
from ebwm_scale.training.schedule import refinement_point
from ebwm_scale.training.spikes import SpikeWatch
from ebwm_scale.training.step_log import (
    StepResult,
    StepTimer,
    further_lines,
    metrics_row,
    step_line,
    validation_line,
)
from ebwm_scale.training.training_data import (
    Loader,
    notes_of,
    record_damaged,
    text_place_of,
    training_loader,
)
from ebwm_scale.training.watchdog import Watchdog


class Trainer:
    """Trains to train.max_steps, or until it has to stop. Every rank has one."""

    loader: Loader  # of the training split, from run() on

    def __init__(
        self,
        config: Config,
        engine: Engine,
        world: World,
        run_folder: RunFolder,
        stop: StopFlag,
        train: ShardedSplit | MixedSplit,
        validation: ShardedSplit | MixedSplit,
        *,
        micro_batch: int,
        watchdog: Watchdog,
        faults: Faults,
        allow_pipe: bool = False,
        text_stream: TextStream | None = None,
        sets: dict[str, ShardedSplit | MixedSplit] | None = None,
    ):
        self.config = config
        self.engine = engine
        self.world = world
        self.run_folder = run_folder
        self.stop = stop
        self.train_split = train
        self.micro_batch = micro_batch
        self.watchdog = watchdog
        self.faults = faults
        self.allow_pipe = allow_pipe  # the command line's permission, see config/permissions.py
        self.replay: ReplayBuffer | None = None
        if config.refinement.replay and config.model.kind == "energy":
            self.replay = ReplayBuffer(
                capacity=config.refinement.replay_capacity,
                global_batch_size=config.train.global_batch_size,
            )
        self.norm_meter = NormMeter(engine, world)
        self.saver = Saver(config, world, run_folder, watchdog, faults)
        self.spikes = SpikeWatch(config.train)
        self.recent: deque[StepRecord] = deque(maxlen=config.train.spike_window)
        self.best = BestCheckpoint(config.checkpoint.best, world, self._warn)
        self.observe = Observation(
            train.manifest, world.device, mask_document_starts=config.data.mask_document_starts
        )
        self.evaluation = StepEvaluation(
            config,
            world,
            engine,
            validation,
            sets or {},
            self.observe,
            batch_size=micro_batch,
            heartbeat=watchdog.heartbeat,
            stop_requested=self._stop_requested,
            warn=self._warn,
        )
        self.profile = StepProfile(
            config.logging.profile, run_folder.path, world, run_folder.say, run_folder.warn
        )
        self.quarantine = Quarantine(
            run_folder.path,
            limit=config.data.max_quarantined,
            write=run_folder.quarantine if world.is_main else None,
        )
        self.stream_position = 0
        self.text_stream = text_stream
        self.text_place: dict[str, Any] | None = None  # where in it the run stands
        self.step = 0
        self.first_step = 0  # of this process
        self.validated_step: int | None = None
        self.validation_loss: float | None = None
        self.skipped_in_a_row = 0
        self.stop_reason: str | None = None

    @property
    def unsaved(self) -> bool:
        """Whether the last save of this process has failed."""
        return self.saver.unsaved

    def load(self, saved: CheckpointInfo) -> None:
        """Take over a checkpoint: weights, optimizer, replay buffer and the place in the data.

        Or its weights alone, where it holds nothing else. Writes nothing; may be called again.
        """
        if "data" not in saved.trainer:  # conversion.import_run, of a folder without training state
            load_into(saved, self.engine.state)
            return
        data = DataState.load_state_dict(
            saved.trainer["data"],
            fingerprint=self.train_split.fingerprint,
            seed=self.config.train.seed,
        )
        self.faults.at("load")
        load_into(saved, self.engine.state)
        if self.replay is not None:
            stored = load_replay(saved)
            if stored is None:
                raise CheckpointError(
                    f"{saved.folder} holds no replay buffer, and refinement.replay is true: start "
                    "another run with --run-dir"
                )
            self.replay.load_state_dict(stored)
        self.step = self.first_step = data.step
        validated = saved.trainer["validation_loss"] is not None
        self.best.load_state_dict(saved.trainer.get("best"))
        self.saver.resumed_from(self.step, validated=validated, best=self.best.step)
        self.skipped_in_a_row = saved.trainer["skipped_in_a_row"]
        self.spikes.load_state_dict(saved.trainer.get("spikes", {}))
        self.quarantine.load_state_dict(saved.trainer["quarantine"])
        self.stream_position = saved.trainer["stream_position"]
        self.text_place = saved.trainer.get("text_stream")

    def truncate_later_metrics(self) -> None:
        """Metric rows beyond the step that was loaded: they will be written again."""
        problem, validated = None, None
        try:
            validated = self.run_folder.truncate_metrics(self.step)
        except OSError as error:
            problem = (
                f"{self.run_folder.path}/metrics.jsonl cannot be cut to step {self.step}: {error}"
            )
        # rank 0's word: another rank may read the file before or after it was rewritten
        problem, validated = self.world.all_gather_object((problem, validated))[0]
        if problem is not None:
            raise CheckpointError(f"{problem}; free some space, and run again with --resume")
        if self.step:
            self.validated_step = validated
        if self.world.is_main:
            for note in self.saver.writer.restore_best(self.best.step):
                self._warn(note)

    def run(self) -> int:
        """Train to train.max_steps; returns the exit code."""
        self.loader = self.open_loader()
        # A stopped run may have left the evaluation of its last step open.
        left_open = self.step > 0 and self._due(self.config.evaluation.every_steps)
        if left_open and not self._evaluated_and_saved():
            return self.save_and_exit()
        timer = StepTimer(self.step)
        while self.step < self.config.train.max_steps:
            self.profile.before(self.step + 1)
            result = self.train_step()
            if result is None:
                return self.save_and_exit()
            self.step += 1
            self.profile.after(self.step)
            if not result.applied and self.record_skipped_step(result):
                return self.shutdown(EXIT_NOT_FINITE)
            if self.spikes.is_on and result.applied and go_back_from_a_spike(self, result):
                timer.restart(self.step)
                continue
            if self._due(self.config.logging.every_steps):
                self.log(result, timer)
                if self.sync_quarantine():
                    return self.shutdown(EXIT_FAILED)
            if self._due(self.config.evaluation.every_steps):
                if not self.evaluate():
                    return self.save_and_exit()
                timer.restart(self.step)
            if self.step < self.config.train.max_steps and self._stop_requested():
                return self.save_and_exit()
            if self._save_is_due():
                self.save()
                timer.restart(self.step)
            self.saver.poll(self.step)
        if not self.evaluate():
            return self.save_and_exit()
        return self.shutdown(EXIT_FINISHED if self.save_for_good() else EXIT_FAILED)

    def open_loader(self) -> Loader:
        """This rank's micro-batches from here on."""
        return training_loader(
            self.config,
            self.train_split,
            self.world,
            micro_batch=self.micro_batch,
            first_step=self.step,
            first_shard=self.stream_position,
            text_stream=self.text_stream,
            text_place=self.text_place,
            known_bad=self.quarantine.known("train"),
            warn=self._warn,
            allow_pipe=self.allow_pipe,
            skipped=self.spikes.skipped,
        )

    def save_and_exit(self) -> int:
        """Save the last whole step, say why, and leave to be run again."""
        is_saved = self.save_for_good()
        self.run_folder.event("signal", step=self.step, reason=self.stop_reason, saved=is_saved)
        if not is_saved:
            self.run_folder.say(
                f"stopped at step {self.step} ({self.stop_reason}), without its last save"
            )
            return self.shutdown(EXIT_FAILED)
        self.run_folder.say(
            f"stopped at step {self.step} ({self.stop_reason}); run the same command with "
            "--resume to go on"
        )
        return self.shutdown(EXIT_RUN_AGAIN)

    def _stop_requested(self) -> bool:
        """Every rank asks at the same places: after a step, before another micro-batch of it,
        before another batch of an evaluation.
        """
        self.stop_reason = self.stop.stop_requested(
            self.world, time_limit=self.step > self.first_step
        )
        return self.stop_reason is not None

    def _evaluated_and_saved(self) -> bool:
        """Make up for the evaluation of the step a run was resumed at, and for its save if one was
        due; False if stopped meanwhile.
        """
        if not self.evaluate():
            return False
        if self._save_is_due():
            self.save()
        return True

    def shutdown(self, code: int) -> int:
        """Wait for what is being written; the code, or EXIT_FAILED in place of a good one where
        rows of the run folder could not be written to the end."""
        self.watchdog.heartbeat("the last save")
        self.profile.close()
        self.saver.wait(self.step, continues=False)
        # nobody leaves, and is missed, before the checkpoint is published
        rows_are_lost = self.world.any(not self.run_folder.rows_are_written())
        self.watchdog.stop()
        self.saver.finish_copies()
        if rows_are_lost and code in (EXIT_FINISHED, EXIT_RUN_AGAIN):
            return EXIT_FAILED
        return code

    def train_step(self) -> StepResult | None:
        """One optimizer step over this rank's micro-batches; None if it was given up between two of
        them, which leaves nothing behind.
        """
        ramp = BatchRamp.of(self.config.train)
        accumulation = ramp.size(self.step) // self.world.num_readers // self.micro_batch
        self.engine.set_accumulation(accumulation)
        first = position_of(ramp.samples_before(self.step), self.spikes.skipped)
        number = first // self.config.train.global_batch_size
        factor = self.faults.loss_factor(self.step, number)
        source = NoiseSource(self.config.train.seed, self.step)
        point = refinement_point(self.config, self.step, source)
        rate = self.engine.set_learning_rates(self.step)
        total: torch.Tensor | None = None
        norm: torch.Tensor | float | None = None
        final: list[tuple[Batch, torch.Tensor | None]] = []
        samples: list[int] = []
        norms: dict[str, dict[str, float]] | None = None
        num_steps = 0
        for index in range(accumulation):
            if index and self._stop_requested():
                return None
            batch = next(self.loader)
            restart = None
            if self.replay is not None:
                batch, restart = self.replay.restart(batch, source)
            observed, targets = self.observe(batch.sequences)
            output = self.engine.forward(
                observed,
                targets,
                conditions=self.observe.conditions(batch.conditions),
                sample_ids=batch.sample_ids,
                source=source,
                num_steps=point.num_steps,
                noise_scale=point.noise_scale,
                step_size_scale=point.step_size_scale,
                keep_state=None if self.replay is None else self.replay.DTYPE,
                restart=restart,
            )
            self.watchdog.heartbeat(f"step {self.step}, its backward pass")
            self.engine.backward(output.loss if factor is None else output.loss * factor)
            is_last = index + 1 == accumulation
            if is_last and self._due(self.config.logging.norms_every_steps, of=self.step + 1):
                with self.norm_meter.measured() as norms:
                    norm = self.engine.step()
                assert norm is not None, "the last micro-batch of a step gives the norm"
                self.norm_meter.before_clipping(norms, float(norm))
            else:
                norm = self.engine.step()
            final.append((batch, output.state))
            samples += batch.sample_ids.tolist()
            parts = [output.loss.detach()[None], output.loss_per_step]
            if factor is not None and math.isfinite(factor):
                parts = [factor * part for part in parts]
            if output.energy_per_step is not None:
                parts.append(output.energy_per_step)
            values = torch.cat(parts).double()
            if total is None:
                total = torch.zeros_like(values)
            total = total + values
            num_steps = len(output.loss_per_step)
        assert total is not None, "a step has at least one micro-batch"
        assert norm is not None, "the last micro-batch of a step gives the norm"
        means = total / accumulation
        result = StepResult(means, num_steps, float(norm), rate, samples, norms)
        if self.replay is not None and result.applied:
            for batch, states in final:
                assert states is not None, "they were asked for"
                self.replay.store(batch, states)
        return result

    def record_skipped_step(self, result: StepResult) -> bool:
        """Record a step that updated nothing, with the samples it held; whether there have been too
        many in a row.
        """
        self.skipped_in_a_row += 1
        limit = self.config.train.max_skipped_steps
        samples = []
        mine = result.samples if self.world.is_first_reader else []
        for of_rank in self.world.all_gather_object(mine):
            samples += of_rank
        loss = (self.world.all_reduce(result.values.clone()) / self.world.size)[0].item()
        self.run_folder.event(
            "skipped",
            step=self.step,
            loss=str(loss),
            grad_norm=str(result.gradient_norm),
            samples=samples,
        )
        self._warn(
            f"step {self.step} was skipped: loss {loss}, gradient norm {result.gradient_norm}; "
            f"{self.skipped_in_a_row} in a row, "
            f"{limit} end the run; its samples are in events.jsonl"
        )
        if self.skipped_in_a_row < limit:
            return False
        self.saver.wait(self.step, continues=False)
        saved = self.saver.saved
        newest = "none yet" if saved is None else f"step {saved[0]}"
        self.run_folder.event(
            "not_finite", step=self.step, loss=str(loss), grad_norm=str(result.gradient_norm)
        )
        self._warn(
            f"stopped after {limit} steps in a row without finite gradients. The last checkpoint "
            f"({newest}) is from before; lower optimizer.learning_rate or refinement.step_size "
            "and run again with --resume"
        )
        return True

    def sync_quarantine(self) -> bool:
        """Put what every rank found damaged on the common list, and into the run folder; whether it
        is more than data.max_quarantined.
        """
        mine = [*self.loader.found, *self.evaluation.found]
        found = []
        for of_rank, notes in self.world.all_gather_object((mine, notes_of(self.loader))):
            found += of_rank
            for note in notes:
                self._warn(note)
        self.loader.found.clear()
        self.evaluation.found.clear()
        return record_damaged(found, self.quarantine, self.run_folder, self.step)

    def log(self, result: StepResult, timer: StepTimer) -> None:
        """Write the step's metrics."""
        is_energy = self.config.model.kind == "energy"
        unit = self.observe.content.unit
        row = metrics_row(
            self.config,
            self.world,
            result,
            step=self.step,
            unit=unit,
            step_size=self.engine.module.step_size.item() if is_energy else None,
            seconds=timer.seconds_per_step(self.step),
        )
        self.run_folder.metrics(row)
        self.run_folder.say(step_line(row, max_steps=self.config.train.max_steps, unit=unit))

    def evaluate(self) -> bool:
        """Validate this step, once; False if it was given up for a stop."""
        if self.validated_step == self.step:
            return True
        self.watchdog.heartbeat(f"the evaluation after step {self.step}")
        self.faults.at("evaluation")
        row = self.evaluation.row(self.step)
        if row is None:
            return False
        self.run_folder.metrics({"step": self.step, "split": "validation", **row})
        self.validated_step, self.validation_loss = self.step, row["loss"]
        self.run_folder.say(validation_line(row, self.step))
        for line in further_lines(row):
            self.run_folder.say(line)
        self.best.see(self.step, row, is_whole=self.step == self.config.train.max_steps)
        return True

    def save(self, *, continues: bool = True) -> None:
        """Begin a checkpoint of this step; it is written while training goes on.

        Once, and once more when its validation loss is known. continues: steps follow.
        """
        self.watchdog.heartbeat(f"the save after step {self.step}")
        self.saver.wait(self.step, continues=continues)
        validated = self.validated_step == self.step and self.validation_loss is not None
        if self.saver.is_on_disk(self.step, validated=validated):
            return
        self.run_folder.leave_if_taken_over()
        self.sync_quarantine()
        self.stream_position = max(
            self.world.all_gather_object(getattr(self.loader, "next_shard", 0))
        )
        self.text_place = text_place_of(self.loader, self.world)
        state = DataState(
            self.train_split.fingerprint, self.config.train.seed, self.step
        ).state_dict()
        best = self.best.state_dict()
        self.saver.begin(
            self.engine.state,
            {
                "step": self.step,
                "data": state,
                "skipped_in_a_row": self.skipped_in_a_row,
                "quarantine": self.quarantine.state_dict(),
                "stream_position": self.stream_position,
                **({} if self.text_place is None else {"text_stream": self.text_place}),
                **({"spikes": self.spikes.state_dict()} if self.spikes.is_on else {}),
                "validation_loss": self.validation_loss if validated else None,
                **({} if best is None else {"best": best}),
                "code": code_version(),
            },
            None if self.replay is None else self.replay.state_dict(),
        )

    def save_for_good(self) -> bool:
        """Save this step, the last one of this process; whether it is on disk."""
        return self.saver.save_for_good(self.step, lambda: self.save(continues=False))

    def _warn(self, text: str) -> None:
        self.run_folder.warn(text, step=self.step)

    def _due(self, every: int, *, of: int | None = None) -> bool:
        """of: the number of steps; default: those made."""
        return every > 0 and ((self.step if of is None else of) % every == 0)

    def _save_is_due(self) -> bool:
        is_last_stable = self.step == rate_schedule(self.config).last_stable
        is_best = self.best.step == self.step
        return is_last_stable or is_best or self._due(self.config.checkpoint.every_steps)
