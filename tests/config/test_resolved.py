"""Keys that a file may leave out are numbers once a configuration is loaded; before that, reading
one is an error that names it.
"""

import pytest

from ebwm_scale.config import resolved
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.reduce_bucket import REDUCE_BUCKET, reduce_bucket_size
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError

FILLED_BY_LOADING = {
    "model.num_layers": lambda config: resolved.model_sizes(config.model).num_layers,
    "refinement.min_num_steps": lambda config: resolved.min_num_steps(config.refinement),
    "refinement.learning_rate_multiplier": lambda config: resolved.learning_rate_multiplier(
        config.refinement
    ),
    "optimizer.learning_rate": lambda config: resolved.peak_learning_rate(config.optimizer),
}
FILLED_BY_DATA = {
    "model.vocabulary_size": resolved.vocabulary_size,
    "state.dimension": resolved.state_dimension,
    "data.context_length": resolved.context_length,
}


def loaded(values=None):
    return config_from_dict({"data": {"manifest": "none"}, **(values or {})})


@pytest.mark.parametrize("key", FILLED_BY_LOADING)
def test_what_loading_fills_is_a_number_of_a_loaded_configuration_only(key):
    assert FILLED_BY_LOADING[key](loaded()) > 0
    with pytest.raises(ConfigError, match=rf"^{key} is absent: .*load_config"):
        FILLED_BY_LOADING[key](Config())


@pytest.mark.parametrize("key", FILLED_BY_DATA)
def test_what_the_data_fills_is_named_where_it_is_absent(key):
    with pytest.raises(ConfigError, match=rf"^{key} is absent: .*the data's manifest"):
        FILLED_BY_DATA[key](loaded())


def test_sizes_of_a_model_are_those_of_its_configuration():
    sizes = resolved.model_sizes(
        loaded({"model": {"width": 64, "num_heads": 4, "num_kv_heads": 2}}).model
    )
    assert (sizes.head_dimension, sizes.kv_width, sizes.feed_forward_width) == (16, 32, 64)


@pytest.mark.parametrize(
    "values, size",
    [
        ({"model": {"vocabulary_size": 23}}, 23),
        ({"state": {"kind": "embedding", "dimension": 6}}, 6),
    ],
)
def test_a_state_is_as_large_as_the_vocabulary_or_the_embedding(values, size):
    assert resolved.state_size(loaded(values)) == size


def test_the_reduce_bucket_is_never_larger_than_the_model():
    assert reduce_bucket_size(1000) == 1000
    assert reduce_bucket_size(10 * REDUCE_BUCKET) == REDUCE_BUCKET
