"""A converted model beside its source: weights bit for bit, and what both do on a fixed batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint.load import build, expected_shapes
from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.model.conditions import example_conditions
from ebwm_scale.refinement.noise import NoiseSource

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
Say = Callable[[str], None]
FULL_BYTES = 2**28  # of weights up to which whole models are built and compared


def compare(
    config: Config,
    source: Callable[[str], Tensor],
    result: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
) -> str:
    """What was compared, in words; CheckpointError with the list of what differs.

    Every weight has to be the source's in the given precision, bit for bit. Of models of up to
    FULL_BYTES also energies, loss and gradients have to be equal.
    """
    shapes = expected_shapes(config)
    wrong = [
        f"{name} differs from its source"
        for name in shapes
        if not torch.equal(source(name).to(dtype), result(name))
    ]
    if wrong:
        raise CheckpointError("the result is not its source:\n  " + "\n  ".join(wrong))
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    said = f"{len(shapes)} tensors, {total:,} numbers, equal bit for bit" + (
        "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
    )
    if 4 * total > FULL_BYTES:
        return said
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = (
        {name: read(name).to(dtype).to(wide) for name in shapes} for read in (source, result)
    )
    left, right = (behaviour(config, weights) for weights in (left, right))
    wrong = [
        f"{name}: {float(left[name].flatten()[0])} and {float(right[name].flatten()[0])}"
        for name in left
        if not torch.equal(left[name], right[name])
    ]
    if wrong:
        raise CheckpointError(
            "on a fixed batch the result behaves differently from its source:\n  "
            + "\n  ".join(wrong)
        )
    return said + f"; loss, energies and {len(left) - 2} gradients on a fixed batch equal"


def behaviour(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, energies per step and gradients of a model on a fixed batch of 2 samples and 8
    positions; of two groups where positions are grouped.
    """
    model = build(config, weights).train()
    size = resolved.group_size(config)
    num_positions = 8 if size == 1 else 2 * size
    generator = torch.Generator().manual_seed(0)
    shape = (2, num_positions + size)
    if config.state.kind == "vocabulary":
        states = torch.randint(resolved.vocabulary_size(config), shape, generator=generator)
    else:
        dtype = next(iter(weights.values())).dtype
        dimension = resolved.state_dimension(config)
        states = torch.randn(*shape, dimension, generator=generator).to(dtype)
    output = model(
        states[:, :-size],
        states[:, size:],
        conditions=example_conditions(config.data.conditions, 2, num_positions // size, generator),
        sample_ids=torch.arange(2),
        source=NoiseSource(0, 0),
        keep_state=None,
    )
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "energies": torch.zeros(1) if output.energy_per_step is None else output.energy_per_step,
        **{
            f"gradient of {name}": p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        },
    }


def kept_if_equal(target: Path, check: Callable[[], str], remove: Callable[[Path], Any]) -> str:
    """check(), and the target removed if it fails."""
    try:
        return check()
    except CheckpointError as error:
        remove(target)
        raise CheckpointError(f"{error}\nnothing was kept: {target}") from None
