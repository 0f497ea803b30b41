"""The energy of imagined states and actions together, in float64, against plain autograd of its
definition: each frame scored by itself, given those before it.
"""

import pytest
import torch
from control_worlds import model_of, world
from torch.nn import functional as F

from ebwm_scale.control.futures import Situation, imagine_futures
from ebwm_scale.control.joint_energy import (
    joint_gradients,
    refuse_without_joint_energy,
    transition_energies,
)
from ebwm_scale.control.world_costs import FrameGoal
from ebwm_scale.core.errors import UserError

HORIZON = 3
KINDS = {
    "energy": {},
    "anchored": {"model": {"predicted_input": "anchored", "energy_head": ["linear", "bilinear"]}},
    "context term": {"model": {"energy_head": ["linear", "context"], "num_layers": 2}},
    "modulated": {"model": {"conditioning": "adaln"}},
    "baseline": {"model": {"kind": "baseline", "predicts": "change"}},
}


@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "ids"])
def manifest(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return world(folder / "world", discrete=request.param, context_length=6)


def case_of(manifest, changes, num_frames=2, count=2):
    """(model in float64 with weights that all matter, situation, states, actions as numbers)."""
    model, _ = model_of(manifest, **changes)
    model = model.double()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draws).double()
    discrete = manifest.content.conditions[0].is_discrete
    frames = torch.randn(num_frames, 4, model.state_size, generator=draws).double()
    past = torch.randn(num_frames - 1, 2, generator=draws).double()
    actions = torch.randn(count, HORIZON, 2, generator=draws).double()
    if discrete:
        past = torch.randint(5, (num_frames - 1, 1), generator=draws)
        actions = torch.randn(count, HORIZON, 1, 5, generator=draws).double().softmax(-1)
    sensed = {"proprio": torch.randn(num_frames, 2, generator=draws).double()}
    states = torch.randn(count, HORIZON, 4, model.state_size, generator=draws).double()
    return model, Situation(frames, past, sensed), states, actions


def by_definition(model, situation, states, actions):
    """(N, H): each frame by itself, as the candidate behind everything before it."""
    rows = []
    for number in range(len(states)):
        row = []
        for step in range(HORIZON):
            seen = torch.cat([situation.states, states[number, :step]])
            own = actions[number : number + 1, : step + 1]
            conditions = situation.conditions(own)
            observed = seen.flatten(0, 1)[None]
            embedded = model.embed_observed(observed, conditions)
            candidate = states[number, step]
            if model.config.model.kind == "baseline":
                found = model.output(model.network(embedded, None)) + observed
                row.append((candidate - found[0, -4:]).square().sum() / 2)
                continue
            network = model.network
            landscape = network.num_landscapes - 1
            others = torch.zeros_like(observed[:, :-4])
            every = torch.cat([others, candidate[None]], 1)
            vectors = model.frame_projection(every)
            energy = network.energy(vectors, network.encode_context(embedded, landscape), landscape)
            row.append(model.step_size[0] * energy[0, -4:].sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_energies_and_gradients_are_those_of_the_definition(manifest, changes):
    model, situation, states, actions = case_of(manifest, changes)
    goal = FrameGoal(torch.zeros(4, model.state_size).double() + 0.3, "last")
    x, a = states.clone().requires_grad_(), actions.clone().requires_grad_()
    expected = by_definition(model, situation, x, a)
    pulled = 0.7 * (x[:, -1] - 0.3).square().sum((1, 2)) / 2
    of_x, of_a = torch.autograd.grad((expected.sum(1) + pulled).sum(), [x, a])
    found = transition_energies(model, situation, states, actions)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    total, *gradients = joint_gradients(model, situation, states, actions, goal.pull, 0.7)
    torch.testing.assert_close(total, (expected.sum(1) + pulled).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], of_x, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients[1], of_a, rtol=1e-9, atol=1e-11)
    assert gradients[1].abs().amax((2,)).min() > 0, "every action matters"


def test_second_order_gradients_are_those_of_plain_autograd(manifest):
    """Hessian times a direction, by differences of first-order gradients. Of an energy model:
    attention of Transformer++ has a first order alone, which is all that planning takes.
    """
    model, situation, states, actions = case_of(manifest, KINDS["energy"], count=1)
    draws = torch.Generator().manual_seed(3)
    along = torch.randn(actions.shape, generator=draws).double()

    def gradient(actions):
        a = actions.clone().requires_grad_()
        (of_a,) = torch.autograd.grad(
            transition_energies(model, situation, states, a).sum(), [a], create_graph=True
        )
        return a, of_a

    a, of_a = gradient(actions)
    (exact,) = torch.autograd.grad((of_a * along).sum(), [a])
    step = 1e-5
    above, below = [gradient(actions + sign * step * along)[1] for sign in (1, -1)]
    torch.testing.assert_close(exact, ((above - below) / (2 * step)).detach(), rtol=1e-5, atol=1e-7)


def test_a_context_without_a_graph_is_noticed(manifest, monkeypatch):
    """Breaks the energy on purpose: actions act through the observed stream alone."""
    model, situation, states, actions = case_of(manifest, KINDS["energy"])
    a = actions.clone().requires_grad_()
    expected = by_definition(model, situation, states, a)
    (of_a,) = torch.autograd.grad(expected.sum(), [a])
    network = type(model.network)
    encode = network.encode_context

    def cut(self, observed, *arguments):
        context = encode(self, observed, *arguments)
        context.keys_values[:] = [(k.detach(), v) for k, v in context.keys_values]
        return context

    monkeypatch.setattr(network, "encode_context", cut)
    goal = FrameGoal(torch.zeros(4, model.state_size).double())
    _, _, found = joint_gradients(model, situation, states, actions, goal.pull, 0.0)
    assert not torch.allclose(found, of_a, rtol=1e-3)


def test_ids_and_their_certain_probabilities_have_the_same_energy(manifest):
    model, situation, states, actions = case_of(manifest, KINDS["energy"])
    certain = actions
    if actions.dim() == 4:
        actions = actions.argmax(-1)
        certain = F.one_hot(actions, 5).double()
    found = [transition_energies(model, situation, states, each) for each in (actions, certain)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_where_a_frame_is_predicted_its_energy_has_no_slope(manifest):
    """Transformer++: at its own rollout the joint energy is 0, and so are its gradients."""
    model, situation, _, actions = case_of(manifest, KINDS["baseline"])
    if actions.dim() == 4:
        actions = actions.argmax(-1)
    model = model.float()
    narrow = Situation(
        situation.states.float(),
        situation.actions if actions.dtype == torch.int64 else situation.actions.float(),
        {name: values.float() for name, values in situation.sensed.items()},
    )
    if actions.is_floating_point():
        actions = actions.float()
    futures = imagine_futures(model, narrow, actions)
    energies = transition_energies(model, narrow, futures.states, actions)
    assert energies.max() < 1e-6


def test_a_model_whose_energy_is_of_more_is_refused(manifest):
    model, _ = model_of(manifest, state={"workspace": 4})
    with pytest.raises(UserError, match="trained with state.workspace") as error:
        refuse_without_joint_energy(model)
    assert "\n" not in str(error.value) and "take cem" in str(error.value)
