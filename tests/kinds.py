"""Which mark a test has: gpu and soak are written at the test, the other two follow from it.

A test is `multiprocess` if it, a fixture it uses, or a helper of the tests that one of them calls
uses subprocess or multiprocessing. What starts processes inside the library is not seen that way:
such a test says `pytest.mark.multiprocess` itself. All other tests are `unit`. Under `-m unit` one
that starts a process fails (`ProcessGuard`), so the marks can be held true.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

TESTS = Path(__file__).resolve().parent
STARTERS = ("subprocess", "multiprocessing", "torch.multiprocessing")
# Programs of a moment that a library asks about the machine, or compiles with.
ALLOWED = ("git", "uname", "lscpu", "ldconfig", "gcc", "g++", "cc", "c++", "clang", "ld", "ptxas")


def kind_of(item) -> str | None:
    """unit or multiprocess; None for a test that says what it is, or takes minutes."""
    marks = {mark.name for mark in item.iter_markers()}
    if marks & {"unit", "multiprocess", "gpu", "soak"}:
        return None
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    roots = [item.function, *(definition.func for chain in fixtures for definition in chain)]
    return "multiprocess" if _reach_a_starter(roots) else "unit"


def _reach_a_starter(roots: list[Any]) -> bool:
    waiting, seen = list(roots), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, ModuleType):
            if value.__name__ in STARTERS:
                return True
            continue
        waiting += _parts(value)
    return False


def _parts(value: Any) -> Iterator[Any]:
    """What a function or class of the tests refers to; nothing of anything else."""
    value = getattr(value, "__wrapped__", value)
    if isinstance(value, type):
        if _is_ours(sys.modules.get(value.__module__)):
            yield from (part for part in vars(value).values() if callable(part))
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, FunctionType) and TESTS in Path(value.__code__.co_filename).parents:
        for name in _names(value.__code__):
            if name in value.__globals__:
                yield value.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_ours(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and TESTS in Path(file).parents


class ProcessGuard:
    """Notes processes that are started while a unit test runs; an audit hook, so none gets by."""

    def __init__(self):
        self.watching = False
        self.started: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.watching:
            return
        if event in ("os.fork", "os.forkpty"):
            self.started.append(event)
        elif event in ("subprocess.Popen", "os.posix_spawn", "os.system"):
            program = str(arguments[0])
            if Path(program).name not in ALLOWED:
                self.started.append(f"{event} {program}")
