"""Grids of several sizes in one dataset: each stands somewhere in a larger square of one size.

A model learns which distances between cells there are. Of a grid that is larger than all it was
trained on, it has never seen some of them. Inside a common square it has seen all, and what grows
is the task alone.
"""

from __future__ import annotations

import dataclasses

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance


def inside(family: Family, side: int) -> Family:
    """The family with each instance at a random place in a square of side * side cells.

    The cells around an instance hold the family's surroundings, in puzzle and solution, and are
    not scored. The same instance at another place is the same one. DataError for a family without
    surroundings.
    """
    if family.surroundings is None:
        raise DataError(
            f"inside is {side}: nothing can stand around instances of {family.name}; only mazes "
            "have walls around them"
        )
    outside = family.surroundings
    cells_of = family.grid
    assert cells_of is not None, "check_family asks for it"

    def draw(draws: Draws, size: int) -> Instance:
        instance = family.draw(draws, size)
        rows, columns = cells_of(size)
        first_row = draws.between(0, side - rows)
        first_column = draws.between(0, side - columns)

        def placed(text: str, around: str) -> str:
            cells = [around] * (side * side)
            for row in range(rows):
                first = (first_row + row) * side + first_column
                cells[first : first + columns] = text[row * columns : (row + 1) * columns]
            return "".join(cells)

        return dataclasses.replace(
            instance,
            puzzle=placed(instance.puzzle, outside),
            solution=placed(instance.solution, outside),
            scored=placed(instance.scored, "0"),
        )

    return dataclasses.replace(family, draw=draw, grid=lambda size: (side, side))
