"""What a family of tasks is, and one instance of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Instance:
    """One task and its answer, both as characters of the family's symbols.

    A grid: puzzle and solution have one character per cell, row by row; scored has "1" for each
    cell that counts and "0" for the others. A text: the solution follows the puzzle; scored has a
    character for each of the solution's, and one for the end after it.
    difficulty: a whole number, what it counts is the family's affair. identity: equal for
    instances that are the same up to what is cheap to see through.
    """

    puzzle: str
    solution: str
    scored: str
    difficulty: int
    identity: str


@dataclass(frozen=True)
class Family:
    """How instances of a family are drawn.

    symbols: all characters, in the order of their token ids. sizes: the allowed ones, and the word
    for what they count. draw: an instance of a size. grid: (rows, columns) of a size; None: the
    instances are texts, of at most longest(size) characters. surroundings: the symbol that may
    stand around a grid without changing its answer; None: nothing may.
    """

    name: str
    symbols: str
    sizes: Sequence[int]
    size_word: str
    draw: Callable[[Draws, int], Instance]
    grid: Callable[[int], tuple[int, int]] | None = None
    longest: Callable[[int], int] | None = None
    surroundings: str | None = None


class Draws:
    """Random choices that are the same on every machine and in every release of Python.

    They stand on random.random() alone, whose sequence Python promises not to change. The key
    says which sequence: instance 7 of a dataset does not depend on how the first six were drawn.
    """

    def __init__(self, *key: object):
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, count: int) -> int:
        """0 .. count - 1, each as likely."""
        return int(self._random() * count)

    def between(self, low: int, high: int) -> int:
        """low .. high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list of the items in random order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result
