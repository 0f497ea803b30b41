"""Planning in an environment: what a planner sees, what it does, and what came of it."""

import json

import numpy as np
import pytest
import torch
from control_worlds import Box, LinearWorld, Walk, frame_at, model_of, world

from ebwm_scale.control.baselines import RandomActor
from ebwm_scale.control.futures import imagine_futures
from ebwm_scale.control.mpc import run_episode
from ebwm_scale.control.planner import Planner
from ebwm_scale.control.world_costs import CostConfig, FrameGoal, future_costs
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.inference.imagination import Imagined, Window, imagine


@pytest.fixture(scope="module", params=["energy", "baseline"])
def seen(request, tmp_path_factory):
    """(planner, situation, candidates) of a real model, with actions and proprioception."""
    manifest = world(tmp_path_factory.mktemp("world") / "world", context_length=6)
    model, config = model_of(manifest, model={"kind": request.param})
    planner = Planner(model, config, manifest, horizon=3, budget=8)
    frames = np.stack([frame_at((row, 4)) for row in (3, 4, 5)])
    conditions = {
        "action": np.array([[1, 0], [1, 0]], np.float32),
        "proprio": np.array([[3, 4], [4, 4], [5, 4]], np.float32),
    }
    draws = torch.Generator().manual_seed(0)
    return planner, planner.situation(frames, conditions), torch.randn(5, 3, 2, generator=draws)


def test_a_candidate_is_imagined_as_if_it_were_alone(seen):
    planner, situation, candidates = seen
    whole = imagine_futures(planner.model, situation, candidates, energies=True)
    parts = imagine_futures(planner.model, situation, candidates, energies=True, batch_size=2)
    torch.testing.assert_close(whole.states, parts.states, rtol=1e-5, atol=1e-5)
    for number in range(5):
        alone = imagine_futures(planner.model, situation, candidates[number : number + 1])
        torch.testing.assert_close(alone.states[0], whole.states[number], rtol=1e-5, atol=1e-5)
    assert (whole.energies is None) == (planner.model.config.model.kind == "baseline")
    assert (whole.states[0, -1] - whole.states[1, -1]).abs().max() > 1e-4, "actions matter"


def test_futures_are_those_of_an_episode_with_the_same_actions(seen):
    """A held-out episode's window under its own actions, as evaluation imagines it."""
    planner, situation, candidates = seen
    conditions = {name: rows[0] for name, rows in situation.conditions(candidates[:1]).items()}
    later = torch.zeros(3, *situation.states.shape[1:])
    window = Window("e", 0, torch.cat([situation.states, later]), conditions)
    expected = imagine(planner.model, [window], num_context=3, num_steps=3)
    found = imagine_futures(planner.model, situation, candidates[:1])
    torch.testing.assert_close(found.states, expected.states)


def test_a_situation_is_what_fits_beside_the_horizon(seen):
    planner, situation, _ = seen
    assert situation.num_frames == 3 and len(situation.actions) == 2
    frames = np.stack([frame_at((row, 4)) for row in range(9)])
    conditions = {
        "action": np.arange(16, dtype=np.float32).reshape(8, 2),
        "proprio": np.arange(18, dtype=np.float32).reshape(9, 2),
    }
    late = planner.situation(frames, conditions)
    assert late.num_frames == 4  # of 6 that the model sees; two more are imagined before the last
    stored = planner.spec.to_stored(late.actions)
    assert np.allclose(stored, conditions["action"][-3:], atol=1e-5)
    assert torch.allclose(late.sensed["proprio"] * 3 + 6, torch.tensor(conditions["proprio"][-4:]))
    assert late.last_frames(2).actions.shape == (1, 2)
    with pytest.raises(UserError, match="action is given 9 times for 9 frames: give it 8 times"):
        planner.situation(frames, conditions | {"action": np.zeros((9, 2), np.float32)})
    with pytest.raises(UserError, match="the goal is uint8 \\(8, 8, 3\\): frames of this run are"):
        planner.frame_goal(np.zeros((8, 8, 3), np.uint8))


def test_costs_are_distances_and_energies():
    states = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 3.0]])[..., None, None]
    goal = torch.full((1, 1), 1.0)
    actions = torch.zeros(2, 3, 1)
    futures = Imagined(states, torch.tensor([[1.0, 1.0, 4.0], [0.0, 0.0, 0.0]]))
    for reached, expected in (("last", [0, 4]), ("any", [0, 0]), ("mean", [2 / 3, 4 / 3])):
        found = future_costs(futures, actions, FrameGoal(goal, reached))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    weighted = future_costs(
        futures, actions, FrameGoal(goal, "last"), CostConfig(energy_weight=0.5)
    )
    torch.testing.assert_close(weighted, torch.tensor([1.0, 4.0]))
    lost = Imagined(states.clone().index_fill_(0, torch.tensor([1]), torch.nan), None)
    assert future_costs(lost, actions, FrameGoal(goal, "last")).tolist() == [0, torch.inf]
    with pytest.raises(UserError, match="weight is 0.5, and this model has no energy"):
        future_costs(lost, actions, FrameGoal(goal, "last"), CostConfig(energy_weight=0.5))
    with pytest.raises(UserError, match="reached is soon: must be one of mean, last, any"):
        FrameGoal(goal, "soon")


@pytest.mark.parametrize("path", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_a_distance_that_grows_with_the_way_says_where_to_go(tmp_path, path):
    """A square of four pixels, patches of four: what does not overlap is equally far by patches."""
    manifest = world(tmp_path / "world", proprio=False, patch=4)
    model, config = model_of(manifest)
    far = {}
    for distance in ("frame", "moved"):
        planner = Planner(model, config, manifest, distance=distance)
        goal = planner.frame_goal(frame_at((0, 0)))
        way = np.stack([frame_at(np.array(path) * step) for step in (0, 4, 8, 12)])
        far[distance] = goal.distances(planner.states_of(way))
    assert far["frame"][0] == far["moved"][0] == 0
    steps = far["moved"].diff()
    assert (steps > 0.1 * far["moved"][1]).all(), far
    assert far["frame"][2:].diff().abs().max() < 0.02 * far["frame"][3], far
    with pytest.raises(UserError, match="distance is straight: must be one of frame, moved"):
        FrameGoal(torch.zeros(4, 2), distance="straight")
    with pytest.raises(UserError, match="one vector each, without a grid of patches: take frame"):
        FrameGoal(torch.zeros(1, 2), distance="moved")


@pytest.fixture(params=[True, False], ids=["numbers", "ids"])
def linear(request, tmp_path, monkeypatch):
    """make(solver, ..) -> a planner of a linear world, for walks of numbers or ids."""
    continuous = request.param
    manifest = world(tmp_path / "world", discrete=not continuous, proprio=False, context_length=6)
    model, config = model_of(manifest)

    def make(solver="cem", *, budget=48, **more):
        space = Walk(continuous=continuous).action_space
        planner = Planner(
            model, config, manifest, solver=solver, horizon=4, budget=budget, space=space, **more
        )
        LinearWorld(planner.spec).put_into(monkeypatch, planner)
        return planner

    make.continuous = continuous
    make.manifest = manifest
    return make


@pytest.mark.parametrize("solver", ["cem", "gradient"])
def test_a_planner_walks_to_its_goal_and_a_random_actor_does_not(linear, solver):
    env = Walk(continuous=linear.continuous, target=(2, 9), start=(8, 5))
    goal = frame_at((2, 9))
    planner = linear(solver, budget=60)
    outcome = run_episode(env, planner, goal, 14)
    shortest = 6 if linear.continuous else 10
    assert outcome.success and shortest <= outcome.steps <= shortest + 3
    assert np.array_equal(outcome.frames[0], frame_at((8, 5)))
    assert np.array_equal(outcome.frames[-1], goal)
    assert np.array_equal(outcome.imagined[-1], goal)
    assert len(outcome.frames) == outcome.steps + 1 == len(outcome.rewards) + 1
    assert 0 < outcome.evaluations <= 60 * outcome.steps and outcome.seconds > 0
    again = run_episode(env, linear(solver, budget=60), goal, 14)
    assert np.array_equal(again.frames, outcome.frames) and again.costs == outcome.costs
    others = [
        run_episode(env, RandomActor(linear.manifest, seed=seed, space=env.action_space), goal, 14)
        for seed in range(4)
    ]
    assert all(each.steps == 14 and each.success is False for each in others)
    assert len({other.frames.tobytes() for other in others}) == 4
    persistence = linear("cem", imagines="persistence")
    assert not run_episode(env, persistence, goal, 14).success


def test_several_actions_of_a_plan_are_taken_before_the_next_one(linear):
    env = Walk(continuous=linear.continuous, target=(4, 8), start=(8, 8))
    planner = linear(budget=64)
    outcome = run_episode(env, planner, frame_at((4, 8)), 9, execute=2)
    assert len(outcome.costs) == -(-outcome.steps // 2)
    assert outcome.success and outcome.steps <= 6


def test_success_is_what_the_environment_says(linear):
    """A terminal step with a reward above all before it; a file's function goes before it."""
    goal = frame_at((0, 0))
    env = Walk(continuous=linear.continuous, start=(2, 1))
    assert run_episode(env, linear(), goal, 8).success is True
    far = Walk(continuous=linear.continuous, start=(12, 12))
    assert run_episode(far, linear(), goal, 3).success is None
    asked = []

    def reached(observation, reward, terminated, info):
        asked.append(observation.tolist())
        return observation[0] <= 10

    outcome = run_episode(far, linear(), goal, 8, success=reached)
    assert outcome.success is True and asked[-1][0] <= 10 < asked[-2][0] and outcome.steps < 8


def test_a_goal_may_be_made_of_an_episodes_beginning(linear):
    env = Walk(continuous=linear.continuous, target=(5, 5), start=(8, 5))

    def goal(env, observation, info):
        assert observation.tolist() == [8, 5]
        return frame_at(env.target)

    assert run_episode(env, linear(), goal, 8).success


def test_an_environment_that_fails_is_one_line(linear):
    env = Walk(continuous=linear.continuous, target=(0, 0), start=(8, 8), fails_at=2)
    with pytest.raises(DataError, match="step 2: the environment fails: RuntimeError: the wheel"):
        run_episode(env, linear(budget=8), frame_at((0, 0)), 8)
    odd = Walk(continuous=linear.continuous, start=(8, 8), reward=float("nan"))
    with pytest.raises(UserError, match="step 0: the environment's reward is nan"):
        run_episode(odd, linear(budget=8), frame_at((0, 0)), 8)
    with pytest.raises(UserError, match="0 steps, 1 of each plan: both must be at least 1"):
        run_episode(env, linear(), frame_at((0, 0)), 0)


def test_frames_and_what_is_sensed_come_from_the_environment(seen):
    """A real model plans in an environment whose proprioception it is given."""
    planner, *_ = seen
    env = Walk(target=(0, 0), start=(8, 8))
    outcome = run_episode(env, planner, frame_at((0, 0)), 3, keys={"proprio": "observation"})
    assert outcome.steps == 3 and outcome.imagined.shape == (3, 16, 16, 3)
    with pytest.raises(DataError, match="has no mood; --map proprio= takes one of"):
        run_episode(env, planner, frame_at((0, 0)), 3, keys={"proprio": "mood"})


def test_actions_of_skipped_frames_are_taken_one_after_the_other(tmp_path):
    """A dataset of each second frame: its actions are two of the environment, side by side."""
    manifest = world(tmp_path / "world", proprio=False, context_length=6)
    values = json.loads(manifest.path.read_text())
    (condition,) = values["conditions"]
    condition |= {"width": 4, "mean": [0.0] * 4, "std": [1.0] * 4}
    values["episodes"] = {"frame_skip": 2, "dense": ["action"], "validation": []}
    manifest.path.write_text(json.dumps(values))
    manifest = load_manifest(manifest.path)
    model, config = model_of(manifest)
    planner = Planner(
        model, config, manifest, solver="random", horizon=2, budget=3, space=Box(-1, 1, (2,))
    )
    assert planner.spec.width == 4
    env = Walk(target=(0, 0), start=(8, 8))
    outcome = run_episode(env, planner, frame_at((0, 0)), 5)
    assert outcome.steps == 5 and len(outcome.frames) == 4  # two steps a frame, the last has one
    assert len(env.taken) == 5 and env.taken[0].shape == (2,)
    with pytest.raises(UserError, match="of width 3, 2 of them side by side; the run's dataset"):
        Planner(model, config, manifest, space=Box(-1, 1, (3,)))


def test_a_run_without_actions_has_nothing_to_plan(tmp_path):
    manifest = world(tmp_path / "world", proprio=True)
    values = json.loads(manifest.path.read_text())
    values["conditions"] = [values["conditions"][1]]
    manifest.path.write_text(json.dumps(values))
    other = load_manifest(manifest.path)
    model, config = model_of(other)
    with pytest.raises(UserError, match="conditioned on proprio, and not on an action"):
        Planner(model, config, other)
    with pytest.raises(UserError, match="this run was trained with proprio or others"):
        Planner(model, config, manifest)
