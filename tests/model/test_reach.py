"""Attention within reach (`model.reach`): what is near, both orders of its gradients, and where it
is refused. Whole models are held against a definition in
tests/refinement/test_grouped_refinement.py.
"""

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.model.attention_paths import attention_paths
from ebwm_scale.model.reach import Reach, attend_within
from ebwm_scale.training.preflight import check_filled
from ebwm_scale.world_model import WorldModel

MODEL = {"num_layers": 1, "width": 16, "num_heads": 2, "vocabulary_size": 5, "reach": 1}


def configuration(model=None, **sections):
    data = {"group_size": 6, "grid": [2, 3]}
    return config_from_dict({"data": data, **sections, "model": MODEL | (model or {})})


@pytest.mark.parametrize("cells", [0, 1, 2])
def test_a_cell_sees_cells_that_are_near_and_conditions_see_and_are_seen_by_all(cells):
    rows, columns = grid = (3, 4)
    near = Reach(cells, grid, num_conditions=2).near(torch.device("cpu"))
    assert near.shape == (14, 14)
    for a in range(14):
        for b in range(14):
            (i, j), (k, m) = divmod(a, columns), divmod(b, columns)
            is_near = abs(i - k) <= cells and abs(j - m) <= cells
            assert bool(near[a, b]) == (is_near or max(a, b) >= rows * columns), (a, b)


def test_a_row_sees_near_cells_of_the_groups_up_to_its_own():
    """Two observed groups of two cells and a condition; candidates for the second and the third."""
    reach = Reach(0, (1, 2), num_conditions=1)
    q, keys = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 6, 2)
    of_cell = [[1, 0, 1], [0, 1, 1]]
    none = [0, 0, 0]
    expected = [of_cell[0] + none, of_cell[1] + none, of_cell[0] * 2, of_cell[1] * 2]
    assert reach._seen(q, keys, 0, 2).int().tolist() == expected


@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_both_orders_are_those_of_finite_differences(has_own, key_heads):
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)

    reach = Reach(1, (1, 3))
    near = reach.near_own(torch.device("cpu"))
    q, keys, values = draw(1, 2, 3, 2), draw(1, key_heads, 3, 2), draw(1, key_heads, 3, 2)
    own = (draw(1, 2, 3, 2), draw(1, 2, 3, 2)) if has_own else ()

    def attended(q, keys, values, *own):
        return attend_within(q, keys, values, near, own or None, near)

    inputs = (q, keys, values, *own)
    assert torch.autograd.gradcheck(attended, inputs)
    assert torch.autograd.gradgradcheck(attended, inputs)


def test_a_run_says_that_attention_within_reach_is_plain_pytorch():
    config = configuration().model
    said = attention_paths(config, torch.device("cpu"), torch.float32, has_groups=True)
    assert (
        said["observed"]
        == said["predicted"]
        == ("plain PyTorch (model.reach: kernels know no grid)")
    )
    assert said["pointwise"].startswith("reference")


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"attention_backend": "triton"}}, "kernels know no grid"),
        ({"model": {"observed_backend": "flex"}}, "model.observed_backend flex"),
        ({"refinement": {"compile": True}}, "refinement.compile"),
    ],
)
def test_what_knows_no_grid_is_refused(sections, message):
    with pytest.raises(ConfigError, match=f"model.reach is 1 with .*{message}"):
        configuration(**sections)


@pytest.mark.parametrize("data", [{}, {"group_size": 6}])
def test_data_without_a_grid_is_refused_before_a_run_begins(data):
    config = configuration(data=data)
    with pytest.raises(ConfigError, match="model.reach is 1, but .* cells of no grid"):
        check_filled(config)
    with pytest.raises(ValueError, match="cells of no grid"):
        WorldModel(config)
