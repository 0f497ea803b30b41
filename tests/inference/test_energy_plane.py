"""The plane through the path of a refinement: where it lies, and that its energies are those of the
embeddings in it.
"""

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.inference.energy_plane import POINTS, plane_through
from ebwm_scale.inference.generation import candidate_energies
from ebwm_scale.inference.step_by_step import look
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.reporting.plane_chart import BANDS, plane_chart
from ebwm_scale.world_model import WorldModel


def path_of(*points, size=6):
    path = torch.zeros(len(points), size)
    path[:, :2] = torch.tensor(points)
    return path


def test_a_path_of_two_steps_lies_in_its_plane():
    path = path_of((0.0, 0.0), (2.0, 1.5), (4.0, 0.0))
    plane = plane_through(path, torch.ones(6))
    assert plane.up_is_path and plane.off_plane < 1e-6
    expected = [(-4, 0), (-2, 1.5), (0, 0)]
    for place, (x, y) in zip(plane.path, expected):
        assert place == pytest.approx((x, y), abs=1e-5)
    grid = plane.grid().unflatten(0, (POINTS, POINTS))
    wanted = plane.origin + plane.xs[3] * plane.across + plane.ys[5] * plane.up
    torch.testing.assert_close(grid[5, 3], wanted)
    assert plane.xs[0] < -4 and plane.xs[-1] > 0 and plane.ys[-1] > 1.5
    assert plane.xs[-1] - plane.xs[0] == pytest.approx(plane.ys[-1] - plane.ys[0])


def test_a_longer_path_says_how_far_it_leaves_the_plane():
    path = path_of((0.0, 0.0), (1.0, 1.0), (2.0, 0.0), (4.0, 0.0))
    path[2, 2] = 0.4
    plane = plane_through(path, torch.ones(6))
    assert 0 < plane.off_plane <= 0.1 + 1e-6
    assert float(plane.across @ plane.up) == pytest.approx(0, abs=1e-6)


def test_a_straight_path_goes_up_towards_the_other_token():
    plane = plane_through(
        path_of((0.0, 0.0), (1.0, 0.0), (2.0, 0.0)), torch.tensor([2.0, 0, 3, 0, 0, 0])
    )
    assert not plane.up_is_path
    torch.testing.assert_close(plane.up.abs(), torch.tensor([0.0, 0, 1, 0, 0, 0]))


def test_where_nothing_moves_there_is_no_plane():
    assert plane_through(path_of((1.0, 1.0), (1.0, 1.0)), torch.ones(6)) is None
    straight = path_of((0.0, 0.0), (1.0, 0.0))
    assert plane_through(straight, straight[1]) is None


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model": {"num_layers": 1, "width": 24, "num_heads": 2, "vocabulary_size": 40},
            "state": {"initial": "random_noise"},
            "refinement": {"step_size": 3.0, "num_steps": 3},
            "data": {"context_length": 16},
        }
    )
    return WorldModel(config).eval()


def test_energies_on_the_plane_are_those_of_its_embeddings(model):
    tokens = torch.tensor([3, 1, 4, 1, 5])
    (view,) = look(model, tokens, 4, ThinkingConfig(num_steps=3))
    shown = view.plane
    assert len(shown.energies) == POINTS and len(shown.along_path) == 4
    # the last moment is measured in the last landscape by thinking, too
    assert shown.along_path[-1] == pytest.approx(view.moments[-1].energy, rel=1e-5)
    points = shown.plane.grid().unflatten(0, (POINTS, POINTS))[6, 2:5]
    told = candidate_energies(model, tokens[:4], points).tolist()
    assert shown.energies[6][2:5] == pytest.approx(told, rel=1e-4, abs=1e-5)
    x, y = shown.plane.path[0]
    start = shown.plane.origin + x * shown.plane.across + y * shown.plane.up
    if shown.plane.off_plane < 1e-3:
        (energy,) = candidate_energies(model, tokens[:4], start[None]).tolist()
        assert energy == pytest.approx(shown.along_path[0], rel=1e-2)


def test_a_drawing_has_bands_from_the_lowest_to_the_highest_and_its_path():
    steps = [x / 2 - 2 for x in range(9)]
    energies = [[x * x + y for x in steps] for y in steps]
    axes = {"x_label": "x", "y_label": "E"}
    plot = plane_chart("T", steps, steps, energies, [(-2.0, -2.0), (0.0, 2.0)], **axes)
    assert len(plot["bands"]) == BANDS and all(band["path"] for band in plot["bands"])
    assert plot["bands"][0]["label"].startswith("−2.000") and plot["bands"][0]["colour"] == "curve5"
    assert plot["bands"][-1]["label"].endswith("6.000")
    first, last = plot["moments"]
    assert (first["x"], first["y"]) == (plot["left"], plot["top"] + plot["side"])  # a corner
    assert last["y"] == plot["top"] and last["number"] == 1
    flat = [[1.0] * 9] * 9
    assert plane_chart("T", steps, steps, flat, [(0.0, 0.0)], **axes) is None
    broken = [[float("nan")] * 9] * 9
    assert plane_chart("T", steps, steps, broken, [(0.0, 0.0)], **axes) is None
