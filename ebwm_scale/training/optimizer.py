"""AdamW's parameter groups: everything with weight decay; and alpha, beta of a workspace and a
distribution over exits, each with a learning rate of its own and no decay.
"""

from __future__ import annotations

from torch import nn

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Groups with `rate_scale`, the factor of their learning rate on the model's; norms and
    embeddings decay, as released.
    """
    rate_scales = {
        "step_size": resolved.learning_rate_multiplier(config.refinement),
        "workspace_step_size": resolved.workspace_learning_rate_multiplier(config.refinement),
        "exit_logits": config.refinement.exit_learning_rate_multiplier,
    }
    rest = []
    with_own_rate = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in rate_scales:
            with_own_rate.append(
                {"params": [parameter], "weight_decay": 0.0, "rate_scale": rate_scales[name]}
            )
        else:
            rest.append(parameter)
    decayed = {"params": rest, "weight_decay": config.optimizer.weight_decay, "rate_scale": 1.0}
    return [decayed, *with_own_rate]
