"""What has to hold of a family and of its instances before they become samples: one's own families
are checked like ours (docs/reasoning.md, "A task of your own").
"""

from __future__ import annotations

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.data.prepare.reasoning.instance import Family, Instance

MAX_SYMBOLS = 1000
MAX_DIFFICULTY = 2**32 - 1


def check_family(family: Family) -> None:
    """DataError where symbols and forms do not fit."""
    symbols = family.symbols
    if not 1 <= len(symbols) <= MAX_SYMBOLS or len(set(symbols)) < len(symbols):
        raise DataError(
            f"family {family.name}: symbols are {shown(symbols)}: must be 1 to {MAX_SYMBOLS} "
            "different characters"
        )
    unfit = [symbol for symbol in symbols if symbol.isspace() or not symbol.isprintable()]
    if unfit:
        raise DataError(
            f"family {family.name}: symbols hold {shown(unfit[0])}: must be printable and no "
            "blanks (a text may have the space without naming it)"
        )
    if (family.grid is None) == (family.longest is None):
        raise DataError(
            f"family {family.name}: give grid (rows and columns of a size) for answers on grids, "
            "or longest (characters of a size) for texts, and not both"
        )
    around = family.surroundings
    if around is not None and (family.grid is None or around not in symbols or len(around) != 1):
        raise DataError(
            f"family {family.name}: surroundings are {shown(around)}: must be one of its symbols, "
            "of a family of grids"
        )


def check_instance(family: Family, size: int, instance: Instance) -> None:
    """DataError where an instance is none of its family."""

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise DataError(f"family {family.name}, size {size}: {problem}")

    puzzle, solution, scored = instance.puzzle, instance.solution, instance.scored
    if family.grid is not None:
        rows, columns = family.grid(size)
        for what, text in (("puzzle", puzzle), ("solution", solution), ("scored", scored)):
            require(
                len(text) == rows * columns,
                f"{what} has {len(text)} characters, must have one for each of {rows} x {columns} "
                "cells",
            )
        allowed = set(family.symbols)
    else:
        assert family.longest is not None, "check_family asks for it"
        require(
            len(puzzle) > 0 and len(puzzle + solution) <= family.longest(size),
            f"puzzle and solution have {len(puzzle)} and {len(solution)} characters: the puzzle "
            f"needs one at least, and both together at most longest({size}) = "
            f"{family.longest(size)}",
        )
        require(
            len(scored) == len(solution) + 1,
            f"scored has {len(scored)} characters, must have {len(solution) + 1}: one for each of "
            "the solution's, and one for the end after it",
        )
        allowed = {*family.symbols, " "}
    for symbol in puzzle + solution:
        require(symbol in allowed, f"{shown(symbol)} is not among the symbols {family.symbols}")
    require(
        set(scored) <= {"0", "1"} and "1" in scored,
        f"scored is {shown(scored)}: must be of 0 and 1, with a 1 at least",
    )
    difficulty = instance.difficulty
    require(
        type(difficulty) is int and 0 <= difficulty <= MAX_DIFFICULTY,
        f"difficulty is {shown(difficulty)}: must be a whole number from 0 to {MAX_DIFFICULTY}",
    )
