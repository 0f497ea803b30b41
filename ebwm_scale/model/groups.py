"""Groups of positions, as a network knows them: in its attention and in its rotary positions."""

from __future__ import annotations

from ebwm_scale.model.baseline import BaselineTransformer
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.rotary import RotaryTable


def regroup(
    network: EnergyTransformer | BaselineTransformer,
    group_size: int,
    grid: tuple[int, int] | None,
) -> None:
    """Have a network read sequences of groups of another size; its parameters stay.

    Raises ValueError as RotaryTable does.
    """
    table = network.rotary
    network.rotary = RotaryTable(
        table.head_dimension, table.theta, group_size, grid, table.num_conditions
    )
    network.group_size = group_size
    for layer in network.layers:
        layer.attention.group_size = group_size
        layer.attention.context_group = network.context_group
