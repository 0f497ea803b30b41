"""What is evaluated while a model trains, beside its validation split (section `evaluation`):

    sets        further held-out sets, by name              the numbers of a validation row
    questions   multiple choice and cloze from files        shares answered right
    tasks       lm-evaluation-harness, from local files     its metrics
    samples     held-out texts continued                    for a person

All of it becomes part of the step's validation row, which is written once and whole: so a killed
run has all of an evaluation or nothing. Results are the same on every rank. Questions and tasks are
shared among ranks; weights are those of the moment, at any ZeRO stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config, EvaluationConfig
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.core.world import World
from ebwm_scale.data.format.content import TextContent
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.inference.question_files import (
    Question,
    chance,
    cloze_values,
    multiple_choice_values,
    read_questions,
)
from ebwm_scale.inference.scoring import Scorer
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.training.deepspeed.whole_model import whole_model
from ebwm_scale.training.shared_scoring import SharedScorer
from ebwm_scale.training.validation import validate
from ebwm_scale.world_model import WorldModel

Split = ShardedSplit | MixedSplit
KINDS = {"multiple_choice": "choices", "cloze": "answer"}  # -> what read_questions asks for


class Downstream:
    """Of one run, on every rank; all of them call it at the same steps.

    sets: opened, by name. main: the validation split, whose texts are continued. batch_size: how
    many samples of a set, or texts, at a time. warn: one line.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        sets: dict[str, Split],
        main: Split,
        *,
        batch_size: int,
        heartbeat: Callable[[], None],
        stop_requested: Callable[[], bool],
        warn: Callable[[str], None],
    ):
        self.config = config
        self.wanted: EvaluationConfig = config.evaluation
        self.world = world
        self.sets = sets
        self.main = main
        self.batch_size = batch_size
        self.heartbeat = heartbeat
        self.stop_requested = stop_requested
        self.warn = warn
        self.questions = {
            asked.name: (asked.kind, read_questions(Path(asked.file), KINDS[asked.kind]))
            for asked in self.wanted.questions
        }
        self._warned: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Whether questions, tasks and samples belong to the evaluation of this step."""
        if not (self.questions or self.wanted.tasks or self.wanted.samples):
            return False
        every = self.wanted.downstream_every_steps
        return every is None or step % every == 0 or step == self.config.train.max_steps

    def evaluate(
        self, module: WorldModel, step: int, *, step_size_scale: float
    ) -> dict[str, Any] | None:
        """What belongs into the validation row of a step, empty where nothing is asked for; None
        where a stop came in between.
        """
        row: dict[str, Any] = {}
        if self.sets:
            row["sets"] = {}
        for name, split in self.sets.items():
            found: list[BadSample] = []
            values = validate(
                module,
                split,
                self.config,
                self.world,
                Observation(
                    split.manifest,
                    self.world.device,
                    mask_document_starts=self.config.data.mask_document_starts,
                ),
                context_length=resolved.context_length(self.config),
                batch_size=self.batch_size,
                step_size_scale=step_size_scale,
                heartbeat=self.heartbeat,
                stop_requested=self.stop_requested,
                found=found,
            )
            if values is None:
                return None
            self._tell_damaged(name, found)
            row["sets"][name] = values
        if not self.is_due(step):
            return row
        with whole_model(module, self.config, self.world.device) as model:
            more = self._with_whole_model(model)
        return None if more is None else row | more

    def _with_whole_model(self, model: WorldModel) -> dict[str, Any] | None:
        thinking = ThinkingConfig(seed=self.config.train.seed)
        content = _first(self.main).manifest.content
        assert isinstance(content, TextContent), "the configuration was checked for it"
        tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
        scorer = Scorer(model, tokenizer, thinking, batch_size=self.batch_size)
        shared = SharedScorer(scorer, self.world, self.heartbeat)
        row: dict[str, Any] = {}
        if self.questions:
            row["questions"] = {}
        for name, (kind, questions) in self.questions.items():
            if self.stop_requested():
                return None
            row["questions"][name] = answered(shared, kind, questions)
        if self.wanted.tasks:
            if self.stop_requested():
                return None
            try:
                row["tasks"] = shared.lead(lambda score: run_tasks(self.wanted, scorer, score))
            except RuntimeError as error:
                self._warn_once(f"evaluation.tasks failed: {shorten(error, 300)}")
        if self.wanted.samples:
            if self.stop_requested():
                return None
            self.heartbeat()
            row["samples"] = self.world.broadcast_object(
                self._continued(model) if self.world.is_main else None
            )
        return row

    def _continued(self, model: WorldModel) -> list[dict[str, str]]:
        from ebwm_scale.inference.samples_text import sample_continuations

        samples = sample_continuations(
            model,
            _first(self.main),
            seed=self.config.train.seed,
            num_samples=self.wanted.samples,
            num_tokens=self.wanted.samples_tokens,
            num_shown=0,
        )
        keys = ("prompt", "continuation", "reference")
        return [{key: sample[key] for key in keys} for sample in samples]

    def _tell_damaged(self, name: str, found: list[BadSample]) -> None:
        for of_rank in self.world.all_gather_object(found):
            for bad in of_rank:
                self._warn_once(
                    f"evaluation.sets {name}: {bad.shard}: sample {bad.key or '(all)'}: "
                    f"{bad.reason}; sample {bad.replaced_by} stands in for {bad.sample_id}"
                )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)


def answered(shared: SharedScorer, kind: str, questions: list[Question]) -> dict[str, float]:
    """The means over questions, and how many there are."""
    if kind == "multiple_choice":
        values = multiple_choice_values(shared, questions)
        more = {"chance": chance(questions), "num_questions": len(questions)}
    else:
        values = cloze_values(shared, questions)
        more = {"num_questions": len(questions)}
    return {name: of_each.mean().item() for name, of_each in values.items()} | more


def run_tasks(wanted: EvaluationConfig, scorer: Scorer, score: Callable) -> dict[str, dict]:
    """{task: {metric: value}} of lm-evaluation-harness; no seed of this process is touched."""
    import lm_eval

    from ebwm_scale.inference.harness_model import TextModel

    seeds: dict[str, Any] = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides the parameters
    result = evaluate(
        model=TextModel(scorer, score),
        tasks=list(wanted.tasks),
        task_manager=local_tasks(wanted),
        limit=wanted.tasks_limit,
        bootstrap_iters=0,
        log_samples=False,
        **seeds,
    )
    assert result is not None, "this is its first rank"
    return {task: plain_metrics(values) for task, values in result["results"].items()}


def local_tasks(wanted: EvaluationConfig):
    """The harness's tasks of one folder, and none of those that it brings."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for each task and evaluation
    return TaskManager(include_path=str(wanted.tasks_path), include_defaults=False)


def plain_metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "acc,none" as acc, "exact_match,strict" as exact_match/strict; without its
    errors, which need resampling.
    """
    metrics = {}
    for name, value in values.items():
        metric, _, filtered = name.partition(",")
        is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_figure or metric.endswith("_stderr") or not filtered:
            continue
        metrics[metric if filtered == "none" else f"{metric}/{filtered}"] = float(value)
    return metrics


def check_downstream(config: Config) -> None:
    """ConfigError or DataError for questions and tasks that cannot be read; before a run starts."""
    wanted = config.evaluation
    for asked in wanted.questions:
        read_questions(Path(asked.file), KINDS[asked.kind])
    if not wanted.tasks:
        return
    try:
        known = local_tasks(wanted).all_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"evaluation.tasks needs the package {error.name}: pip install "
            "'ebwm_scale[harness]', or leave the key out"
        ) from None
    missing = [task for task in wanted.tasks if task not in known]
    if missing:
        raise ConfigError(
            f"evaluation.tasks names {', '.join(missing)}: evaluation.tasks_path "
            f"{wanted.tasks_path} has {', '.join(known) or 'none'}"
        )


def _first(split: Split) -> ShardedSplit:
    return split.parts[0] if isinstance(split, MixedSplit) else split
