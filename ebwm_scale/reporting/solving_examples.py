"""The instances of solving.json as plain values for templates/solving_examples.html.j2: the task,
the answer after each number of steps, and the right one.

Tasks on grids are pictures, a square a cell; texts are tables. What is wrong, and what changed, is
told by a sign and in words, never by colour alone.
"""

from __future__ import annotations

import math
from typing import Any

from ebwm_scale.reporting.curves import number
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.plain import mappings, page_text
from ebwm_scale.reporting.solving_verdict import name_of_other, word_for_steps

MAX_EXAMPLES = 12
MAX_PANELS = 12
MAX_CELLS = 1024  # of a grid
MAX_ANSWERS = 40  # scored tokens of a text
MAX_LISTED = 8  # wrong cells that a picture's text names
WALL, FREE = "#", "."  # of mazes: drawn as a block, and as nothing


def examples_of(result: dict[str, Any]) -> dict[str, Any] | None:
    """ "examples" of a result for the template; None without any."""
    given = result.get("examples")
    listed = mappings(given.get("instances"), MAX_EXAMPLES) if isinstance(given, dict) else []
    if not listed or given is None:
        return None
    grid = result["grid"]
    if grid is None:
        return {"mark": "", "grids": [], "texts": [_text(item, result) for item in listed]}
    rows, columns = (int(side) for side in grid)
    if rows * columns > MAX_CELLS:
        return None
    mark = given.get("mark")
    return {
        "mark": "" if mark is None else _symbol(mark),
        "rows": rows,
        "columns": columns,
        "grids": [_grid(item, result, mark, rows * columns, columns) for item in listed],
        "texts": [],
    }


def _title(item: dict) -> str:
    difficulty = item.get("difficulty")
    about = f"instance {item.get('sample_id', '?')}"
    return page_text(about if difficulty is None else f"Difficulty {difficulty}, {about}", 80)


def _answers(item: dict, result: dict[str, Any]) -> list[tuple[str, dict]]:
    """(name, entry) of what is shown one after the other; the other model's comes last."""
    word, trained = word_for_steps(result), result["trained_steps"]
    found = []
    for entry in mappings(item.get("after"), MAX_PANELS):
        name = f"after {word} {int(entry['num_steps'])}"
        found.append(("its answer" if trained is None else name, entry))
    if isinstance(item.get("against"), dict) and isinstance(result.get("against"), dict):
        found.append((name_of_other(result["against"]), item["against"]))
    return found


def _grid(
    item: dict, result: dict[str, Any], mark: str | None, num_cells: int, columns: int
) -> dict[str, Any]:
    task = [_symbol(symbol) for symbol in item["task"][:num_cells]]
    answer = item["answer"][:num_cells]
    span = _span_of_energies(item)
    panels = [_panel("the task", task, answer, columns, {}, None, mark, [])]
    before = None
    for name, entry in _answers(item, result):
        is_other = entry is item.get("against")
        compared = None if is_other else before
        lines = [] if entry.get("energy") is None else [f"energy {show(number(entry['energy']))}"]
        panels.append(_panel(name, task, answer, columns, entry, compared, mark, lines, span))
        before = None if is_other else entry["predicted"]
    truth = {"predicted": answer, "probability": [1.0] * len(answer)}
    if mark is not None:
        truth["probability_of_mark"] = [float(symbol == mark) for symbol in answer]
    panels.append(_panel("the right answer", task, answer, columns, truth, None, mark, []))
    span_text = None if span is None else [show(energy) for energy in span]
    return {"title": _title(item), "panels": panels, "energies": span_text}


def _span_of_energies(item: dict) -> tuple[float, float] | None:
    """The lowest and the highest energy of a cell after any step; None where cells have none."""
    found = [
        energy
        for entry in mappings(item.get("after"), MAX_PANELS)
        for energy in map(number, entry.get("energy_of_cell") or [])
        if energy == energy
    ]
    return (min(found), max(found)) if found else None


def _panel(
    name: str,
    task: list[str],
    answer: list,
    columns: int,
    entry: dict,
    before: list | None,
    mark: str | None,
    lines: list[str],
    span: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A picture of a grid. entry: what was predicted, empty for the task itself; before: what was
    predicted at the number of steps in front of it. span: of all energies of cells.
    """
    is_task = "predicted" not in entry
    predicted = task if is_task else entry["predicted"]
    shades = entry.get("probability" if mark is None else "probability_of_mark")
    energies = entry.get("energy_of_cell")
    cells, wrong, num_changed = [], [], 0
    for place, (given, right) in enumerate(zip(task, answer)):
        is_open = right is not None and not is_task
        is_wrong = is_open and predicted[place] != right
        is_changed = is_open and before is not None and before[place] != predicted[place]
        y, x = divmod(place, columns)
        if is_wrong:
            wrong.append(_place(y, x))
        num_changed += is_changed
        glyph = given
        if is_open and (mark is None or given == FREE):
            glyph = _symbol(predicted[place])
        energy = number(energies[place]) if is_open and energies is not None else math.nan
        cells.append(
            {
                "x": x,
                "y": y,
                "is_wall": given == WALL and not is_open,
                "is_given": right is None,
                "glyph": "" if glyph in (WALL, FREE) else glyph,
                "shade": _shade(shades[place]) if is_open and shades is not None else "",
                "is_wrong": is_wrong,
                "is_changed": is_changed,
                "strength": _strength(energy, span),
                "hint": "" if energy != energy else f"{_place(y, x)}: energy {show(energy)}",
            }
        )
    alt = name
    if not is_task and predicted is not answer:
        num_open = sum(right is not None for right in answer)
        lines = [*lines, f"{num_open - len(wrong)} of {num_open} right"]
        if before is not None:
            lines = [*lines, f"{num_changed} changed"]
        alt = ", ".join([name, *lines])
        if wrong:
            more = len(wrong) - MAX_LISTED
            listed = ", ".join(wrong[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
            alt += f"; wrong: {listed}"
    return {"lines": [name, *lines], "alt": alt, "cells": cells}


def _place(row: int, column: int) -> str:
    return f"row {row + 1} column {column + 1}"


def _strength(energy: float, span: tuple[float, float] | None) -> str:
    """The opacity of an energy's colour: the lower, the stronger."""
    if energy != energy or span is None:
        return ""
    low, high = span
    return f"{0.9 * (high - energy) / (high - low) if high > low else 0.45:.2f}"


def _text(item: dict, result: dict[str, Any]) -> dict[str, Any]:
    """A table: a row per number of steps, a column per scored token."""
    task, answer = item["task"], item["answer"]
    places = [place for place, right in enumerate(answer) if right is not None]
    shown = places[:MAX_ANSWERS]
    rows, before = [], None
    for name, entry in _answers(item, result):
        is_other = entry is item.get("against")
        predicted, probability = entry["predicted"], entry["probability"]
        compared = None if is_other else before
        cells = []
        for place in shown:
            is_changed = compared is not None and compared[place] != predicted[place]
            chance = number(probability[place])
            energies = entry.get("energy_of_cell")
            energy = math.nan if energies is None else number(energies[place])
            cells.append(
                {
                    "symbol": _symbol(predicted[place]),
                    "probability": f"{chance:.0%}" if chance == chance else "–",
                    "is_wrong": predicted[place] != answer[place],
                    "is_changed": is_changed,
                    "energy": "" if energy != energy else show(energy),
                }
            )
        energy = number(entry.get("energy"))
        rows.append(
            {"name": name, "energy": show(energy) if energy == energy else "–", "cells": cells}
        )
        before = None if is_other else predicted
    last = places[-1] + 1 if places else 0
    return {
        "title": _title(item),
        "pieces": [
            {"text": _symbol(symbol), "is_answer": right is not None}
            for symbol, right in zip(task[:last], answer[:last])
        ],
        "heads": [_symbol(answer[place]) for place in shown],
        "rows": rows,
        "more": f"{len(places) - len(shown):,}" if len(places) > len(shown) else "",
    }


def _symbol(value: Any) -> str:
    return page_text(str(value), 8)


def _shade(probability: Any) -> str:
    """The opacity of a cell's colour, so that the sign in it stays readable."""
    value = number(probability)
    return f"{0.9 * min(max(value, 0.0), 1.0):.2f}" if value == value else ""
