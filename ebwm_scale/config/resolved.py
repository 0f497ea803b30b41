"""Keys that may be absent from a file, read as the values they have in a run.

Two kinds of keys have no default of their own. Those that follow from other keys are filled by
`load_config` (sizes.py), those that follow from the data by training.preflight.fill_from_data. What
builds or trains a model reads them here and gets a number, or one ConfigError that names the key:

    sizes = model_sizes(config.model)
    nn.Linear(sizes.width, sizes.feed_forward_width)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from ebwm_scale.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    RefinementConfig,
)
from ebwm_scale.core.errors import ConfigError

T = TypeVar("T")

BY_LOADING = "read the configuration with load_config, which fills it"
BY_DATA = "set it, or take it from the data's manifest"


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of layers and heads, and widths, of a model's blocks.

    predicted_layers: how many of the blocks, the last ones, the predicted stream passes.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    feed_forward_width: int
    predicted_layers: int

    @property
    def head_dimension(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_width(self) -> int:
        """Of the keys, and of the values, of all heads together."""
        return self.num_kv_heads * self.head_dimension


def model_sizes(model: ModelConfig) -> ModelSizes:
    return ModelSizes(
        num_layers=_known(model.num_layers, "model.num_layers", BY_LOADING),
        width=_known(model.width, "model.width", BY_LOADING),
        num_heads=_known(model.num_heads, "model.num_heads", BY_LOADING),
        num_kv_heads=_known(model.num_kv_heads, "model.num_kv_heads", BY_LOADING),
        feed_forward_width=_known(model.feed_forward_width, "model.feed_forward_width", BY_LOADING),
        predicted_layers=_known(model.predicted_layers, "model.predicted_layers", BY_LOADING),
    )


def reencoded_blocks(config: Config) -> int:
    """How many blocks, the last ones, encode the observed stream again before a further step."""
    if config.refinement.reencode == "none":
        return 0
    if config.refinement.reencode == "all":
        return model_sizes(config.model).num_layers
    return config.refinement.reencode


def num_predictions(config: Config) -> int:
    """Of a position in evaluation: one after each refinement step, or each pass of a baseline."""
    if config.model.kind == "baseline":
        return config.model.loops
    return config.refinement.num_steps


def num_training_losses(model: ModelConfig) -> int:
    """Of a baseline: how many of its passes training scores."""
    return model.loops if model.loop_loss == "every" else 1


def num_candidates(config: Config) -> int | None:
    """How many tokens of a position further steps move, below the vocabulary's size; None: all."""
    count = config.refinement.candidates
    if count is None or config.state.kind == "embedding" or count >= vocabulary_size(config):
        return None
    return count


def min_num_steps(refinement: RefinementConfig) -> int:
    return _known(refinement.min_num_steps, "refinement.min_num_steps", BY_LOADING)


def learning_rate_multiplier(refinement: RefinementConfig) -> float:
    """alpha's learning rate over the model's."""
    key = "refinement.learning_rate_multiplier"
    return _known(refinement.learning_rate_multiplier, key, BY_LOADING)


def workspace_learning_rate_multiplier(refinement: RefinementConfig) -> float:
    """beta's learning rate over the model's."""
    key = "refinement.workspace_learning_rate_multiplier"
    return _known(refinement.workspace_learning_rate_multiplier, key, BY_LOADING)


def peak_learning_rate(optimizer: OptimizerConfig) -> float:
    return _known(optimizer.learning_rate, "optimizer.learning_rate", BY_LOADING)


def muon_learning_rate(optimizer: OptimizerConfig) -> float:
    """Muon's peak: the model's, unless it has one of its own."""
    if optimizer.muon_learning_rate is not None:
        return optimizer.muon_learning_rate
    return peak_learning_rate(optimizer)


def known_after_loading(value: T | None, key: str) -> T:
    """The value of a key that load_config fills; ConfigError that names it where it is absent."""
    return _known(value, key, BY_LOADING)


def vocabulary_size(config: Config) -> int:
    """Number of tokens, of a vocabulary state."""
    return _known(config.model.vocabulary_size, "model.vocabulary_size", BY_DATA)


def state_dimension(config: Config) -> int:
    """Size of a frame embedding, of an embedding state."""
    return _known(config.state.dimension, "state.dimension", BY_DATA)


def state_size(config: Config) -> int:
    """Numbers in the state of one position: the vocabulary, or the dimension of an embedding."""
    if config.state.kind == "embedding":
        return state_dimension(config)
    return vocabulary_size(config)


def context_length(config: Config) -> int:
    """Observed positions per sample."""
    return _known(config.data.context_length, "data.context_length", BY_DATA)


def group_size(config: Config) -> int:
    """Tokens that are predicted together: 1 for ordinary text."""
    return config.data.group_size or 1


def num_conditions(config: Config) -> int:
    """Tokens behind each group in the observed stream: actions and the like."""
    return len(config.data.conditions)


def context_group(config: Config) -> int:
    """Tokens of a group in the observed stream: its states and its conditions."""
    return group_size(config) + num_conditions(config)


def unit(config: Config) -> str:
    """What a position is, as the dataset's content says it."""
    if config.state.kind == "vocabulary":
        return "tokens"
    return "frames" if config.data.grid is None else "patches"


def num_groups(config: Config) -> int:
    """Observed groups per sample: frames, or positions of ordinary text."""
    return context_length(config) // group_size(config)


def grid(config: Config) -> tuple[int, int] | None:
    """(rows, columns) of the tokens of a group; None where they are no grid."""
    return config.data.grid


def scored_share(config: Config) -> float:
    """Share of the targets that are scored: 1 where the data has no mask."""
    return config.data.scored_share or 1.0


def has_masked_targets(config: Config) -> bool:
    """Whether some targets do not count. Losses in training are then sums over those that do, over
    all positions times scored_share.
    """
    return config.data.mask_document_starts or config.data.scored_share is not None


def _known(value: T | None, key: str, remedy: str) -> T:
    if value is None:
        raise ConfigError(f"{key} is absent: {remedy}")
    return value
