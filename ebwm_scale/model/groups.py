"""Groups of positions, as a network knows them: in its attention, in its rotary positions, and in
energies, which are a group's.
"""

from __future__ import annotations

from torch import Tensor

from ebwm_scale.model.baseline import BaselineTransformer
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.reach import reach_of
from ebwm_scale.model.rotary import RotaryTable


def regroup(
    network: EnergyTransformer | BaselineTransformer,
    group_size: int,
    grid: tuple[int, int] | None,
) -> None:
    """Have a network read sequences of groups of another size; its parameters stay.

    Raises ValueError as RotaryTable and reach_of do.
    """
    table = network.rotary
    network.rotary = RotaryTable(
        table.head_dimension, table.theta, group_size, grid, table.num_conditions
    )
    network.group_size = group_size
    for layer in network.layers:
        layer.attention.group_size = group_size
        layer.attention.context_group = network.context_group
        if layer.attention.reach is not None:
            cells = layer.attention.reach.cells
            layer.attention.reach = reach_of(cells, grid, table.num_conditions)


def of_groups(energy: Tensor, group_size: int) -> Tensor:
    """Energies (B, K P) of rows, each replaced by the mean over its group."""
    if group_size == 1:
        return energy
    means = energy.unflatten(1, (-1, group_size)).mean(-1)
    return means.repeat_interleave(group_size, 1)
