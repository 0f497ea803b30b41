"""What a run evaluates at a step: one row of metrics.jsonl, of the validation split and beside it.

    validation split     loss after each refinement step          validation.py
    curvature            of the energy in front of each step      curvature.py
    downstream           further sets, questions, tasks, texts    downstream.py

With the weights that are trained, or with their average (`evaluation.weights: ema`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.curvature import measured_curvature
from ebwm_scale.training.deepspeed.engine import Engine
from ebwm_scale.training.downstream import Downstream
from ebwm_scale.training.schedule import refinement_point
from ebwm_scale.training.validation import validate


class StepEvaluation:
    """Of one run, on every rank; all of them call it at the same steps.

    sets: further held-out sets, opened, by name. found: samples that could not be read, for who
    puts them on the common list. heartbeat: told what is about to be done. stop_requested: asked
    between batches. warn: one line.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        validation: ShardedSplit | MixedSplit,
        sets: dict[str, ShardedSplit | MixedSplit],
        observe: Observation,
        *,
        batch_size: int,
        heartbeat: Callable[[str], None],
        stop_requested: Callable[[], bool],
        warn: Callable[[str], None],
    ):
        self.config = config
        self.world = world
        self.engine = engine
        self.validation = validation
        self.observe = observe
        self.batch_size = batch_size
        self.context_length = resolved.context_length(config)
        self.heartbeat = heartbeat
        self.stop_requested = stop_requested
        self.found: list[BadSample] = []
        self.step = 0
        self.downstream = Downstream(
            config,
            world,
            sets,
            validation,
            batch_size=batch_size,
            heartbeat=self._heartbeat,
            stop_requested=stop_requested,
            warn=warn,
        )

    def row(self, step: int) -> dict[str, Any] | None:
        """All of it after a step; None if it was given up for a stop."""
        self.step = step
        point = refinement_point(self.config, step, NoiseSource(self.config.train.seed, step))
        uses_average = self.config.evaluation.weights == "ema"
        with self.engine.state.averaged() if uses_average else contextlib.nullcontext():
            return self._of_these_weights(point.step_size_scale)

    def _of_these_weights(self, step_size_scale: float) -> dict[str, Any] | None:
        row = validate(
            self.engine.module,
            self.validation,
            self.config,
            self.world,
            self.observe,
            context_length=self.context_length,
            batch_size=self.batch_size,
            step_size_scale=step_size_scale,
            found=self.found,
            heartbeat=self._heartbeat,
            stop_requested=self.stop_requested,
        )
        if row is None:
            return None
        more = self.downstream.evaluate(
            self.engine.module, self.step, step_size_scale=step_size_scale
        )
        if more is None:
            return None
        return row | self._curvature(step_size_scale) | more

    def _curvature(self, step_size_scale: float) -> dict[str, Any]:
        """Where `evaluation.curvature_samples` asks for it."""
        if self.config.evaluation.curvature_samples == 0:
            return {}
        self.heartbeat(f"the curvature after step {self.step}")
        return measured_curvature(
            self.engine.module,
            self.validation,
            self.config,
            self.world,
            self.observe,
            context_length=self.context_length,
            step_size_scale=step_size_scale,
        )

    def _heartbeat(self) -> None:
        self.heartbeat(f"the evaluation after step {self.step}")
