"""What DeepSpeed's ZeRO stage 3 adds to a parameter, for readers and type checkers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class PartitionedParameter(nn.Parameter):
    """A parameter of which every process keeps a part.

    ds_tensor: this process's part, flattened and padded to the same size everywhere. ds_numel,
    ds_shape: of the whole parameter.
    """

    ds_tensor: Tensor
    ds_numel: int
    ds_shape: torch.Size


def partitioned(parameter: nn.Parameter) -> PartitionedParameter:
    """The same object: DeepSpeed sets the attributes on the parameters themselves."""
    return cast(PartitionedParameter, parameter)
