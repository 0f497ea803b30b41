"""Our models as costs of stable-worldmodel: its shapes, the same costs as a planner's, gradients.

Against the package itself, in an environment of its own: `make soak`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from control_worlds import frame_at, model_of, world
from torch.nn import functional as F

from ebwm_scale.control.differentiable_futures import differentiable_futures
from ebwm_scale.control.futures import imagine_futures
from ebwm_scale.control.planner import Planner
from ebwm_scale.core.errors import UserError
from ebwm_scale.integrations.stable_worldmodel import WorldModelCost

KINDS = {
    "energy": {},
    "anchored": {"model": {"predicted_input": "anchored", "energy_head": ["linear", "bilinear"]}},
    "noise": {"state": {"initial": "random_noise"}, "refinement": {"decay": 0.1, "damping": 0.5}},
    "modulated": {"model": {"conditioning": "adaln"}},
    "baseline": {"model": {"kind": "baseline", "predicts": "change"}},
}


@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "ids"])
def manifest(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return world(folder / "world", discrete=request.param, context_length=6)


def cost_of(manifest, changes=None, **options):
    model, config = model_of(manifest, **(changes or {}))
    with torch.no_grad():
        draws = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return WorldModelCost(model, config, manifest, **options), model, config


def candidates_of(cost, num_envs=2, num_samples=3, horizon=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shape = (num_envs, num_samples, horizon)
    if not cost.spec.is_discrete:
        return torch.randn(*shape, 2, generator=draws)
    ids = torch.randint(5, (*shape, 1), generator=draws)
    return F.one_hot(ids, 5).flatten(-2).float()


def info_of(num_samples=3, frames=1):
    """As that package's solvers expand what a world of two environments shows."""
    pixels = np.stack([[frame_at((row + t, 4)) for t in range(frames)] for row in (3, 6)])
    goal = np.stack([[frame_at((8, 8))], [frame_at((1, 2))]])
    places = np.stack([[[row + t, 4.0] for t in range(frames)] for row in (3, 6)])
    info = {"pixels": pixels, "goal": goal, "proprio": places.astype(np.float32)}
    return {
        name: torch.from_numpy(values)[:, None].expand(2, num_samples, *values.shape[1:])
        for name, values in info.items()
    }


def test_costs_are_those_of_a_planner(manifest):
    cost, model, config = cost_of(manifest)
    candidates = candidates_of(cost)
    found = cost.get_cost(info_of(), candidates)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    planner = Planner(model, config, manifest, horizon=4)
    for env, (row, goal) in enumerate(((3, (8, 8)), (6, (1, 2)))):
        conditions = {"action": [], "proprio": np.array([[row, 4]], np.float32)}
        situation = planner.situation(frame_at((row, 4))[None], conditions)
        actions = candidates[env]
        if cost.spec.is_discrete:
            actions = actions.unflatten(-1, (1, 5)).argmax(-1)
        futures = imagine_futures(model, situation, actions, thinking=planner.thinking)
        expected = planner.frame_goal(frame_at(goal)).cost(futures.states, actions)
        torch.testing.assert_close(found[env], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(cost.criterion(info_of(), candidates), found)
    first = info_of()
    first["pixels"] = first["pixels"].movedim(-1, 3)  # colours first
    torch.testing.assert_close(cost.get_cost(first, candidates), found)


def test_a_candidate_costs_the_same_alone_and_in_a_batch(manifest):
    cost, *_ = cost_of(manifest)
    candidates = candidates_of(cost, num_samples=5)
    whole = cost.get_cost(info_of(5), candidates)
    cost.batch_size = 2
    torch.testing.assert_close(cost.get_cost(info_of(5), candidates), whole, rtol=1e-4, atol=1e-5)
    alone = cost.get_cost(info_of(1), candidates[:, 3:4])
    torch.testing.assert_close(alone[:, 0], whole[:, 3], rtol=1e-4, atol=1e-5)


def test_the_first_actions_of_a_history_belong_to_its_frames(manifest):
    """With 3 frames the first two actions of a candidate are past; the third leads on."""
    cost, model, config = cost_of(manifest)
    candidates = candidates_of(cost, horizon=5)
    found = cost.get_cost(info_of(frames=3), candidates)
    planner = Planner(model, config, manifest, horizon=3)
    frames = np.stack([frame_at((3 + t, 4)) for t in range(3)])
    own = candidates[0, 1]
    if cost.spec.is_discrete:
        own = own.unflatten(-1, (1, 5)).argmax(-1)
    conditions = {
        "action": planner.spec.to_stored(own[:2]),
        "proprio": np.array([[3 + t, 4] for t in range(3)], np.float32),
    }
    situation = planner.situation(frames, conditions)
    futures = imagine_futures(model, situation, own[None, 2:], thinking=planner.thinking)
    expected = planner.frame_goal(frame_at((8, 8))).cost(futures.states, own)
    torch.testing.assert_close(found[0, 1], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_futures_with_a_graph_are_those_without(manifest, changes):
    """The same numbers as thinking with a cache, and in float64 the slope of their differences."""
    cost, model, _ = cost_of(manifest, changes)
    model = model.double()
    planner = Planner(model, cost.config, manifest, horizon=3)
    conditions = {
        "action": np.zeros((1, 1 if cost.spec.is_discrete else 2), np.float32),
        "proprio": np.array([[3, 4], [3, 4]], np.float32),
    }
    situation = planner.situation(np.stack([frame_at((3, 4))] * 2), conditions)
    situation = situation.__class__(
        situation.states.double(),
        situation.actions if cost.spec.is_discrete else situation.actions.double(),
        {name: values.double() for name, values in situation.sensed.items()},
    )
    actions = cost._actions(candidates_of(cost, 1, 2, 3))[0].double()
    expected = imagine_futures(model, situation, actions, thinking=planner.thinking).states
    found = differentiable_futures(model, situation, actions, planner.thinking)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-5, atol=1e-5)
    draws = torch.Generator().manual_seed(8)
    along = torch.randn(actions.shape, generator=draws).double()
    weights = torch.randn(found.shape, generator=draws).double()
    a = actions.clone().requires_grad_()
    total = (differentiable_futures(model, situation, a, planner.thinking) * weights).sum()
    (slope,) = torch.autograd.grad(total, [a])
    step = 1e-5
    above, below = [
        (differentiable_futures(model, situation, actions + sign * step * along, planner.thinking)
         * weights).sum() for sign in (1, -1)
    ]  # fmt: skip
    difference = float((above - below) / (2 * step))
    assert float((slope * along).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-9)
    assert slope.abs().amax((0, 2)).min() > 0, "every action matters"


def test_frozen_parameters_change_nothing(manifest):
    cost, model, _ = cost_of(manifest)
    candidates = candidates_of(cost).requires_grad_()
    free = torch.autograd.grad(cost.get_cost(info_of(), candidates).sum(), [candidates])[0]
    model.requires_grad_(False)
    frozen = torch.autograd.grad(cost.get_cost(info_of(), candidates).sum(), [candidates])[0]
    torch.testing.assert_close(free, frozen)


def test_what_does_not_fit_is_one_line(manifest):
    cost, *_ = cost_of(manifest)
    candidates = candidates_of(cost)
    without = info_of()
    del without["proprio"]
    floats = info_of()
    floats["pixels"] = floats["pixels"].float() / 255
    for info, actions, expected in (
        (info_of(), candidates[..., :1], "expected \\(envs, samples, horizon, "),
        (info_of(), candidates[0], "expected \\(envs, samples, horizon, "),
        (without, candidates, "info has no proprio, on which this run's frames"),
        (floats, candidates, "pixels is float32 .* expected bytes"),
        ({}, candidates, "info has no pixels"),
        (info_of(), candidates_of(cost, horizon=7), "candidates have 7 actions, after 1 frames"),
        (info_of(), candidates_of(cost, num_envs=1), "pixels is of 2 environments"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            cost.get_cost(info, actions)
        assert "\n" not in str(error.value)


def test_units_of_actions_go_there_and_back(manifest):
    cost, *_ = cost_of(manifest)
    units = cost.process()
    if cost.spec.is_discrete:
        assert units == {}
        return
    stored = np.array([[0.5, -1.0], [0.0, 1.0]], np.float32)
    standard = units["action"].transform(stored)
    np.testing.assert_allclose(units["action"].inverse_transform(standard), stored, atol=1e-6)
    np.testing.assert_allclose(standard, cost.spec.to_model(stored).numpy(), atol=1e-6)


PROGRAM = r'''
import json, sys
import numpy as np, torch
import gymnasium
from stable_worldmodel.policy import PlanConfig, WorldModelPolicy
from stable_worldmodel import solver as solvers
sys.path[:0] = json.loads(sys.argv[1])
from control_worlds import frame_at, model_of
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.integrations.stable_worldmodel import WorldModelCost

class Envs:
    """Two environments, as a policy sees them."""
    num_envs = 2
    def __init__(self, single):
        self.single_action_space = single
        self.action_space = gymnasium.vector.utils.batch_space(single, 2)

found = {}
for kind, path in json.loads(sys.argv[2]).items():
    manifest = load_manifest(path)
    cost = WorldModelCost(*model_of(manifest), manifest)
    info = {
        "pixels": np.stack([[frame_at((3, 4))], [frame_at((6, 4))]]),
        "goal": np.stack([[frame_at((8, 8))], [frame_at((1, 2))]]),
        "proprio": np.array([[[3, 4]], [[6, 4]]], np.float32),
        "action": np.full((2, 1, 2), np.nan, np.float32),
    }
    config = PlanConfig(horizon=3, receding_horizon=1)
    if kind == "ids":
        made = {"categorical": solvers.CategoricalCEMSolver(model=cost, num_samples=8, n_steps=2,
                                                            topk=2)}
        del info["action"]
        single = gymnasium.spaces.Discrete(5)
    else:
        made = {
            "cem": solvers.CEMSolver(model=cost, num_samples=8, n_steps=2, topk=2),
            "icem": solvers.ICEMSolver(model=cost, num_samples=8, n_steps=2, topk=2),
            "mppi": solvers.MPPISolver(model=cost, num_samples=8, n_steps=2, topk=2),
            "gradient": solvers.GradientSolver(model=cost, n_steps=2, num_samples=2),
        }
        single = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    for name, solver in made.items():
        envs = Envs(single)
        if kind == "ids":
            solver.configure(action_space=single, n_envs=2, config=config)
            tensors = {key: torch.from_numpy(values) for key, values in info.items()}
            actions = solver.solve(tensors)["actions"]
            found[name] = list(actions.shape)
            continue
        policy = WorldModelPolicy(solver, config, process=cost.process())
        policy.set_env(envs)
        actions = policy.get_action(dict(info))
        assert np.isfinite(actions).all()
        found[name] = list(actions.shape)
print(json.dumps(found))
'''


PACKAGES = (  # the package's own, what it imports beyond them, and what this project needs
    "stable-worldmodel",
    "opencv-python-headless",
    "imageio[ffmpeg]",
    "pydantic",
    "pyyaml",
    "safetensors",
    "fsspec",
    "rich",
)


@pytest.mark.soak
def test_that_packages_solvers_plan_with_our_models(tmp_path):
    """In an environment of its own: it needs torchvision, and with it another PyTorch."""
    environment = Path(os.environ.get("EBWM_STABLE_WORLDMODEL_ENV", tmp_path / "environment"))
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for words in (["torch==2.14.1", "torchvision==0.29.1"], ["torch==2.14.1", *PACKAGES]):
            subprocess.run([*pip, *words], check=True, timeout=1800)
    root = Path(__file__).resolve().parents[2]
    ours = [str(root / "tests" / "control"), str(root), str(root / "kernels")]
    paths = {
        kind: str(world(tmp_path / kind, discrete=kind == "ids", context_length=6).path)
        for kind in ("numbers", "ids")
    }
    done = subprocess.run(
        [str(python), "-c", PROGRAM, json.dumps(ours), json.dumps(paths)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"categorical", "cem", "icem", "mppi", "gradient"}
    assert all(shape == [2, 2] for name, shape in found.items() if name != "categorical")
