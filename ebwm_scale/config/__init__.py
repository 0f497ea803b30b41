"""The configuration of a run: YAML -> frozen typed objects; this package never imports torch.

config = load_config("configs/quickstart.yaml", ["train.max_steps=100", "model.size=xs"])

schema    every key that exists, its type, its bounds, and what it means
sizes     the published model sizes, and defaults that depend on other keys
checks    what has to hold between keys
load      files, --set, and messages: all problems at once, the nearest known key named
"""

from ebwm_scale.config.checks import batch_arithmetic
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Points,
    RefinementConfig,
    RefinementScheduleConfig,
    ScheduleConfig,
    SourceConfig,
    StateConfig,
    TrainConfig,
)
from ebwm_scale.config.sizes import PEAK_LEARNING_RATES, SIZES

__all__ = [
    "PEAK_LEARNING_RATES",
    "SIZES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Points",
    "RefinementConfig",
    "RefinementScheduleConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StateConfig",
    "TrainConfig",
    "batch_arithmetic",
    "config_from_dict",
    "load_config",
]
