"""How far a long piece of work is: library code tells a callback, and prints nothing itself.

    for document in tracked(documents, "tokenizing", progress):
        ...

What is done with it is the caller's: core/console.py draws a bar on a terminal, and writes a line
now and then elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

Progress = Callable[[str, int, int | None], None]  # (what is done, how many are done, of how many)
Item = TypeVar("Item")
Name = TypeVar("Name")
Result = TypeVar("Result")


def no_progress(what: str, done: int, total: int | None) -> None:
    """The callback of whoever does not want to know."""


def tracked(
    items: Iterable[Item], what: str, progress: Progress, *, total: int | None = None
) -> Iterator[Item]:
    """The items; after each of them `progress` hears how many are done.

    total: how many there are; None: as many as `items` says, if it can say.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    for number, item in enumerate(items, start=1):
        yield item
        progress(what, number, total)


def counted(
    function: Callable[[Name], Result], what: str, total: int, progress: Progress
) -> Callable[[Name], Result]:
    """The function; each time it has been called `progress` hears how often it was."""
    done = 0

    def call(name: Name) -> Result:
        nonlocal done
        result = function(name)
        done += 1
        progress(what, done, total)
        return result

    return call
