"""Two rooms: the ball goes where it is told, no wall lets it through, a goal can be reached."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="the package gymnasium is not installed")

from ebwm_scale.core.errors import DataError  # noqa: E402
from ebwm_scale.data.prepare.worlds import two_rooms  # noqa: E402
from ebwm_scale.data.prepare.worlds.environments import make_environment  # noqa: E402

DOWN, RIGHT = np.array([1.0, 0.0]), np.array([0.0, 1.0])


@pytest.fixture
def world():
    env = make_environment("TwoRooms-v0", {})
    yield env
    env.close()


def put(env, down, right):
    env.unwrapped.place = np.array([down, right])
    return env.unwrapped


def distance_to_wall(place):
    """From the middle of the ball to the nearest stone of the wall with the door."""
    across = max(two_rooms.WALL[0] - place[1], 0, place[1] - two_rooms.WALL[1])
    along = max(0, min(place[0] - two_rooms.DOOR[0], two_rooms.DOOR[1] - place[0]))
    return np.hypot(along, across)


def test_it_is_an_environment_as_gymnasium_asks_for(world):
    from gymnasium.utils.env_checker import check_env

    check_env(world.unwrapped, skip_render_check=True)


def test_the_ball_moves_as_it_is_told_and_stops_at_walls(world):
    world.reset(seed=0)
    ball = put(world, 0.3, 0.2)
    world.step(0.5 * DOWN + RIGHT)
    assert ball.place == pytest.approx([0.35, 0.3])
    for _ in range(10):
        world.step(-DOWN)
    assert two_rooms.RADIUS <= ball.place[0] < two_rooms.RADIUS + 0.02
    for _ in range(10):
        world.step(RIGHT)
    beside = two_rooms.WALL[0] - two_rooms.RADIUS
    assert beside - 0.02 < ball.place[1] <= beside  # above the door there is a wall
    ball = put(world, 0.5, 0.2)
    for _ in range(10):
        world.step(RIGHT)
    assert ball.place[1] > two_rooms.WALL[1] + two_rooms.RADIUS  # through the door


def test_the_ball_never_overlaps_the_wall_and_sees_both_rooms(world):
    world.reset(seed=1)
    ball = put(world, 0.5, 0.5)
    random = np.random.default_rng(0)
    rooms = set()
    action = random.uniform(-1, 1, 2)
    for _ in range(600):
        if random.random() < 0.2:
            action = random.uniform(-1, 1, 2)
        world.step(action)
        assert distance_to_wall(ball.place) >= two_rooms.RADIUS - 1e-9
        assert (ball.place >= two_rooms.RADIUS).all() and (ball.place <= 1 - two_rooms.RADIUS).all()
        rooms.add(bool(ball.place[1] > 0.5))
    assert rooms == {True, False}


def test_a_goal_is_out_of_reach_at_first_and_is_said_to_be_reached(world):
    goals = []
    for seed in range(20):
        _, info = world.reset(seed=seed)
        assert not info["success"]
        assert np.hypot(*(world.unwrapped.place - info["goal"])) >= 2 * two_rooms.NEAR - 1e-6
        frame = two_rooms.goal_frame(world, None, info)
        put(world, *info["goal"])
        _, reward, terminated, _, info = world.step(np.zeros(2, np.float32))
        assert info["success"] and not terminated and reward == pytest.approx(0, abs=1e-6)
        assert np.array_equal(world.render(), frame)
        goals.append(tuple(info["goal"]))
    assert len(set(goals)) == 20
    assert tuple(world.reset(seed=3)[1]["goal"]) == goals[3]


def test_goals_are_no_farther_than_asked_for():
    env = make_environment("TwoRooms-v0", {"farthest": 0.4})
    for seed in range(20):
        _, info = env.reset(seed=seed)
        distance = np.hypot(*(env.unwrapped.place - info["goal"]))
        assert 2 * two_rooms.NEAR - 1e-6 <= distance <= 0.4 + 1e-6
    with pytest.raises(DataError, match="farthest is 0.1: must be above 0.2"):
        make_environment("TwoRooms-v0", {"farthest": 0.1})


def test_the_picture_shows_the_ball_where_it_is(world):
    world.reset(seed=0)
    frame = put(world, 0.25, 0.75).picture(np.array([0.25, 0.75])).astype(int)
    is_ball = (frame == two_rooms.BALL).all(-1)
    rows, columns = is_ball.nonzero()
    assert (rows.mean() + 0.5) / 32 == pytest.approx(0.25, abs=0.01)
    assert (columns.mean() + 0.5) / 32 == pytest.approx(0.75, abs=0.01)
    assert is_ball.sum() / 32**2 == pytest.approx(np.pi * two_rooms.RADIUS**2, rel=0.25)
