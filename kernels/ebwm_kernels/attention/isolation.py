"""What a row does not see never reaches it, be it infinite or no number.

A block of rows multiplies by every key that one of its rows sees, and a weight of zero times an
infinite key is no number. So a level whose results hold one is looked at again: where a row sees
finite numbers only, and got another, its sample is computed once more, row by row, each over its
own keys. The same holds for keys, whose gradients come from the rows that see them.

Finite numbers, and what is infinite for all who see it, cost one sum over the results. On a GPU
nobody asks, since the answer would have to be waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ebwm_kernels.attention.tensors import (
    Cotangents,
    Gradients,
    Inputs,
    Output,
    SecondGradients,
    wide_dtype,
)
from ebwm_kernels.attention.visibility import Shape, same_group, visible_keys

Level = TypeVar("Level", bound=Callable[..., Any])


def hidden_stays_hidden(level: Level) -> Level:
    """A level of the reference that no hidden number reaches."""

    @functools.wraps(level)
    def isolated(*arguments, **options):
        results = level(*arguments, **options)
        q = _inputs_of(arguments).q
        checked = results[:1] if isinstance(results, Output) else results
        if q.device.type != "cpu" or _are_finite(_tensors(checked)):
            return results
        for sample in range(q.shape[0]):
            alone = [_sample(argument, sample) for argument in arguments]
            if _is_spoiled(alone, _sample(results, sample)):
                for whole, part in zip(
                    _tensors(results), _tensors(level(*alone, **options, block_size=1))
                ):
                    whole[sample : sample + 1].copy_(part)
        return results

    return isolated  # pyright: ignore[reportReturnType]


def _tensors(results) -> list[Tensor]:
    """All tensors of a level's results, or arguments."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, tuple):
        return [tensor for part in results for tensor in _tensors(part)]
    return []


def _are_finite(results: list[Tensor]) -> bool:
    """A sum is finite only where its terms are; one that overflows is looked into like others."""
    sums = [x.sum(dtype=wide_dtype(x.dtype)) for x in results if x.numel()]
    return not sums or bool(torch.stack([x.double() for x in sums]).isfinite().all())


def _inputs_of(arguments: Sequence) -> Inputs:
    return next(x for x in arguments if isinstance(x, Inputs))


def _sample(x, index: int):
    """One sample of a tensor or of a record of tensors."""
    if isinstance(x, Tensor):
        return x[index : index + 1]
    if isinstance(x, tuple) and not isinstance(x, Shape):
        return type(x)(*(_sample(part, index) for part in x))
    return x


def _is_spoiled(arguments: Sequence, results) -> bool:
    """Whether some row or key of a sample got what is not finite from finite numbers alone.

    A sample's numbers belong to rows (B, H, S, ..) or to keys (B, H_kv, C, ..).
    """
    inputs = _inputs_of(arguments)
    shape = next(x for x in arguments if isinstance(x, Shape))
    num_rows, num_keys = inputs.q.shape[2], inputs.k.shape[2]
    sharing = inputs.q.shape[1] // inputs.k.shape[1]
    of_keys = [inputs.k, inputs.v]
    of_own = [x for x in (inputs.k_self, inputs.v_self) if x is not None]
    of_rows = [inputs.q]
    for argument in arguments:
        if isinstance(argument, Cotangents):
            of_keys += [x for x in (argument.key, argument.value) if x is not None]
            of_own += [x for x in (argument.k_self, argument.v_self) if x is not None]
            of_rows.append(argument.query)
        elif isinstance(argument, Tensor):
            of_rows.append(argument)
    bad_keys = _not_finite(of_keys)
    bad_rows = _not_finite(of_rows)
    sees = visible_keys(num_rows, num_keys, inputs.first_visible, shape, inputs.q.device)
    sees = sees.reshape(num_rows, num_keys).float()
    meets = bad_rows | _meet(bad_keys.repeat_interleave(sharing, 1), sees)
    spoils_own = torch.zeros_like(bad_rows)
    if of_own:
        bad_own = _not_finite(of_own)
        group = same_group(num_rows, shape.group_size, inputs.q.device).float()
        meets = meets | _meet(bad_own, group)
        spoils_own = bad_own | _meet(meets, group)
    seen_by = _meet(meets, sees.T).unflatten(1, (-1, sharing)).any(2) | bad_keys
    if isinstance(results, Output):
        return _has_other(results[:1], meets)  # L of a row that sees nothing is -inf
    if not isinstance(results, (Gradients, SecondGradients)):
        return _has_other([results], meets)
    *of_queries, k, v, k_self, v_self = results
    return (
        _has_other(of_queries, meets)
        or _has_other([k, v], seen_by)
        or _has_other([k_self, v_self], spoils_own)
    )


def _not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """(1, H, positions): whether a row of one of these (1, H, positions, ..) has such a number."""
    found = [~x.isfinite().reshape(*x.shape[:3], -1).all(-1) for x in tensors]
    return torch.stack(found).any(0)


def _meet(bad: Tensor, sees: Tensor) -> Tensor:
    """(1, H, n): which of n places see a bad one of m: bad (1, H, m), sees (n, m)."""
    return (bad.float() @ sees.T) > 0


def _has_other(results: Sequence[Tensor | None], expected: Tensor) -> bool:
    """Whether numbers that are not finite are elsewhere than expected."""
    existing = [x for x in results if x is not None]
    return bool(existing) and bool((_not_finite(existing) & ~expected).any())
