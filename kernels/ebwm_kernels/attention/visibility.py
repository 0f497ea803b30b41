"""What a query sees: one description for every operation, backend and level.

    query t, of group g = t // group_size, sees
        context keys  first_visible_t <= j < last_t
        own keys      k*_(g group_size) .. k*_(g group_size + group_size - 1), where there are any

    last_t = min(C, (g + 1) context_group + offset)     C where attention is not causal

Groups are the tokens of one frame, block or puzzle: they see each other, and the context up to
their own place. A context of frames may have more keys per frame than there are queries
(context_group > group_size: patches followed by an action). Packed documents and sliding windows
are both `first_visible`, a non-decreasing first key per row: what hides the past is one mechanism.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import is_mapped


class Shape(NamedTuple):
    """What the tensors do not say.

    scale: of the scores. offset: context keys before the first group's. causal: whether the future
    is hidden. group_size: queries (and own keys) per group. context_group: context keys per group.
    """

    scale: float
    offset: int
    causal: bool
    group_size: int = 1
    context_group: int = 1


def score_scale(scale: float | None, head_dimension: int) -> float:
    """The factor on scores that a caller gave, or 1 / sqrt(d)."""
    return float(head_dimension**-0.5) if scale is None else float(scale)


def last_visible(rows: Tensor, num_keys: int, shape: Shape) -> Tensor:
    """One past the last context key that each of these rows (integers) sees."""
    if not shape.causal:
        return torch.full_like(rows, num_keys)
    groups = torch.div(rows, shape.group_size, rounding_mode="floor")
    return ((groups + 1) * shape.context_group + shape.offset).clamp(max=num_keys)


def last_visible_of(row: int, num_keys: int, shape: Shape) -> int:
    """last_visible of one row."""
    if not shape.causal:
        return num_keys
    return min(num_keys, (row // shape.group_size + 1) * shape.context_group + shape.offset)


def visible_keys(
    num_rows: int, num_keys: int, first_visible: Tensor | None, shape: Shape, device: torch.device
) -> Tensor:
    """Mask of the context keys that rows see: (S, C), or (B, S, C) with first_visible (B, S)."""
    columns = torch.arange(num_keys, device=device)
    rows = torch.arange(num_rows, device=device)
    visible = columns < last_visible(rows, num_keys, shape)[:, None]
    if first_visible is None:
        return visible
    return visible & (columns >= first_visible[..., None])


def same_group(num_rows: int, group_size: int, device: torch.device) -> Tensor:
    """Mask of the own keys that rows see: (S, S), block-diagonal."""
    groups = torch.arange(num_rows, device=device).div(group_size, rounding_mode="floor")
    return groups[:, None] == groups[None, :]


def visible_pairs(
    num_queries: int,
    num_keys: int,
    offset: int = 0,
    causal: bool = True,
    group_size: int = 1,
    context_group: int = 1,
) -> int:
    """(query, key) pairs of one head that are not in the future, own keys aside."""
    if not causal:
        return num_queries * num_keys
    # Groups that see context_group + offset keys, 2 context_group + offset, ..; all others see all.
    growing = max(0, min(num_queries // group_size, (num_keys - offset) // context_group))
    per_row = growing * offset + context_group * growing * (growing + 1) // 2
    return group_size * per_row + (num_queries - growing * group_size) * num_keys


def hidden_pairs(first_visible: Tensor, num_keys: int, shape: Shape) -> int:
    """Pairs of one head, over all samples, that first_visible (B, S) takes from visible_pairs."""
    rows = torch.arange(first_visible.shape[1], device=first_visible.device)
    return int(torch.minimum(first_visible, last_visible(rows, num_keys, shape)).sum())


def check_groups(
    operation: str, num_rows: int, offset: int, group_size: int, context_group: int
) -> None:
    """Raises ValueError for groups that do not divide the rows."""
    for name, size in (("group_size", group_size), ("context_group", context_group)):
        if size < 1:
            raise ValueError(f"{operation}: {name} is {size}; must be 1 or more")
    if num_rows % group_size:
        raise ValueError(
            f"{operation}: {num_rows} queries in groups of group_size {group_size}; the size must "
            "divide their number: pad the last group, or give the queries of whole groups"
        )
    if offset < 0:
        raise ValueError(f"{operation}: context_offset is {offset}; must be 0 or more")


def first_visible_keys(
    operation: str,
    q: Tensor,
    num_keys: int,
    first_visible: Tensor | None,
    window: int | None,
    shape: Shape,
    *,
    own: bool,
) -> Tensor | None:
    """first_visible and window as one first key per row, (B, S) int32; None where all rows see from
    key 0.

    q: (B, H, S, d). own: whether a row sees keys of its own, so that it may see no context at all.
    Values are checked on a CPU only, and not under vmap: elsewhere it would wait for the device.
    Raises ValueError.
    """
    batch, num_rows = q.shape[0], q.shape[2]
    if window is not None:
        if window < 1:
            raise ValueError(
                f"{operation}: window is {window}; must be 1 or more (None: no window)"
            )
        if not shape.causal:
            raise ValueError(
                f"{operation}: window is {window} with causal=False; a window ends at the last key "
                "that a causal row sees: give first_visible instead"
            )
    if first_visible is not None:
        _check_first_visible(operation, first_visible, q, num_keys, shape, own=own)
        first_visible = first_visible.to(torch.int32)
    if window is None or window >= num_keys:
        return first_visible
    rows = torch.arange(num_rows, device=q.device, dtype=torch.int32)
    window_start = (last_visible(rows, num_keys, shape) - window).clamp(min=0)
    if first_visible is None:
        return window_start.expand(batch, num_rows).contiguous()
    return torch.maximum(first_visible, window_start)


def _check_first_visible(
    operation: str, first_visible: Tensor, q: Tensor, num_keys: int, shape: Shape, *, own: bool
) -> None:
    expected = (q.shape[0], q.shape[2])
    is_integer = not (first_visible.is_floating_point() or first_visible.is_complex())
    if not is_integer or first_visible.dtype == torch.bool:
        raise ValueError(
            f"{operation}: first_visible is {first_visible.dtype}; it counts keys: give an integer "
            "tensor (torch.int32)"
        )
    if tuple(first_visible.shape) != expected:
        raise ValueError(
            f"{operation}: first_visible has shape {tuple(first_visible.shape)}; expected one key "
            f"per row, (batch, positions) = {expected}"
        )
    if first_visible.device != q.device:
        raise ValueError(
            f"{operation}: first_visible is on {first_visible.device}, q on {q.device}; "
            "they must share one device"
        )
    if first_visible.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if first_visible.numel() == 0 or is_mapped(first_visible):
        return
    if int(first_visible.min()) < 0:
        raise ValueError(
            f"{operation}: first_visible holds {int(first_visible.min())}; the first key is 0"
        )
    steps = first_visible.diff()
    if bool((steps < 0).any()):
        batch, row = (int(i) for i in (steps < 0).nonzero()[0])
        values = first_visible[batch, row : row + 2].tolist()
        raise ValueError(
            f"{operation}: first_visible falls from {values[0]} to {values[1]} at row {row + 1} of "
            f"sample {batch}; it must not decrease along the positions"
        )
    rows = torch.arange(q.shape[2])
    ends = last_visible(rows, num_keys, shape)
    if not own and bool((first_visible >= ends).any()):
        batch, row = (int(i) for i in (first_visible >= ends).nonzero()[0])
        raise ValueError(
            f"{operation}: first_visible is {int(first_visible[batch, row])} at row {row} of "
            f"sample {batch}, which sees keys before {int(ends[row])} only; a row without own "
            "keys needs at least one visible key"
        )
