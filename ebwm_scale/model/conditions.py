"""Conditions: what is known of each group beside its states, such as actions or proprioception.

A named condition is a vector or a number per group, and enters the observed stream as one token
behind the group's P states:

    states      o_1                o_2                  (B, T P, D)
    stream      o_1 a_1 b_1        o_2 a_2 b_2          (B, T (P + A), D), A conditions

A group's tokens see each other, so the states of o_t know a_t: the action that leads to o_(t+1).
Only states are predicted; the predicted stream has P rows per group, and no conditions of its own.

Legend: B samples, T groups, P states per group, A conditions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_scale.config.schema import ConditionConfig
from ebwm_scale.core.errors import DataError
from ebwm_scale.model.module_list import ModuleList
from ebwm_scale.model.projection import Projection

Conditions = Mapping[str, Tensor]
"""By name: continuous ones (B, T, width), standardised; discrete ones ids (B, T, width) int64, or
their probabilities (B, T, width, num_values), in which everything stays differentiable."""


class ConditionEmbeddings(nn.Module):
    """Each condition's own map to D numbers: a Projection, or an Embedding.

    Ids have rows of their own in the table for each of their columns, and these are summed.
    """

    def __init__(self, conditions: Sequence[ConditionConfig], width: int):
        super().__init__()
        self.conditions = tuple(conditions)
        self.maps = ModuleList(_map_of(condition, width) for condition in self.conditions)

    def forward(self, values: Conditions | None, num_samples: int, num_groups: int) -> Tensor:
        """Tokens (B, T, A, D) of the conditions of B samples with T groups each.

        Raises DataError for a condition that is missing, unknown, or of another shape.
        """
        values = values or {}
        _check_names(values, [condition.name for condition in self.conditions])
        tokens = []
        for condition, own in zip(self.conditions, self.maps):
            value = values[condition.name].to(own.weight.device)
            _check_shape(value, condition, num_samples, num_groups)
            if isinstance(own, Projection):
                tokens.append(own(value.to(own.weight.dtype)))
            elif value.is_floating_point():
                tokens.append(value.flatten(-2).to(own.weight.dtype) @ own.weight)
            else:
                column = torch.arange(condition.width, device=value.device)
                first_rows = column * (own.num_embeddings // condition.width)
                tokens.append(own(value + first_rows).sum(2))
        return torch.stack(tokens, 2)


def _map_of(condition: ConditionConfig, width: int) -> Projection | nn.Embedding:
    if condition.kind == "discrete":
        return nn.Embedding(condition.size, width)
    linear = Projection(condition.size, width)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _check_names(values: Conditions, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        raise DataError(
            f"conditions are {', '.join(values) or 'none'}; "
            f"this model is conditioned on {', '.join(names)}: give each of them for every frame"
        )


def _check_shape(
    value: Tensor, condition: ConditionConfig, num_samples: int, num_groups: int
) -> None:
    expected = (num_samples, num_groups, condition.width)
    what = "numbers (samples, frames, width)"
    if condition.kind == "discrete":
        what = "ids (samples, frames, width)"
        if value.is_floating_point():
            what = "probabilities (samples, frames, width, values)"
            expected = (*expected, condition.num_values)
    if tuple(value.shape) != expected:
        raise DataError(
            f"condition {condition.name} has shape {tuple(value.shape)}: expected {what} {expected}"
        )


def refuse_conditions(values: Conditions | None) -> None:
    """DataError for conditions that a model was given and does not have."""
    if values:
        raise DataError(
            f"conditions are {', '.join(values)}; this model was trained without: leave them out"
        )


def interleaved(states: Tensor, conditions: Tensor) -> Tensor:
    """States (B, T P, D) and the tokens (B, T, A, D) behind each group: (B, T (P + A), D)."""
    num_groups = conditions.shape[1]
    groups = states.unflatten(1, (num_groups, -1))
    return torch.cat([groups, conditions], 2).flatten(1, 2)


def states_of(rows: Tensor, group_size: int, num_conditions: int) -> Tensor:
    """Of rows (B, T (P + A), D) those of states, (B, T P, D)."""
    if num_conditions == 0:
        return rows
    groups = rows.unflatten(1, (-1, group_size + num_conditions))
    return groups[:, :, :group_size].flatten(1, 2)


def with_empty_conditions(rows: Tensor, group_size: int, num_conditions: int) -> Tensor:
    """Rows of states (B, T P, D) with zeros where conditions stand, (B, T (P + A), D)."""
    if num_conditions == 0:
        return rows
    groups = rows.unflatten(1, (-1, group_size))
    return F.pad(groups, (0, 0, 0, num_conditions)).flatten(1, 2)


def example_conditions(
    conditions: Sequence[ConditionConfig],
    num_samples: int,
    num_groups: int,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor] | None:
    """Random conditions, for what needs a batch but no data; None where there are none."""
    if not conditions:
        return None
    values = {}
    for condition in conditions:
        shape = (num_samples, num_groups, condition.width)
        if condition.num_values is not None:
            values[condition.name] = torch.randint(condition.num_values, shape, generator=generator)
        else:
            values[condition.name] = torch.randn(*shape, generator=generator)
    return values
