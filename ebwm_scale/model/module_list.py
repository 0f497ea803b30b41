"""nn.ModuleList for type checkers: one that says what its modules are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleList(nn.ModuleList, Generic[M]):
        """As nn.ModuleList, whose own annotations know nothing but nn.Module."""

        def __init__(self, modules: Iterable[M] = ()): ...
        def __iter__(self) -> Iterator[M]: ...
        def __reversed__(self) -> Iterator[M]: ...
        def __getitem__(self, index: int) -> M: ...
else:
    ModuleList = nn.ModuleList
