"""The families of tasks by name."""

from __future__ import annotations

from ebwm_scale.data.prepare.reasoning import colouring, hops, mazes, multiplication, sudoku

FAMILIES = {
    family.name: family
    for family in (
        mazes.REACHABILITY,
        mazes.SHORTEST_PATH,
        sudoku.FAMILY,
        colouring.FAMILY,
        multiplication.FAMILY,
        hops.FAMILY,
    )
}
