"""AdamW's parameter groups: everything with weight decay, and alpha alone, with a learning rate of
its own and no decay.
"""

from __future__ import annotations

from torch import nn

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Groups with `rate_scale`, the factor of their learning rate on the model's; norms and
    embeddings decay, as released.
    """
    alpha = [p for name, p in model.named_parameters() if name == "step_size" and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if name != "step_size" and p.requires_grad]
    groups = [{"params": rest, "weight_decay": config.optimizer.weight_decay, "rate_scale": 1.0}]
    if alpha:
        groups.append(
            {
                "params": alpha,
                "weight_decay": 0.0,
                "rate_scale": resolved.learning_rate_multiplier(config.refinement),
            }
        )
    return groups
