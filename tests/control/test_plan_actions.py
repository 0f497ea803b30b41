"""ebwm plan-actions: what is played beside what, what is written, and every mistake in one line."""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from control_worlds import LinearWorld, Walk, frame_at, model_of, sources, world

from ebwm_scale import plan_actions
from ebwm_scale.control import reward_readout
from ebwm_scale.control.actions import action_spec
from ebwm_scale.control.goals import read_goal
from ebwm_scale.control.planner import Planner
from ebwm_scale.control.reward_readout import RewardGoal, fit_reward, ridge
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.reporting.plan_actions_page import render

needs_gymnasium = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed"
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Walks of numbers, with proprioception and rewards."""
    folder = tmp_path_factory.mktemp("world") / "world"
    return world(folder, num_clips=40, context_length=6)


@pytest.fixture
def plans(manifest, monkeypatch, tmp_path):
    """plans(*words, env=..) -> exit code of ebwm plan-actions in a folder of its own."""
    models = {"run": model_of(manifest), "other": model_of(manifest, model={"kind": "baseline"})}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_actions, "load_checkpoint", lambda path, **options: models[path.name])
    np.save("goal.npy", frame_at((4, 6)))
    state = {"env": {"target": (4, 6), "start": (6, 6)}}
    made = []

    def make(name, options):
        if name != "Walk-v0":
            raise DataError(f"the environment {name} cannot be made")
        made.append(Walk(**state["env"], **options))
        return made[-1]

    monkeypatch.setattr(plan_actions, "make_environment", make)

    def run(*words, **env):
        state["env"] |= env
        given = {"--env": "Walk-v0", "--goal": "goal.npy", "--horizon": 3, "--budget": 6}
        given |= {"--episodes": 2, "--max-steps": 3, "--output": "out"}
        given = {name: value for name, value in given.items() if name not in words}
        listed = [str(word) for pair in given.items() for word in pair]
        mapped = [] if "--map" in words else ["--map", "proprio=observation"]
        return plan_actions.main(["run", *map(str, words), *mapped, *listed])

    run.made = made
    run.models = models
    return run


def test_everybody_plays_the_same_episodes_and_the_page_shows_them(plans, capsys, tmp_path):
    code = plans("--solver", "cem", "--against", "other", "--baseline", "random", "persistence")
    out = capsys.readouterr()
    assert code == 0, out.err
    found = json.loads((tmp_path / "out" / "plan_actions.json").read_text())
    assert list(found["actors"]) == ["model", "against", "random", "persistence"]
    assert set(found["gains"]) == {"against", "random", "persistence"}
    for name, actor in found["actors"].items():
        assert [row["seed"] for row in actor["episodes"]] == [0, 1]
        assert 0 <= actor["success"]["low"] <= actor["success"]["mean"] <= actor["success"]["high"]
        assert actor["evaluations_per_plan"] == (0 if name == "random" else 6)
        for row in actor["episodes"]:
            assert row["nearest_distance"] <= row["first_distance"]
            assert row["steps"] == row["plans"] <= 3
    assert found["solver"] == "cem" and found["budget"] == 6 and found["versions"]["torch"]
    page = (tmp_path / "out" / "plan_actions.html").read_text()
    assert page.count("data:image/png;base64,") == 8  # two episodes of four
    for said in ("the other model", "planning with the last frame", "random actions", "paired"):
        assert said in page
    assert out.out.splitlines()[0].endswith("plan_actions.html")
    assert len(out.out.splitlines()) == 5 and "success" in out.out
    assert all(env.metadata is None for env in plans.made), "every environment is closed"


def test_the_gradient_plans_with_transformer_too(plans, tmp_path):
    words = ("--solver", "gradient", "--against", "other", "--baseline", "persistence")
    assert plans(*words, "--episodes", 1, "--budget", 8, "--films", 0) == 0
    found = json.loads((tmp_path / "out" / "plan_actions.json").read_text())
    assert found["actors"]["against"]["evaluations_per_plan"] > 1
    assert "has no gradient to follow" in found["notes"][0]
    assert "<img" not in (tmp_path / "out" / "plan_actions.html").read_text()


def test_a_film_moves_and_has_a_picture_for_each_moment(plans, tmp_path):
    import base64
    import io

    from PIL import Image

    assert plans("--episodes", 1, "--films", 1, "--max-steps", 3, target=(0, 0)) == 0
    page = (tmp_path / "out" / "plan_actions.html").read_text()
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    film = Image.open(io.BytesIO(base64.b64decode(image)))
    assert film.n_frames >= 2 and film.size == (3 * 96 + 2 * 4, 96)  # seen, imagined, the goal
    film.seek(film.n_frames - 1)
    goal = np.asarray(film.convert("RGB"))[:, -96:]
    assert np.array_equal(goal, frame_at((4, 6)).repeat(6, 0).repeat(6, 1))


def test_a_function_of_a_file_sets_goals_and_judges(plans, tmp_path):
    (tmp_path / "task.py").write_text(
        "import numpy as np\n"
        "def goal(env, observation, info):\n"
        "    env.place = np.array([9, 9])\n"
        "    frame = env.render()\n"
        "    env.place = observation\n"
        "    return frame\n"
        "def reached(observation, reward, terminated, info):\n"
        "    return True\n"
        "def broken(*anything):\n"
        "    raise ValueError('no idea')\n"
        "def small(*anything):\n"
        "    return np.zeros((2, 2, 3), np.uint8)\n"
    )
    words = ("--goal", "task.py:goal", "--success", "task.py:reached", "--films", 0)
    assert plans(*words) == 0
    found = json.loads((tmp_path / "out" / "plan_actions.json").read_text())
    assert found["actors"]["model"]["success"]["mean"] == 1
    assert [row["steps"] for row in found["actors"]["model"]["episodes"]] == [1, 1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--env", "Nobody-v0"], "the environment Nobody-v0 cannot be made"),
        (["--goal", "none.npy"], "--goal none.npy: no such file; --goal takes reward"),
        (["--goal", "somewhere"], "--goal somewhere: --goal takes reward, a .npy or .png"),
        (["--goal", "small.npy"], "is uint8 (8, 8, 3); frames of this run are uint8 (16, 16, 3)"),
        (["--goal", "text.npy"], "--goal text.npy: cannot be read"),
        (["--goal", "text.png"], "--goal text.png: cannot be read"),
        (["--goal", "episode:0"], "for example episode:0:20"),
        (["--goal", "episode:7:2"], "has no held-out episode 7; it has none"),
        (["--goal", "task.py:goal"], "task.py: no such file"),
        (["--goal", "bad.py:broken"], "--goal bad.py:broken: fails: ValueError: no idea"),
        (["--goal", "bad.py:small"], "is uint8 (2, 2, 3); frames of this run"),
        (["--goal", "bad.py:nobody"], "bad.py: has no function nobody"),
        (["--success", "bad.py"], "--success takes FILE.py:NAME"),
        (["--success", "bad.py:broken"], "--success bad.py:broken: fails: ValueError: no idea"),
        (["--horizon", "9"], "horizon is 9: must be from 1 to 6"),
        (["--budget", "0"], "budget is 0: must be at least 1"),
        (["--episodes", "0"], "--episodes is 0: must be at least 1"),
        (["--goal-weight", "0"], "--goal-weight is 0.0: must be above 0"),
        (["--films", "-1"], "--films is -1: must be at least 0"),
        (["--map", "proprio"], "--map proprio: expected NAME=VALUE, for example"),
        (["--map", "proprio=mood"], "has no mood; --map proprio= takes one of"),
        (["--camera", "observation/eye"], "has no observation/eye; --camera takes one of"),
        (["--env-option", "fast"], "--env-option fast: expected NAME=VALUE"),
        (["--env-option", "continuous=false"], "the environment's actions are ids (Discrete)"),
        (["--env-option", "fails_at=1"], "step 1: the environment fails: RuntimeError"),
        (["--against", "other", "--energy-weight", "0.5"], "and this model has no energy"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_writes_nothing(
    plans, tmp_path, capsys, words, expected
):
    np.save("small.npy", np.zeros((8, 8, 3), np.uint8))
    for name in ("text.npy", "text.png"):
        (tmp_path / name).write_text("no frame")
    (tmp_path / "bad.py").write_text(
        "import numpy as np\n"
        "def broken(*anything):\n    raise ValueError('no idea')\n"
        "def small(*anything):\n    return np.zeros((2, 2, 3), np.uint8)\n"
    )
    assert plans(*words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_model_of_text_plans_nothing(plans, capsys):
    text = plans.models["run"][1]
    config = text.replace(state=text.state.replace(kind="vocabulary"))
    plans.models["run"] = (plans.models["run"][0], config)
    assert plans() == 2
    assert "a model of text: actions are planned with a world model" in capsys.readouterr().err


@pytest.mark.multiprocess  # the dataset is read in processes of their own
def test_a_goal_of_a_held_out_episode_is_its_frame(manifest, tmp_path):
    from test_world_datasets import make

    folder = sources.write_npz(tmp_path / "walks", sources.walks([9] * 4))
    made = make(tmp_path / "world", f"npz:{folder}")
    from ebwm_scale.data.format.episodes import episodes_of, read_episode

    episode = read_episode(made, episodes_of(made)[0])
    assert np.array_equal(read_goal("episode:0:5", made), episode.frames[5])
    with pytest.raises(UserError, match="has frames 0 to 9"):
        read_goal("episode:0:10", made)
    assert read_goal("reward", made) is None


def test_a_page_of_something_else_is_refused():
    with pytest.raises(DataError, match="not a result of ebwm plan-actions"):
        render({"actors": {}})


def test_ridge_is_that_of_its_normal_equations():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(60, 9, generator=draws).double()
    true = torch.randn(9, generator=draws).double()
    rewards = features @ true + 3 + 0.1 * torch.randn(60, generator=draws).double()
    weights, bias = ridge(features, rewards)
    torch.testing.assert_close(weights, true, rtol=0.1, atol=0.05)
    assert bias == pytest.approx(3, abs=0.1)
    # What it chose among has the least error of those left out, one by one.
    errors = []
    for strength in reward_readout.STRENGTHS:
        unit = torch.linalg.eigvalsh(
            (features - features.mean(0)) @ (features - features.mean(0)).T
        ).mean()
        residuals = []
        for number in range(0, 60, 6):
            kept = torch.arange(60) != number
            x, r = features[kept], rewards[kept]
            middle, mean = x.mean(0), r.mean()
            scatter = (x - middle).T @ (x - middle)
            own = torch.linalg.solve(
                scatter + strength * unit * torch.eye(9).double(), (x - middle).T @ (r - mean)
            )
            residuals.append(rewards[number] - mean - (features[number] - middle) @ own)
        errors.append(float(torch.stack(residuals).square().mean()))
    chosen = int(np.argmin(errors))
    centred = features - features.mean(0)
    expected = torch.linalg.solve(
        centred.T @ centred + reward_readout.STRENGTHS[chosen] * unit * torch.eye(9).double(),
        centred.T @ (rewards - rewards.mean()),
    )
    torch.testing.assert_close(weights, expected, rtol=0.02, atol=1e-3)


def test_rewards_are_read_from_frames_where_they_show(manifest):
    """Walks are paid by row plus column of where they arrive: a frame tells it."""
    spec = action_spec(manifest, Observation(manifest, "cpu"))
    goal = fit_reward(manifest, spec)
    assert goal.told > 0.5
    assert goal.rewards(torch.zeros(1, 1, 4, 192), torch.zeros(1, 1, 2)).isfinite().all()
    states = torch.zeros(2, 3, 4, 192)
    plus = states + goal.of_states
    actions = torch.zeros(2, 3, 2)
    assert (goal.cost(plus, actions) < goal.cost(states, actions)).all()
    x = states.clone().requires_grad_()
    (slope,) = torch.autograd.grad(goal.pull(x, actions).sum(), [x])
    assert slope[0, 0].norm() == pytest.approx(0.5 * (4 * 192) ** 0.5, rel=1e-4)
    again = fit_reward(manifest, spec)
    assert torch.equal(again.of_states, goal.of_states)


def test_rewards_that_cannot_be_planned_for_are_refused(manifest, tmp_path, monkeypatch):
    spec = action_spec(manifest, Observation(manifest, "cpu"))
    without = world(tmp_path / "without", outcomes=False)
    with pytest.raises(UserError, match="keeps no rewards; give a frame as the goal"):
        fit_reward(without, spec)
    steps = reward_readout._steps

    def same(split, spec, most):
        features, rewards = steps(split, spec, most)
        return features, torch.ones_like(rewards)

    def noise(split, spec, most):
        features, rewards = steps(split, spec, most)
        draws = torch.Generator().manual_seed(len(rewards))
        return features, torch.randn(len(rewards), generator=draws).double()

    monkeypatch.setattr(reward_readout, "_steps", same)
    with pytest.raises(UserError, match="every step of .* has the reward 1: there is nothing"):
        fit_reward(manifest, spec)
    monkeypatch.setattr(reward_readout, "_steps", noise)
    with pytest.raises(UserError, match="the reward cannot be read from this dataset's frames"):
        fit_reward(manifest, spec)


@pytest.mark.parametrize("solver", ["cem", "gradient"])
@pytest.mark.parametrize("discrete", [False, True], ids=["numbers", "ids"])
def test_planning_for_reward_goes_where_it_is(tmp_path, monkeypatch, discrete, solver):
    """In a linear world whose reward is the column: to the right."""
    made = world(tmp_path / "world", discrete=discrete, proprio=False, context_length=6)
    model, config = model_of(made)
    space = Walk(continuous=not discrete).action_space
    plans = Planner(model, config, made, solver=solver, horizon=4, budget=60, space=space)
    linear = LinearWorld(plans.spec)
    linear.put_into(monkeypatch, plans)
    num_actions = 5 if discrete else 2
    goal = RewardGoal(plans.spec, torch.tensor([[0.0, 1.0]]), torch.zeros(num_actions), 0.0, 1.0)
    plan = plans.plan(frame_at((6, 4))[None], {"action": []}, goal)
    moves = linear.moves(plans.spec.to_model(plan.actions)[None])[0] * 4
    assert (moves[:3, 1] > 0.6).all(), moves  # the last one counts for one frame of four
    columns = 4 + moves[:, 1].cumsum(0)
    assert plan.cost == pytest.approx(-float(columns.sum()) / 4, rel=1e-4)


def test_the_command_plans_for_reward(plans, tmp_path):
    assert plans("--goal", "reward", "--films", 1, "--episodes", 1, "--max-steps", 2) == 0
    found = json.loads((tmp_path / "out" / "plan_actions.json").read_text())
    assert found["actors"]["model"]["nearest_distance"] is None
    assert 0.5 < found["reward_told"] <= 1 and "linear readout" in found["notes"][0]


@needs_gymnasium
@pytest.mark.multiprocess
def test_an_environment_of_gymnasium_is_planned_in(tmp_path, monkeypatch):
    """A recorded dataset, and the environment it was recorded from, by name."""
    import gymnasium
    from test_world_datasets import make

    from ebwm_scale.data.prepare.worlds.recording import RecordConfig, RecordedSource
    from ebwm_scale.data.prepare.worlds.source import Wanted

    (tmp_path / "worlds_env.py").write_text(sources.ENV_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    recording = RecordConfig(env=sources.REGISTERED, episodes=4, steps=9, options={})
    wanted = Wanted(("action", "proprio"))
    source = RecordedSource(recording, wanted, (16, 16))
    made = make(tmp_path / "data", source, conditions=["action", "proprio"])
    model, config = model_of(made)
    monkeypatch.setattr(plan_actions, "load_checkpoint", lambda *a, **k: (model, config))
    words = ["run", "--env", sources.REGISTERED, "--goal", "episode:0:3", "--episodes", "1",
             "--max-steps", "2", "--budget", "4", "--output", str(tmp_path / "out"),
             "--baseline", "random"]  # fmt: skip
    assert plan_actions.main(words) == 0
    found = json.loads((tmp_path / "out" / "plan_actions.json").read_text())
    assert found["versions"]["gymnasium"] == gymnasium.__version__
    assert found["actors"]["model"]["success"] is None
    assert found["actors"]["random"]["episodes"][0]["steps"] == 2
