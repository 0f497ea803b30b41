"""The optimizer of a run, and its parameter groups.

    alpha, beta of a workspace, and    AdamW, each with a learning rate of its own, no decay
    a distribution over exits
    matrices of the blocks             AdamW, or Muon (optimizer.name)
    everything else                    AdamW

Weight decay is on everything but the first, as released; optimizer.no_decay takes more out of
it. Under model.parametrization width_scaled each group is split by the factor that a parameter's
role has on its rate (model/width_scaling.py); rate times decay stays as it was. optimizer.rules
gives parameters, by their names, a rate and a decay of their own; what updates them stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ebwm_scale.config import resolved
from ebwm_scale.config.rate_schedule import rate_schedule
from ebwm_scale.config.schema import Config, ParameterRule
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.model.width_scaling import width_factors
from ebwm_scale.training.muon import MuonAndAdamW
from ebwm_scale.training.schedule_free import ScheduleFreeAdamW

BLOCK_MATRIX = re.compile(r"network\.layers\.\d+\.(attention|feed_forward)\.w\w\.weight")


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
    groups = [group for group in groups if group["params"]] + with_own_rate
    names = {id(p): name for name, p in model.named_parameters()}
    if config.model.parametrization != "standard":
        groups = _by_width(groups, names, config)
    if options.rules:
        return _with_rules(groups, names, options.rules)
    return groups


def _by_width(
    groups: list[dict[str, Any]], names: dict[int, str], config: Config
) -> list[dict[str, Any]]:
    """The groups, split by the factors of their parameters' roles on the rate.

    names: by parameter. What an update takes off a weight, rate times decay, is that of the base.
    """
    result = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factors = width_factors(
                config.model,
                names[id(parameter)],
                parameter.shape,
                muon="momentum" in group,
            )
            parts.setdefault(factors.rate, []).append(parameter)
        for factor, parameters in parts.items():
            own = {**group, "params": parameters}
            own["rate_scale"] = group["rate_scale"] * factor
            own["weight_decay"] = group["weight_decay"] / factor
            result.append(own)
    return result


def _with_rules(
    groups: list[dict[str, Any]], names: dict[int, str], rules: Sequence[ParameterRule]
) -> list[dict[str, Any]]:
    """The groups, each without what a rule fits, and behind it a group for each such rule.

    names: by parameter. Raises ConfigError for a rule that counts for no parameter.
    """
    result = []
    used = set()
    for group in groups:
        parts: dict[int | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            fits = (i for i, rule in enumerate(rules) if re.fullmatch(rule.parameters, name))
            parts.setdefault(next(fits, None), []).append(parameter)
        for index in sorted(parts, key=lambda i: -1 if i is None else i):
            own = {**group, "params": parts[index]}
            if index is not None:
                used.add(index)
                rule = rules[index]
                own["rate_scale"] = group["rate_scale"] * rule.rate
                if rule.weight_decay is not None:
                    own["weight_decay"] = rule.weight_decay
            result.append(own)
    for index, rule in enumerate(rules):
        if index not in used:
            raise ConfigError(
                f"optimizer.rules[{index}].parameters {rule.parameters} counts for no parameter of "
                f"this model, whose names are like {', '.join(sorted(names.values())[:3])}: "
                "mend it, move it in front of the rules that take its parameters, or leave it out"
            )
    return result


def _is_not_decayed(name: str, parameter: nn.Parameter, config: Config) -> bool:
    rules = config.optimizer.no_decay
    is_embedding = name.endswith("embedding.weight")
    return ("norms" in rules and parameter.ndim < 2) or ("embeddings" in rules and is_embedding)


def new_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, Muon with AdamW, or schedule-free AdamW, over the model's parameter groups."""
    options = config.optimizer
    groups = parameter_groups(model, config)
    rate = resolved.peak_learning_rate(options)
    if options.name == "schedule_free":
        return ScheduleFreeAdamW(
            groups,
            lr=rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            rate_factor=lambda update: rate_schedule(config).factor(update),
        )
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
