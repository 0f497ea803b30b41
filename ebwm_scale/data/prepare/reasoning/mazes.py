"""Mazes on a square of cells: which cells can be reached from the start, and the shortest path from
the start to the goal.

    #  wall      .  free      S  start      G  goal
    +  reached, in a solution      *  on the path, in a solution

Scored are the cells that are no walls. Difficulty is the number of steps that breadth-first search
takes: the distance to the farthest cell that can be reached, or to the goal.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance

WALLS = 0.38  # share of the cells that are walls: here the part that can be reached varies most
SIZES = range(3, 65)
_SYMBOLS = "#.SG+*"


@dataclass(frozen=True)
class Paths:
    """distance: of each cell from the start, -1 where it cannot be reached. ways: how many shortest
    paths lead there. before: for each cell, one that comes before it on a shortest path.
    """

    distance: list[int]
    ways: list[int]
    before: list[int]


def paths_from(start: int, walls: list[bool], size: int) -> Paths:
    """Breadth-first search from a cell; walls (size * size) row by row."""
    distance = [-1] * len(walls)
    ways = [0] * len(walls)
    before = [-1] * len(walls)
    distance[start], ways[start] = 0, 1
    front = [start]
    while front:
        following = []
        for cell in front:
            for other in neighbours(cell, size):
                if walls[other]:
                    continue
                if distance[other] < 0:
                    distance[other] = distance[cell] + 1
                    before[other] = cell
                    following.append(other)
                if distance[other] == distance[cell] + 1:
                    ways[other] += ways[cell]
        front = following
    return Paths(distance, ways, before)


def neighbours(cell: int, size: int) -> list[int]:
    """The cells above, below, left and right, inside the square."""
    row, column = divmod(cell, size)
    found = []
    if row > 0:
        found.append(cell - size)
    if row < size - 1:
        found.append(cell + size)
    if column > 0:
        found.append(cell - 1)
    if column < size - 1:
        found.append(cell + 1)
    return found


def draw_reachability(draws: Draws, size: int) -> Instance:
    """A maze in which at least one cell beside the start can be reached."""
    while True:
        walls, start = _maze(draws, size)
        paths = paths_from(start, walls, size)
        farthest = max(paths.distance)
        if farthest > 0:
            break
    puzzle = ["#" if wall else "." for wall in walls]
    solution = list(puzzle)
    for cell, steps in enumerate(paths.distance):
        if steps >= 0:
            solution[cell] = "+"
    puzzle[start] = "S"
    return _instance(puzzle, solution, walls, farthest, size)


def draw_shortest_path(draws: Draws, size: int) -> Instance:
    """A maze with one shortest path; distances to the goal are drawn evenly."""
    while True:
        walls, start = _maze(draws, size)
        paths = paths_from(start, walls, size)
        goals: dict[int, list[int]] = {}
        for cell, steps in enumerate(paths.distance):
            if steps > 1 and paths.ways[cell] == 1:
                goals.setdefault(steps, []).append(cell)
        if goals:
            break
    steps = draws.pick(sorted(goals))
    goal = draws.pick(goals[steps])
    puzzle = ["#" if wall else "." for wall in walls]
    solution = list(puzzle)
    cell = goal
    while cell >= 0:
        solution[cell] = "*"
        cell = paths.before[cell]
    puzzle[start], puzzle[goal] = "S", "G"
    return _instance(puzzle, solution, walls, steps, size)


def _maze(draws: Draws, size: int) -> tuple[list[bool], int]:
    """(walls, start)."""
    walls = [draws.chance(WALLS) for _ in range(size * size)]
    start = draws.below(size * size)
    walls[start] = False
    return walls, start


def _instance(
    puzzle: list[str], solution: list[str], walls: list[bool], difficulty: int, size: int
) -> Instance:
    text = "".join(puzzle)
    return Instance(
        puzzle=text,
        solution="".join(solution),
        scored="".join("0" if wall else "1" for wall in walls),
        difficulty=difficulty,
        identity=min(turned_and_mirrored(text, size)),
    )


def turned_and_mirrored(cells: str, size: int) -> list[str]:
    """The eight ways to look at a square."""
    rows = [cells[first : first + size] for first in range(0, len(cells), size)]
    found = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*rows[::-1])]  # a quarter turn
        found.append("".join(rows))
        found.append("".join(row[::-1] for row in rows))
    return found


def _square(size: int) -> tuple[int, int]:
    return size, size


REACHABILITY = Family(
    name="reachability",
    symbols=_SYMBOLS,
    sizes=SIZES,
    size_word="cells a side",
    draw=draw_reachability,
    grid=_square,
    surroundings="#",
)
SHORTEST_PATH = Family(
    name="shortest-path",
    symbols=_SYMBOLS,
    sizes=SIZES,
    size_word="cells a side",
    draw=draw_shortest_path,
    grid=_square,
    surroundings="#",
)
