"""A model that one process can use alone, from an engine at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ebwm_scale.checkpoint.load import build
from ebwm_scale.config.schema import Config
from ebwm_scale.world_model import WorldModel


@contextmanager
def whole_model(module: WorldModel, config: Config, device: torch.device) -> Iterator[WorldModel]:
    """The model in eval mode, with all of its weights in this process. Every rank must enter.

    Stages 0 to 2 train it, so it is the module itself. At stage 3 it is a copy, gathered one
    parameter at a time, in the precision of the forward pass: memory for the whole weights, in each
    process, until the block ends.
    """
    if config.deepspeed.zero_stage == 3:
        yield build(config, _gathered(module, device)).to(device).eval()
        return
    was_training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(was_training)


def _gathered(module: WorldModel, device: torch.device) -> dict[str, torch.Tensor]:
    from deepspeed.runtime.zero import GatheredParameters

    whole = {}
    for name, parameter in module.named_parameters():
        with GatheredParameters([parameter]):
            whole[name] = parameter.detach().to(device, copy=True)
    return whole
