"""The optimizer of a run, and its parameter groups.

    alpha, beta of a workspace, and    AdamW, each with a learning rate of its own, no decay
    a distribution over exits
    matrices of the blocks             AdamW, or Muon (optimizer.name)
    everything else                    AdamW

Weight decay is on everything but the first, as released; optimizer.no_decay takes more out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ebwm_scale.checkpoint.parameter_shard import MOMENTUM
from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config

BLOCK_MATRIX = re.compile(r"network\.layers\.\d+\.(attention|feed_forward)\.\w+\.weight")


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Groups with `rate_scale`, the factor of their learning rate on the model's.

    Those of Muon have `momentum`, and no others do.
    """
    options = config.optimizer
    rate_scales = {
        "step_size": resolved.learning_rate_multiplier(config.refinement),
        "workspace_step_size": resolved.workspace_learning_rate_multiplier(config.refinement),
        "exit_logits": config.refinement.exit_learning_rate_multiplier,
    }
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    with_own_rate = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in rate_scales:
            with_own_rate.append(
                {"params": [parameter], "weight_decay": 0.0, "rate_scale": rate_scales[name]}
            )
        elif options.name == "muon" and BLOCK_MATRIX.fullmatch(name):
            matrices.append(parameter)
        elif _is_not_decayed(name, parameter, config):
            not_decayed.append(parameter)
        else:
            decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay, "rate_scale": 1.0},
        {"params": not_decayed, "weight_decay": 0.0, "rate_scale": 1.0},
    ]
    if matrices:
        scale = resolved.muon_learning_rate(options) / resolved.peak_learning_rate(options)
        groups.append(
            {
                "params": matrices,
                "weight_decay": options.weight_decay,
                "rate_scale": scale,
                "momentum": options.momentum,
            }
        )
    return [group for group in groups if group["params"]] + with_own_rate


def _is_not_decayed(name: str, parameter: nn.Parameter, config: Config) -> bool:
    rules = config.optimizer.no_decay
    is_embedding = name.endswith("embedding.weight")
    return ("norms" in rules and parameter.ndim < 2) or ("embeddings" in rules and is_embedding)


def new_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW, over the model's parameter groups."""
    options = config.optimizer
    groups = parameter_groups(model, config)
    rate = resolved.peak_learning_rate(options)
    adamw = torch.optim.AdamW(
        [group for group in groups if "momentum" not in group],
        lr=rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=True,
    )
    of_muon = [group for group in groups if "momentum" in group]
    if not of_muon:
        return adamw
    # an update as large as AdamW's, so that both can do with one rate and one decay
    return MuonAndAdamW(torch.optim.Muon(of_muon, lr=rate, adjust_lr_fn="match_rms_adamw"), adamw)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers as one: their groups, the same objects, and a state that they share.

    DeepSpeed puts float32 copies in place of bf16 parameters into the groups; both see them.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self.muon = muon
        self.adamw = adamw
        muon.state = self.state
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Muon's update of its matrices and AdamW's of the others."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.muon.param_groups:
            for p in group["params"]:
                if p.grad is not None and MOMENTUM not in self.state[p]:
                    # laid out as the parameter, whatever the gradient's strides: it is saved flat
                    self.state[p][MOMENTUM] = torch.zeros_like(p)
        self.adamw.step()
        self.muon.step()
        return loss
