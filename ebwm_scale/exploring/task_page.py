"""Held-out tasks with one right answer as values for templates/explore_task.html.j2: one instance
with the answer after each number of steps, and how many instances are solved by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.content import difficulty_of
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.evaluation.answers import Instances, numbers_of_steps, trained_steps
from ebwm_scale.evaluation.solving import (
    Other,
    fit_groups,
    read_instances,
    solved_by_steps,
)
from ebwm_scale.evaluation.solving_examples import (
    MAX_POSITIONS,
    Shown,
    mark_of,
    numbers_shown,
    some_of,
)
from ebwm_scale.exploring.request import Field
from ebwm_scale.reporting.plain import page_text
from ebwm_scale.reporting.solving_examples import examples_of
from ebwm_scale.reporting.solving_page import plots_of
from ebwm_scale.world_model import WorldModel

MAX_STEPS = 64
MAX_CHANGES = 24  # cells that the table of changes lists
BATCH_SIZE = 16


@dataclass(frozen=True)
class TaskRequest:
    """Which of the instances, counted from 1, and up to how many steps; None: twice the trained."""

    instance: int = 1
    most_steps: int | None = None


@dataclass
class TaskExplorer:
    """A model and another to compare with, on the first instances of a split."""

    model: WorldModel
    config: Config
    split: Any
    batches: Sequence[Instances]
    sample_ids: Sequence[int]
    other: Other | None = None
    solved: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(
        model: WorldModel, config: Config, split, num_instances: int, other: Other | None = None
    ) -> TaskExplorer:
        """UserError for tasks that a model does not fit, or that are too large to be shown."""
        content = split.manifest.content
        if content.group_size > MAX_POSITIONS:
            raise UserError(
                f"{split.manifest.path}: groups of {content.group_size} cells are too large to be "
                f"shown, at most {MAX_POSITIONS} are: ebwm evaluate says how many are solved"
            )
        for each in [model, *([other.model] if other is not None else [])]:
            fit_groups(each, split.manifest)
        batches, sample_ids = read_instances(model, split, num_instances, BATCH_SIZE)
        return TaskExplorer(model, config, split, batches, sample_ids, other)

    def fields(self) -> tuple[Field, Field]:
        trained = trained_steps(self.config)
        return (
            Field("instance", "instance", 1, len(self.sample_ids), True),
            Field("most_steps", "steps", 1, MAX_STEPS, True, f"{2 * (trained or 1)}"),
        )

    def read(self, given: Mapping[str, str]) -> TaskRequest:
        """Of a form's fields; UserError for what is out of range."""
        instance, most_steps = self.fields()
        number = instance.read(given.get("instance", "1"))
        steps = most_steps.read(given.get("most_steps", ""))
        return TaskRequest(int(number or 1), None if steps is None else int(steps))

    def answer(self, request: TaskRequest) -> dict[str, Any]:
        """The values of a page for a request."""
        content = self.split.manifest.content
        trained = trained_steps(self.config)
        most = request.most_steps or 2 * (trained or 1)
        counts = [1, *(2**power for power in range(1, 7) if 2**power < most), most]
        asked = [number for number in numbers_of_steps(self.config, counts) if number <= most]
        numbers = asked if trained is None else sorted({*asked, trained})
        solved = self._solved(numbers)
        result = {
            **solved,
            "grid": content.grid,
            "examples": self._example(request.instance - 1, numbers, trained),
        }
        examples = examples_of(result)
        found = result["examples"]["instances"][0]
        points = solved["steps"]
        rows = []
        for point in points:
            name = "its answer" if trained is None else str(point["num_steps"])
            rows.append([name, *(f"{point[what]['mean']:.4g}" for what in _COLUMNS)])
        return {
            "fields": self._form(request),
            "instance": request.instance,
            "num_instances": len(self.sample_ids),
            "examples": examples,
            "reel": _reel(examples),
            "mind": changes_of_mind(found, content.grid),
            "plots": plots_of(solved, points) if len(points) > 1 else [],
            "heads": ["steps", "solved instances", "right tokens", "loss, nats per scored token"],
            "rows": rows,
        }

    def _form(self, request: TaskRequest) -> list[dict[str, str]]:
        values = {
            "instance": str(request.instance),
            "most_steps": "" if request.most_steps is None else str(request.most_steps),
        }
        return [
            {
                "name": each.name,
                "label": f"{each.label}, 1 to {each.high:g}",
                "value": values[each.name],
                "empty": each.empty or "",
            }
            for each in self.fields()
        ]

    def _solved(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Of all instances; computed once."""
        key = tuple(numbers)
        if key not in self.solved:
            self.solved[key] = solved_by_steps(
                self.model, self.config, self.batches, numbers, self.other
            )
        return self.solved[key]

    def _example(self, index: int, numbers: Sequence[int], trained: int | None) -> dict[str, Any]:
        content = self.split.manifest.content
        difficulty = None
        if "difficulty" in content.members:
            difficulty = [difficulty_of(self.split.read_fields(self.sample_ids[index]))]
        is_grid = content.grid is not None
        shown = Shown(
            some_of(self.batches, [index]),
            difficulty,
            open_tokenizer(content.tokenizer_path, eos_id=content.eos_id),
            mark_of(self.batches) if is_grid else None,
            is_grid,
        )
        other = self.other
        return shown.to_dict(
            self.model,
            numbers_shown(numbers, trained),
            None if other is None else other.model,
            None if other is None else trained_steps(other.config) or 1,
            cells=True,
        )


_COLUMNS = ("solved", "accuracy", "loss")


def _reel(examples: dict[str, Any] | None) -> dict[str, Any] | None:
    """The pictures of a grid one at a time; None of a text. They show the drawings of the page."""
    if examples is None or not examples["grids"]:
        return None
    panels = examples["grids"][0]["panels"]
    return {
        "moments": [", ".join(panel["lines"]) for panel in panels],
        "alts": [panel["alt"] for panel in panels],
        "rows": examples["rows"],
        "columns": examples["columns"],
    }


def changes_of_mind(found: Mapping[str, Any], grid: Sequence[int] | None) -> dict[str, Any]:
    """Where the answer to an instance changed from one number of steps to the next: a row for each
    such cell, and how many there are. found: an instance as in solving.json.
    """
    after = found["after"]
    places = [place for place, right in enumerate(found["answer"]) if right is not None]
    rows = []
    better = worse = num_changed = 0
    for place in places:
        said = [entry["predicted"][place] for entry in after]
        if len(set(said)) == 1:
            continue
        num_changed += 1
        right = found["answer"][place]
        better += said[0] != right and said[-1] == right
        worse += said[0] == right and said[-1] != right
        if len(rows) < MAX_CHANGES:
            name = f"position {place + 1}"
            if grid is not None:
                name = f"row {place // grid[1] + 1} column {place % grid[1] + 1}"
            marked = [_symbol(word, word == right) for word in said]
            rows.append([name, *marked, page_text(str(right), 8)])
    sentence = ""
    if len(after) > 1:
        first, last = after[0]["num_steps"], after[-1]["num_steps"]
        sentence = (
            f"{num_changed} of {len(places)} answers changed. From {first} to {last} steps "
            f"{better} became right and {worse} wrong."
        )
        if num_changed > len(rows):
            sentence += f" The first {len(rows)} are shown."
    heads = ["where", *(f"after {entry['num_steps']}" for entry in after), "right answer"]
    return {"sentence": sentence, "heads": heads, "rows": rows}


def _symbol(word: str, is_right: bool) -> str:
    return page_text(str(word), 8) + ("" if is_right else " ✗")
