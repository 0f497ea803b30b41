"""Solvers find plans that are known to be the best, within their budget, and each time again."""

import numpy as np
import pytest
import torch
from control_worlds import Box, LinearWorld, MultiDiscrete, frame_at, model_of, world

from ebwm_scale.control.actions import action_spec, environment_actions
from ebwm_scale.control.planner import SOLVERS, Planner
from ebwm_scale.control.solvers import draws, sampling
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.loading.observation import Observation

HORIZON = 4
BUDGET = 160


@pytest.fixture(scope="module", params=["numbers", "ids"])
def kind(request, tmp_path_factory):
    """(manifest, model, config) of walks whose actions are numbers, or ids."""
    discrete = request.param == "ids"
    folder = tmp_path_factory.mktemp(request.param)
    manifest = world(folder / "world", discrete=discrete, proprio=False, context_length=6)
    return manifest, *model_of(manifest)


def planned(
    kind,
    solver,
    monkeypatch,
    *,
    start=(8, 8),
    goal=(4, 8),
    seed=0,
    budget=BUDGET,
    reached="last",
    **more,
):
    """(plan, world, planner) of a linear world: from a place to another, in pixels."""
    manifest, model, config = kind
    space = None
    if not manifest.content.conditions[0].is_discrete:
        space = Box(-1, 1, (2,))
    plans = Planner(
        model, config, manifest, solver=solver, horizon=HORIZON, budget=budget, seed=seed,
        space=space, reached=reached, **more,
    )  # fmt: skip
    linear = LinearWorld(plans.spec)
    linear.put_into(monkeypatch, plans)
    plan = plans.plan(frame_at(start)[None], {"action": []}, frame_at(goal))
    return plan, linear, plans


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_goes_where_the_goal_is(kind, solver, monkeypatch):
    """Four rows up, the longest way there is: every action must be the one that leads there."""
    plan, linear, plans = planned(kind, solver, monkeypatch)
    assert plan.actions.shape == (HORIZON, plans.spec.width)
    assert plan.actions.dtype.str == plans.spec.condition.dtype
    standing_still = ((8 - 4) / 4) ** 2 / 2
    allowed = 0.12 if solver == "random" else 0.02
    assert 0 <= plan.cost < allowed * standing_still / 0.5
    if solver in ("gradient", "cem", "icem"):
        moves = linear.moves(plans.spec.to_model(plan.actions)[None])[0] * 4
        assert (moves[:, 0] < -0.75).all(), moves
    assert plan.history == sorted(plan.history, reverse=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_is_kept_and_counts_what_is_imagined(kind, solver, monkeypatch):
    for budget in (3, 7, 50, 160):
        plan, linear, _ = planned(kind, solver, monkeypatch, budget=budget)
        assert 1 <= plan.evaluations <= budget
        # One more for the page: the future of the plan itself.
        if solver != "gradient":
            assert linear.asked == plan.evaluations + 1
    assert plan.evaluations > budget * 0.8


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_seed_decides_a_plan(kind, solver, monkeypatch):
    options = {"goal": (7, 9), "budget": 30}
    first, _, _ = planned(kind, solver, monkeypatch, seed=3, **options)
    torch.manual_seed(99)
    again, _, plans = planned(kind, solver, monkeypatch, seed=3, **options)
    assert np.array_equal(first.actions, again.actions) and first.history == again.history
    other, _, _ = planned(kind, solver, monkeypatch, seed=4, **options)
    assert (
        not np.array_equal(first.actions, other.actions)
        or kind[0].content.conditions[0].is_discrete
    )
    plans.begin(5)
    begun = plans.generator.initial_seed()
    plans.begin(5)
    assert plans.generator.initial_seed() == begun
    plans.begin(6)
    assert plans.generator.initial_seed() != begun


def test_the_gradient_needs_less_than_drawing_at_random(kind, monkeypatch):
    """At the smallest budgets following the energy is worth more than drawing."""
    costs = {}
    for solver in ("gradient", "random"):
        found = [
            planned(kind, solver, monkeypatch, seed=seed, budget=28)[0].cost for seed in range(5)
        ]
        costs[solver] = np.mean(found)
    assert costs["gradient"] < 0.5 * costs["random"], costs


def test_a_gradient_of_the_wrong_sign_does_not_find_the_goal(kind, monkeypatch):
    """What the solver follows is the energy's gradient: turned round, it is of no use."""
    right, *_ = planned(kind, "gradient", monkeypatch, budget=28)
    manifest, model, config = kind
    turned = LinearWorld.moves
    monkeypatch.setattr(
        LinearWorld, "moves", lambda self, actions: -turned(self, actions)
        if actions.requires_grad else turned(self, actions),
    )  # fmt: skip
    wrong, *_ = planned(kind, "gradient", monkeypatch, budget=28)
    assert wrong.cost > 4 * right.cost + 0.01


def test_the_next_plan_starts_from_the_rest_of_the_last_one(kind, monkeypatch):
    plan, _, plans = planned(kind, "cem", monkeypatch)
    rest = plans.spec.to_stored(plans.rest)
    assert np.array_equal(rest[:-1], plan.actions[1:])
    assert np.array_equal(rest[-1], plan.actions[-1])
    plans.begin(0)
    assert plans.rest is None


def test_who_sees_no_difference_acts_at_random(kind, monkeypatch):
    """Planning with persistence: all futures are alike, so the first draw is taken."""
    plans = []
    for seed in range(6):
        plan, linear, _ = planned(kind, "cem", monkeypatch, seed=seed, imagines="persistence")
        assert linear.asked == 0
        plans.append(plan.actions)
    assert len({plan.tobytes() for plan in plans}) > 3


def test_what_cannot_be_planned_is_one_line(kind, monkeypatch):
    manifest, model, config = kind
    for options, expected in (
        ({"solver": "newton"}, "solver is newton: must be one of gradient, cem"),
        ({"horizon": 0}, "horizon is 0: must be from 1 to 6"),
        ({"horizon": 7}, "horizon is 7: must be from 1 to 6"),
        ({"budget": 0}, "budget is 0: must be at least 1"),
        ({"solver": "gradient", "budget": 2}, "budget is 2: must be at least 3"),
        ({"imagines": "dreams"}, "imagines is dreams: must be one of model, persistence"),
        ({"solver": "gradient", "imagines": "persistence"}, "has nothing to follow"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            Planner(model, config, manifest, **options)
        assert "\n" not in str(error.value)


def test_noise_of_a_colour_has_the_power_of_white_noise_and_is_alike_over_time():
    generator = torch.Generator().manual_seed(0)
    for steps in (2, 5, 8):
        noise = sampling.coloured_noise(4000, (steps, 2), 2.0, generator)
        assert noise.shape == (4000, steps, 2)
        assert noise.std() == pytest.approx(1, abs=0.03)
        white = sampling.coloured_noise(4000, (steps, 2), 0.0, generator)
        alike = [(each[:, 1:] * each[:, :-1]).mean() for each in (noise, white)]
        if steps > 2:
            assert alike[0] > 0.3 > abs(alike[1]) + 0.25


def test_draws_of_ids_have_their_probabilities_and_no_ids_that_are_not_there(tmp_path):
    manifest = world(tmp_path / "world", discrete=True, proprio=False)
    observe = Observation(manifest, "cpu")
    spec = action_spec(manifest, observe)
    chances = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).expand(1, 1, 5)
    of = draws.CategoricalDraws(spec, chances)
    noise = torch.randn(20_000, 1, 1, 5, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(of.candidates(noise).flatten(), minlength=5) / 20_000
    assert torch.allclose(share, chances[0, 0], atol=0.02) and share[2] == 0
    with pytest.raises(UserError, match="have 3 values, those of the run's dataset 5"):
        action_spec(manifest, observe, MultiDiscrete([3]))
    with pytest.raises(UserError, match="of width 2; the run's dataset has actions of width 1"):
        action_spec(manifest, observe, MultiDiscrete([5, 5]))
    with pytest.raises(UserError, match="are numbers \\(Box\\), those of the run's dataset are id"):
        action_spec(manifest, observe, Box(-1, 1, (1,)))


def test_weights_of_path_integrals_do_not_depend_on_the_scale_of_costs():
    solver = sampling.PathIntegral()
    costs = torch.tensor([3.0, 1.0, 2.0, torch.inf])
    weights = solver._weights(costs)
    assert torch.allclose(weights, solver._weights(costs * 1000), atol=1e-6)
    assert weights[3] == 0 and weights.argmax() == 1 and weights.sum() == pytest.approx(1)
    assert torch.equal(solver._weights(torch.full((2,), torch.inf)), torch.full((2,), 0.5).double())


def test_bounds_are_those_of_the_environment_in_the_units_of_the_model(tmp_path):
    manifest = world(tmp_path / "world", proprio=False)
    observe = Observation(manifest, "cpu")
    spec = action_spec(manifest, observe, Box(-1, 1, (2,)))
    limits = torch.stack([spec.low, spec.high])
    assert np.allclose(spec.to_stored(limits), [[-1, -1], [1, 1]], atol=1e-6)
    stored = np.array([[0.25, -0.75]], np.float32)
    assert np.allclose(spec.to_stored(spec.to_model(stored)), stored, atol=1e-6)
    assert torch.equal(action_spec(manifest, observe, Box(-np.inf, np.inf, (2,))).high,
                       torch.full((2,), 3.0))  # fmt: skip
    (action,) = environment_actions(np.array([4.0, -0.5], np.float32), manifest, Box(-1, 1, (2,)))
    assert action.tolist() == [1.0, -0.5]
    with pytest.raises(UserError, match="of width 3; the run's dataset has actions of width 2"):
        action_spec(manifest, observe, Box(-1, 1, (3,)))
