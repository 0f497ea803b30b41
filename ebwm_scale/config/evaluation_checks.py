"""What has to hold between the keys of `evaluation`, `checkpoint.best` and `logging.profile`."""

from __future__ import annotations

from collections.abc import Sequence

from ebwm_scale.config.requirement import Require
from ebwm_scale.config.resolved import group_size
from ebwm_scale.config.schema import Config
from ebwm_scale.core.plain_text import shown

OF_QUESTIONS = {  # what an evaluation of questions gives
    "multiple_choice": ("accuracy", "accuracy_per_byte", "accuracy_by_energy"),
    "cloze": ("accuracy", "nats_per_token"),
}


def check_evaluation(config: Config, require: Require) -> None:
    evaluation = config.evaluation
    _check_names("sets", [(s.name, s.manifest) for s in evaluation.sets], "manifest", require)
    files = [(asked.name, asked.file) for asked in evaluation.questions]
    _check_names("questions", files, "file", require)
    is_text = config.state.kind == "vocabulary"
    for key in ("questions", "tasks", "samples"):
        value = getattr(evaluation, key)
        require(
            not value or (is_text and group_size(config) == 1),
            f"evaluation.{key} is given: only models of text, token by token, read and write it; "
            "leave the key out",
        )
    require(
        bool(evaluation.tasks) == (evaluation.tasks_path is not None),
        f"evaluation.tasks is {shown(list(evaluation.tasks))} with evaluation.tasks_path "
        f"{evaluation.tasks_path}: give both, the folder being that of the tasks' YAML files, or "
        "neither",
    )
    require(
        evaluation.tasks_limit is None or bool(evaluation.tasks),
        f"evaluation.tasks_limit is {evaluation.tasks_limit} without evaluation.tasks: "
        "leave it out",
    )
    every, downstream = evaluation.every_steps, evaluation.downstream_every_steps
    require(
        downstream is None or (every > 0 and downstream % every == 0),
        f"evaluation.downstream_every_steps is {downstream}: must be a multiple of "
        f"evaluation.every_steps {every}, which must not be 0",
    )
    _check_best(config, require)


def _check_names(key: str, given: Sequence[tuple[str, str]], place: str, require: Require) -> None:
    """Each entry of a list has a name of its own, usable in a path, and a file."""
    names = [name for name, _ in given]
    for number, (name, value) in enumerate(given):
        require(
            name != "" and not any(c.isspace() or c == "/" for c in name),
            f"evaluation.{key}[{number}].name is {shown(name)}: must be a word without /",
        )
        require(value != "", f"evaluation.{key}[{number}].{place} is absent: name a file")
    require(
        len(set(names)) == len(names), f"evaluation.{key} are named {shown(names)}: each name once"
    )


def _check_best(config: Config, require: Require) -> None:
    best = config.checkpoint.best
    if best is None:
        return
    require(
        config.checkpoint.keep_best,
        "checkpoint.best is given with checkpoint.keep_best false: the best one is not kept; "
        "use true, or leave checkpoint.best out",
    )
    evaluation = config.evaluation
    kind, _, rest = best.metric.partition("/")
    name, _, figure = rest.partition("/")
    own = ["loss", "initial_loss"]
    own += ["perplexity"] if config.state.kind == "vocabulary" else []
    known = list(own)
    for held_out in evaluation.sets:
        known += [f"sets/{held_out.name}/{number}" for number in own]
    for asked in evaluation.questions:
        known += [f"questions/{asked.name}/{number}" for number in OF_QUESTIONS[asked.kind]]
    is_of_task = kind == "tasks" and name in evaluation.tasks and figure != ""
    known += [f"tasks/{task}/METRIC" for task in evaluation.tasks]
    require(
        best.metric in known or is_of_task,
        f"checkpoint.best.metric is {shown(best.metric)}: no number of a validation row of this "
        f"run; there are {', '.join(known)}",
    )
