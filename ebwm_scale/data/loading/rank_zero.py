"""What one process finds, or finds wrong, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ebwm_scale.core.errors import DataError, UserError

T = TypeVar("T")


class Group(Protocol):
    """The processes of a run (core/world.py: World)."""

    @property
    def is_main(self) -> bool: ...

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        ...


def opened_by_rank_0(open_it: Callable[[], T], what: str, group: Group | None) -> T:
    """What open_it gives on rank 0, on every rank of the group; without a group, here.

    Every rank must call it. A UserError of rank 0 is raised on all ranks. Any other error is raised
    there alone, and the others raise a DataError that names `what` and points at rank 0.
    """
    if group is None:
        return open_it()
    outcome: T | UserError | None = None
    if group.is_main:
        try:
            outcome = open_it()
        except UserError as error:
            outcome = error
        except Exception:
            group.broadcast_object(
                DataError(f"rank 0 could not open {what}; its own message says why")
            )
            raise
    told: T | UserError = group.broadcast_object(outcome)
    if isinstance(told, UserError):
        raise told
    return told
