"""Graph colouring with three colours and one solution, as a grid of nodes by nodes.

    off the diagonal   1 where two nodes are joined, 0 where they are not
    on the diagonal    r, g or b where the node's colour is given, ? where it is asked for

The solution has all colours on the diagonal; those that were asked for are scored. Difficulty is
the number of search steps of the solver (search.py).
"""

from __future__ import annotations

from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance
from ebwm_scale.data.prepare.reasoning.search import Search, thinned

COLOURS = "rgb"
MEAN_DEGREE = 5.0  # edges a node: enough that few given colours decide the others
_ALL = 0b111


def draw(draws: Draws, size: int) -> Instance:
    """size: nodes. At least one colour is asked for."""
    while True:
        colours = [draws.below(len(COLOURS)) for _ in range(size)]
        joined = _edges(draws, colours)
        wanted = draws.between(max(1, size // 2), size)
        order = draws.shuffled(range(size))[:wanted]
        given = thinned([1 << colour for colour in colours], order, _ALL, _is_unique(joined))
        if _ALL in given:
            break
    puzzle, solution, scored = [], [], []
    for row in range(size):
        for column in range(size):
            if row == column:
                asked = given[row] == _ALL
                solution.append(COLOURS[colours[row]])
                puzzle.append("?" if asked else solution[-1])
                scored.append("1" if asked else "0")
            else:
                edge = "1" if column in joined[row] else "0"
                puzzle.append(edge)
                solution.append(edge)
                scored.append("0")
    text = "".join(puzzle)
    return Instance(
        puzzle=text,
        solution="".join(solution),
        scored="".join(scored),
        difficulty=Search(joined, given).steps,
        identity=_renamed(text),
    )


def _edges(draws: Draws, colours: list[int]) -> list[list[int]]:
    """The neighbours of each node; only nodes of different colours are joined."""
    nodes = range(len(colours))
    different = [(a, b) for a in nodes for b in range(a) if colours[a] != colours[b]]
    probability = MEAN_DEGREE * len(colours) / 2 / max(1, len(different))
    joined: list[list[int]] = [[] for _ in nodes]
    for a, b in different:
        if draws.chance(probability):
            joined[a].append(b)
            joined[b].append(a)
    return joined


def _is_unique(joined: list[list[int]]):
    return lambda given: len(Search(joined, given, limit=2).solutions) == 1


def _renamed(puzzle: str) -> str:
    """With colours by the order in which they first occur: renaming them is no new puzzle."""
    names: dict[str, str] = {}
    for cell in puzzle:
        if cell in COLOURS and cell not in names:
            names[cell] = COLOURS[len(names)]
    return "".join(names.get(cell, cell) for cell in puzzle)


FAMILY = Family(
    name="colouring",
    symbols="01rgb?",
    sizes=range(3, 65),
    size_word="nodes",
    draw=draw,
    grid=lambda size: (size, size),
)
