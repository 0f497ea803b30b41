"""Packed documents as flash-attn knows them: sequences of their own lengths, one behind the other.

first_visible (B, S)    0 0 0 3 3 | 0 1 1 1 1     each row's document begins there
bounds                  0 3 5 6 10                where each begins among all rows, and the end
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Documents(NamedTuple):
    """bounds: (documents + 1,) int32. longest: the rows of the longest document."""

    bounds: Tensor
    longest: int


def documents_of(first_visible: Tensor) -> Documents | None:
    """The documents whose rows see all of their own up to themselves; None where first_visible
    (B, S) says anything else.

    The lengths are read from the device. It is waited for once for each tensor: the layers of a
    model share one.
    """
    if first_visible.is_inference():  # it does not count its changes
        return _find(first_visible)
    found = _FOUND.get(first_visible)
    if found is None or found[0] != first_visible._version:
        found = (first_visible._version, _find(first_visible))
        _FOUND[first_visible] = found
    return found[1]


_FOUND = WeakTensorKeyDictionary()


def _find(first_visible: Tensor) -> Documents | None:
    if first_visible.numel() == 0:
        return None
    rows = torch.arange(first_visible.shape[1], device=first_visible.device)
    begins = first_visible == rows
    begins[:, 0] = True
    expected = torch.where(begins, rows, 0).cummax(1).values
    if not torch.equal(expected, first_visible.long()):
        return None
    end = torch.full((1,), first_visible.numel(), device=first_visible.device)
    bounds = torch.cat([begins.flatten().nonzero().flatten(), end])
    return Documents(bounds.int(), int(bounds.diff().max()))
