"""Sudoku of 4 x 4, 6 x 6 and 9 x 9 cells with one solution.

Boxes have 2 x 2, 2 x 3 and 3 x 3 cells. `.` is an open cell; open cells are scored. Difficulty is
the number of search steps of the solver (search.py): rounds of filling in, over all values tried.
"""

from __future__ import annotations

import functools

from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance
from ebwm_scale.data.prepare.reasoning.search import Search, thinned

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size -> (rows, columns) of a box
OPEN_SHARE = 0.4, 0.7  # of the cells: the least and the most that are to be opened


@functools.cache
def peers(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell those that must differ from it: of its row, its column and its box."""
    box_rows, box_columns = BOXES[size]

    def houses(cell: int) -> tuple[int, int, tuple[int, int]]:
        row, column = divmod(cell, size)
        return row, column, (row // box_rows, column // box_columns)

    cells = range(size * size)
    found = []
    for cell in cells:
        shares = [
            other
            for other in cells
            if other != cell and any(a == b for a, b in zip(houses(cell), houses(other)))
        ]
        found.append(tuple(shares))
    return tuple(found)


def draw(draws: Draws, size: int) -> Instance:
    num_cells = size * size
    all_values = (1 << size) - 1
    solution = Search(peers(size), [all_values] * num_cells, draws=draws).solutions[0]
    wanted = draws.between(int(OPEN_SHARE[0] * num_cells), int(OPEN_SHARE[1] * num_cells))
    order = draws.shuffled(range(num_cells))[:wanted]
    given = thinned([1 << value for value in solution], order, all_values, _is_unique(size))
    puzzle = "".join(
        "." if bits == all_values else str(value + 1) for bits, value in zip(given, solution)
    )
    return Instance(
        puzzle=puzzle,
        solution="".join(str(value + 1) for value in solution),
        scored="".join("1" if cell == "." else "0" for cell in puzzle),
        difficulty=Search(peers(size), given).steps,
        identity=min(_renumbered(puzzle), _renumbered(_transposed(puzzle, size))),
    )


def _is_unique(size: int):
    return lambda given: len(Search(peers(size), given, limit=2).solutions) == 1


def _renumbered(puzzle: str) -> str:
    """With digits by the order in which they first occur: renaming them is no new puzzle."""
    names: dict[str, str] = {".": "."}
    for cell in puzzle:
        if cell not in names:
            names[cell] = str(len(names))
    return "".join(names[cell] for cell in puzzle)


def _transposed(puzzle: str, size: int) -> str:
    return "".join(puzzle[column::size] for column in range(size))


FAMILY = Family(
    name="sudoku",
    symbols=".123456789",
    sizes=tuple(BOXES),
    size_word="cells a side",
    draw=draw,
    grid=lambda size: (size, size),
)
