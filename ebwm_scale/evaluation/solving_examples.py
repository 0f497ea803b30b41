"""Held-out instances to look at, for solving.json: the task, its answer, and what a model says
after each number of steps.

    "mark"       the symbol of an answer that no task shows, where answers have two symbols: in a
                 maze the one of a cell that is reached. None: the answers are read as symbols
    "instances"  each: sample_id, difficulty, task and answer as a list of symbols, one a position
                 (answer: None where nothing is scored), and after: a list of

        num_steps, energy               mean over the scored positions, None of a baseline
        predicted                       the most probable symbol
        probability                     of that symbol
        probability_of_mark             absent without a mark
        energy_of_cell                  of each scored position by itself; absent if not asked for
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.data.tokenizer import Tokenizer
from ebwm_scale.evaluation.answers import Answer, Instances, answers

MAX_SHOWN = 8  # numbers of steps of an instance
MAX_POSITIONS = 1024  # cells of a group that is shown


@dataclass(frozen=True)
class Shown:
    """The instances that are shown: a batch of them, and how they are read.

    mark: the token of "mark". is_grid: a position's task is its cell; of a text it is the token
    that stands where the answer's does.
    """

    batch: Instances
    difficulty: list[int] | None
    tokenizer: Tokenizer
    mark: int | None
    is_grid: bool

    @staticmethod
    def choose(
        batches: Sequence[Instances],
        groups: Sequence[Tensor],
        count: int,
        difficulty: Tensor | None,
        tokenizer: Tokenizer,
        *,
        is_grid: bool,
    ) -> Shown:
        """groups: see choose_instances. difficulty: of all instances, if there is one."""
        chosen = choose_instances(groups, count)
        return Shown(
            some_of(batches, chosen),
            None if difficulty is None else difficulty[chosen].tolist(),
            tokenizer,
            mark_of(batches) if is_grid else None,
            is_grid,
        )

    def to_dict(
        self, model, numbers: Sequence[int], other, of_other: int | None, *, cells: bool = False
    ) -> dict[str, Any]:
        """ "examples" of solving.json; other: a model to compare with after of_other steps.

        cells: with the energy of each.
        """
        instances = []
        after = self._after(model, numbers, cells)
        against = self._after(other, [of_other]) if of_other is not None else None
        for row in range(len(self.batch.sample_ids)):
            instance = self._about(row) | {"after": after[row]}
            if against is not None:
                instance["against"] = against[row][0]
            instances.append(instance)
        mark = None if self.mark is None else self.tokenizer.piece(self.mark)
        return {"mark": mark, "instances": instances}

    def _about(self, row: int) -> dict[str, Any]:
        answer = self.batch.targets[row].tolist()
        task = self.batch.observed[row].tolist()
        if not self.is_grid:
            task = [*task[1:], answer[-1] if answer[-1] != IGNORE else task[-1]]
        piece = self.tokenizer.piece
        return {
            "sample_id": int(self.batch.sample_ids[row]),
            "difficulty": None if self.difficulty is None else self.difficulty[row],
            "task": [piece(token) for token in task],
            "answer": [None if token == IGNORE else piece(token) for token in answer],
        }

    def _after(
        self, model, numbers: Sequence[int], cells: bool = False
    ) -> list[list[dict[str, Any]]]:
        """Of each instance its entries of "after"."""
        found: list[list[dict[str, Any]]] = [[] for _ in self.batch.sample_ids]
        for answer in answers(model, self.batch, numbers, cells=cells):
            for row, entries in enumerate(found):
                entries.append(self._entry(answer, row))
        return found

    def _entry(self, answer: Answer, row: int) -> dict[str, Any]:
        scored = self.batch.targets[row] != IGNORE
        probabilities = answer.logits[row].float().softmax(-1)
        largest, predicted = probabilities.max(-1)
        energy = None
        if answer.energy is not None:
            energy = _finite(float(answer.energy[row][scored].double().mean()))
        entry: dict[str, Any] = {
            "num_steps": answer.num_steps,
            "energy": energy,
            "predicted": [
                self.tokenizer.piece(token) if is_scored else None
                for token, is_scored in zip(predicted.tolist(), scored.tolist())
            ],
            "probability": _at(scored, largest),
        }
        if self.mark is not None:
            entry["probability_of_mark"] = _at(scored, probabilities[:, self.mark])
        if answer.cells is not None:
            of_cells = zip(answer.cells[row].tolist(), scored.tolist())
            entry["energy_of_cell"] = [
                _finite(float(f"{value:.5g}")) if is_scored else None
                for value, is_scored in of_cells
            ]
        return entry


def choose_instances(groups: Sequence[Tensor], count: int) -> list[int]:
    """At most count indices: the first of evenly spaced groups, easiest and hardest included.

    groups: bool (instances,) each, of ranges of difficulty; or one of all, whose first are taken.
    """
    if len(groups) == 1 or count == 1:
        return groups[0].nonzero().flatten()[:count].tolist()
    count = min(count, len(groups))
    places = torch.linspace(0, len(groups) - 1, count).round().long().tolist()
    return [int(groups[place].nonzero()[0]) for place in places]


def some_of(batches: Sequence[Instances], chosen: Sequence[int]) -> Instances:
    """Instances of all batches by their index, as one batch."""

    def picked(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])[list(chosen)]

    return Instances(picked("sample_ids"), picked("observed"), picked("targets"))


def mark_of(batches: Sequence[Instances]) -> int | None:
    """The token of "mark", of tasks on grids."""
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    given = torch.cat([batch.observed.flatten() for batch in batches]).unique()
    symbols = targets[targets != IGNORE].unique()
    new = symbols[~torch.isin(symbols, given)]
    return int(new[0]) if len(symbols) == 2 and len(new) == 1 else None


def numbers_shown(numbers: Sequence[int], trained: int | None) -> list[int]:
    """Of many numbers of steps MAX_SHOWN, the first, the trained and the last one among them."""
    if len(numbers) <= MAX_SHOWN:
        return list(numbers)
    places = torch.linspace(0, len(numbers) - 1, MAX_SHOWN - 1).round().long().tolist()
    kept = {numbers[place] for place in places}
    if trained is not None:
        kept.add(trained)
    return sorted(kept)


def _at(scored: Tensor, values: Tensor) -> list[float | None]:
    """Values rounded for a page, None where nothing is scored or where one is not finite."""
    return [
        round(value, 4) if is_scored and math.isfinite(value) else None
        for value, is_scored in zip(values.tolist(), scored.tolist())
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
