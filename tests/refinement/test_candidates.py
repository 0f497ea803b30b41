"""Steps that move a few tokens of each position are what a mask over all tokens says, to both
orders, in float64; in training, evaluation and thinking, alone and with every other option.

The reference knows no candidates: all V logits in plain autograd, and a mask.
"""

import itertools
import statistics
from unittest import mock

import plain_autograd as plain
import pytest
import test_grouped_refinement as grouped
import torch
from torch.nn import functional as F

from ebwm_kernels.vocabulary import candidates as vocabulary_candidates
from ebwm_kernels.vocabulary.api import vocabulary_descend_reference
from ebwm_kernels.vocabulary.candidates import (
    Candidates,
    candidates_embed_reference,
    candidates_move_reference,
)
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.model import candidates, states
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.refinement.step_plan import has_graph, last_encoding
from ebwm_scale.world_model import WorldModel

B, S, V, K = plain.B, plain.S, plain.V, 4


def lowest_of_the_largest(x, count):
    """The mask (B, S, V) of the `count` largest numbers; of equal ones the lowest places."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    for row, chosen in zip(x.detach().flatten(0, -2), mask.flatten(0, -2)):
        order = sorted(range(len(row)), key=lambda token: (-row[token].item(), token))
        chosen[order[:count]] = True
    return mask


def reference_loss(model, observed, targets, *, num_steps, source, sample_ids):
    """The refinement over all V tokens; from the second step on a mask says which of them enter
    and move.
    """
    config, state = model.config.refinement, model.config.state
    draws = TrainingNoise(
        source,
        config,
        sample_ids,
        (B, S, V),
        kind=state.initial,
        dtype=torch.float64,
        workspace=state.workspace,
        workspace_kind=state.workspace_initial,
    )
    alpha = model.step_size.squeeze(0).clamp(min=1e-4) * draws.step_size_factor()
    own = model.token_embedding.weight if state.tie_embedding else model.state_map
    weight = own * state.map_scale
    embedded_observed = model.embed_observed(observed)
    x, losses, fed = draws.initial_state(), [], None
    z = draws.initial_workspace() if state.workspace else None
    mask = torch.ones(B, S, V, dtype=torch.bool)
    motion = z_motion = torch.zeros(())
    for i, landscape in enumerate(model.landscapes(num_steps)):
        if i == 1:
            mask = lowest_of_the_largest(x, config.candidates)
        starts_graph = i > 0 and not has_graph(config, i - 1, num_steps)
        if config.graph != "full" or starts_graph:
            x = x.detach()
            z = None if z is None else z.detach()
            motion, z_motion = motion.detach(), z_motion.detach()
        noise = draws.langevin(i)
        x = x if noise is None else x + noise * mask
        if not x.requires_grad:
            x = x.requires_grad_()
        shared = x.masked_fill(~mask, -torch.inf).softmax(-1) @ weight
        x = x.view_as(x)  # the candidate's own: the inner gradient stays within the row
        p = x.masked_fill(~mask, -torch.inf).softmax(-1)
        w = shared_w = None
        if z is not None:
            shared_w = z @ model.network.workspace_map.weight.T
            z = z.view_as(z) if z.requires_grad else z.requires_grad_()
            w = z @ model.network.workspace_map.weight.T
        if last_encoding(config, i) == i > 0:
            fed = [shared, shared_w]
            if not has_graph(config, i, num_steps):
                fed = [None if u is None else u.detach() for u in fed]
        e = p @ weight
        energy = plain.reference_energy(model, e, embedded_observed, landscape, fed, w)
        by = x if config.update == "logits" else p
        if z is None:
            (gradient,) = torch.autograd.grad(energy.sum(), by, create_graph=True)
        else:
            gradient, of_z = torch.autograd.grad(energy.sum(), (by, z), create_graph=True)
            z_motion = config.momentum * z_motion - model.workspace_step_size.squeeze(0) * of_z
            z = z + z_motion
        if config.momentum:
            (gradient,) = torch.autograd.grad(energy.sum(), e, create_graph=True)
        step = alpha
        if not has_graph(config, i, num_steps) and config.graph != "detach":
            gradient, step = gradient.detach(), alpha.detach()
        start = p if config.update == "probabilities" else x
        if config.graph != "full":
            start, x = start.detach(), x.detach()
        change = motion = config.momentum * motion - step * gradient
        if config.momentum:  # it is kept in front of the map
            change = motion @ weight.T
            if config.update == "logits":
                change = p * (change - (p * change).sum(-1, keepdim=True))
        if config.change_clamp is not None:
            change = torch.clamp(change, -config.change_clamp, config.change_clamp)
        moved = start + change
        if config.state_clamp is not None:
            moved = torch.clamp(moved, -config.state_clamp, config.state_clamp)
        x = torch.where(mask, moved, x)
        losses.append(F.cross_entropy(x.flatten(0, 1), targets.flatten()))
        if not has_graph(config, i, num_steps) and config.graph != "detach":
            losses[-1] = losses[-1].detach()
    if config.loss == "last":
        return losses[-1]
    if config.backprop_steps is not None:
        return torch.stack(losses[-config.backprop_steps :]).mean()
    weights = torch.ones(num_steps, dtype=torch.float64)
    if config.loss_weights == "rising":
        weights = torch.arange(1, num_steps + 1, dtype=torch.float64).square()
    elif config.loss_weights is not None:
        weights = torch.tensor(config.loss_weights[-num_steps:], dtype=torch.float64)
    return (weights / weights.sum() * torch.stack(losses)).sum()


def build(*, count=K, **options):
    refinement = {"candidates": count, "num_steps": 3, **options.pop("refinement", {})}
    return plain.build(**options, refinement=refinement)


def compare(model, observed, targets, **options):
    with mock.patch.object(plain, "reference_loss", reference_loss):
        steps = model.config.refinement.num_steps
        return plain.compare(model, observed, targets, num_steps=steps, **options)


@pytest.mark.parametrize(
    "graph, loss, update",
    itertools.product(
        ("detach", "truncate", "full"), ("every", "last"), ("probabilities", "logits", "mirror")
    ),
)
@pytest.mark.parametrize("initial", ["zeros", "random_noise"])
def test_every_combination_of_graph_loss_and_update_is_exact(graph, loss, update, initial):
    for count in (1, K, V - 1):
        compare(
            *build(
                count=count,
                state={"initial": initial, "map_scale": 7.0},
                refinement={"graph": graph, "loss": loss, "update": update},
            ),
            whole_gradient=1e-11,
        )


CONTENT = ["linear", "bilinear", "context"]


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "tied": {"state": {"tie_embedding": True}},
        "tiles": {"refinement": {"tile_rows": 3, "update": "mirror"}},
        "noise_and_random_step_sizes": {
            "refinement": {
                "noise": 0.7,
                "step_size_random_factor": 2.0,
                "update": "logits",
                "tile_rows": 6,
            },
        },
        "clamped": {"refinement": {"change_clamp": 4.0, "state_clamp": 3.0}},
        "clamped_logits": {
            "refinement": {"update": "logits", "change_clamp": 0.3, "state_clamp": 0.8}
        },
        "clamped_mirror_from_zeros": {
            "state": {"initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "mirror", "change_clamp": 1.0, "state_clamp": 1.5},
        },
        "weights": {"refinement": {"loss_weights": [1, 0, 2]}},
        "first_unweighted": {"refinement": {"loss_weights": [0, 1, 2], "update": "mirror"}},
        "rising_heads_of_a_shallow_stream": {
            "model": {"predicted_layers": 1, "predicted_input": "anchored", "energy_head": CONTENT},
            "refinement": {"loss_weights": "rising", "update": "mirror"},
            "state": {"initial": "zeros"},
        },
        "landscapes": {"model": {"conditioning": "time_embed", "predicted_input": "anchored"}},
        "adaln_step_recomputed": {
            "model": {"conditioning": "adaln", "energy_head": CONTENT},
            "refinement": {"recompute": "step"},
        },
        "block_recomputed": {
            "model": {"energy_head": CONTENT, "num_kv_heads": 2},
            "refinement": {"recompute": "block", "tile_rows": 4},
        },
        "momentum_from_zeros": {
            "state": {"initial": "zeros", "map_scale": 7.0},
            "refinement": {"momentum": 0.6, "update": "mirror"},
        },
        "momentum_of_probabilities": {"refinement": {"momentum": 0.6}},
        "momentum_of_logits_and_a_workspace": {
            "state": {"workspace": 6},
            "refinement": {"momentum": 0.6, "update": "logits"},
        },
        "encoded_again": {"refinement": {"reencode": "all", "update": "mirror"}},
        "last_block_again_every_other": {
            "refinement": {"reencode": 1, "reencode_every": 2, "num_steps": 4, "tile_rows": 6},
        },
        "workspace_encoded_again_by_block": {
            "model": {"energy_head": CONTENT},
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"reencode": "all", "recompute": "block", "update": "logits"},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_candidates_are_exact_with_every_other_option(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    compare(*build(**options))


def gradients_with_choices(model, observed, targets, given=None):
    """({name: gradient}, the choices (rows, K)); given: choices to take in place of its own."""
    chosen = []
    right = vocabulary_candidates.top_candidates

    def top(x, count):
        chosen.append(right(x, count) if given is None else given)
        return chosen[-1]

    draws = {"sample_ids": torch.arange(len(observed)), "source": NoiseSource(0, 0)}
    with mock.patch.object(vocabulary_candidates, "top_candidates", top):
        loss = model(observed, targets, **draws).loss
    found = plain.gradients(model, loss)
    return {name: g.double() for name, g in found.items() if g is not None}, chosen[0]


def largest_error(found, expected):
    """Of any gradient, relative to the largest number of its tensor."""
    return max(
        float((found[name] - g).abs().max() / g.abs().max())
        for name, g in expected.items()
        if g.abs().max() > 1e-12
    )


def test_what_bfloat16_departs_by_is_the_choice_of_candidates():
    """A row at the edge chooses another token where weights are rounded: a jump, in float64 too.
    With the same choice bfloat16 departs as it does without candidates.
    """
    config = config_from_dict(
        {
            "model": {
                "num_layers": 3,
                "width": 32,
                "num_heads": 4,
                "vocabulary_size": 61,
                "predicted_input": "anchored",
                "energy_head": ["bilinear"],
            },
            "state": {"initial": "zeros", "map_scale": 3.0},
            "refinement": {
                "step_size": 5.0,
                "graph": "full",
                "update": "mirror",
                "candidates": 9,
                "num_steps": 3,
            },
        }
    )
    own_errors, jumps, same_errors = [], [], []
    for seed in range(5):  # of single models any of the three may be the largest
        tokens = torch.randint(61, (4, 13), generator=torch.Generator().manual_seed(101 + seed))
        observed, targets = tokens[:, :-1], tokens[:, 1:]
        torch.manual_seed(seed)
        exact, half = WorldModel(config), WorldModel(config)
        half.load_state_dict(exact.state_dict())
        exact, half = exact.double(), half.bfloat16()
        expected, choices = gradients_with_choices(exact, observed, targets)
        own, rounded_choices = gradients_with_choices(half, observed, targets)
        differ = (choices.sort(-1).values != rounded_choices.sort(-1).values).any(-1)
        assert 0 < differ.sum() < len(differ)
        same_choice, _ = gradients_with_choices(half, observed, targets, choices)
        jumped, _ = gradients_with_choices(exact, observed, targets, rounded_choices)
        own_errors.append(largest_error(own, expected))
        jumps.append(largest_error(jumped, expected))
        same_errors.append(largest_error(same_choice, expected))
    assert max(same_errors) < 0.1
    usual = statistics.median(same_errors)
    assert statistics.median(own_errors) > 1.25 * usual
    assert statistics.median(jumps) > 1.25 * usual


def test_the_targets_are_among_the_candidates_and_not():
    """So that the comparisons above mean something."""
    model, observed, targets = build()
    kept = []
    right = candidates.candidates_loss

    def noted(values, tail, target, chosen, *rest, **options):
        kept.append(chosen.place_of(targets.flatten())[1])
        return right(values, tail, target, chosen, *rest, **options)

    with mock.patch.object(candidates, "candidates_loss", noted):
        model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(5, 6))
    assert all(inside.any() and not inside.all() for inside in kept)


@pytest.mark.parametrize("lost", ["tail", "target", "choice"])
def test_the_comparison_notices_what_is_lost(monkeypatch, lost):
    """Breaks it on purpose: the numbers stay right, but for a choice that is another one."""
    right = candidates.first_candidates

    def broken(weight, hidden, targets, count, **options):
        found = right(weight, hidden, targets, count, **options)
        if lost == "choice":
            return right(-weight, hidden, targets, count, **options)
        return found._replace(**{lost: getattr(found, lost).detach()})

    monkeypatch.setattr(candidates, "first_candidates", broken)
    with pytest.raises(AssertionError):
        compare(*build(refinement={"graph": "full", "loss": "last"}))


@pytest.mark.parametrize("count", [V, V + 1, 10**6])
def test_as_many_candidates_as_tokens_are_the_dense_steps_to_the_bit(count):
    results = []
    for number in (None, count):
        model, observed, targets = build(count=number)
        output = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(5, 6))
        results.append([output.loss, *plain.gradients(model, output.loss).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results) if a is not None)


def test_all_tokens_but_one_are_nearly_the_dense_steps():
    """The sparse way itself, against the dense one: what is left out has next to no probability."""
    losses = []
    for number in (None, V - 1):
        model, observed, targets = build(
            count=number, refinement={"update": "mirror", "step_size": 60.0}
        )
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(5, 6)}
        losses.append(model.eval()(observed, targets, **options).loss_per_step)
    assert losses[0][0] == losses[1][0]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("update", ["probabilities", "logits", "mirror"])
def test_what_is_no_candidate_keeps_its_logit_of_the_first_step(update):
    model, observed, targets = build(refinement={"update": update})
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }
    first = model.eval()(observed, targets, num_steps=1, **options)
    last = model.eval()(observed, targets, num_steps=3, **options)
    mask = lowest_of_the_largest(first.state, K)
    assert torch.equal(first.state[~mask], last.state[~mask])
    assert (first.state[mask] != last.state[mask]).all()
    expected = F.cross_entropy(last.state.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(last.loss_per_step[-1], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("tile_rows", [None, 3])
def test_targets_that_do_not_count_have_no_part(tile_rows):
    model, observed, targets = build(refinement={"tile_rows": tile_rows})
    targets = targets.clone()
    targets[0, 1:] = -100
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    found = model(observed, targets, **options)
    state = model.eval()(observed, targets, keep_state=torch.float64, **options).state
    expected = F.cross_entropy(state.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss_per_step[-1], expected, rtol=1e-12, atol=0)


def test_samples_of_the_replay_buffer_start_over_with_their_candidates():
    model, observed, targets = build()
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    ended = model.eval()(observed, targets, keep_state=torch.float64, **options).state
    restart = (torch.tensor([1]), ended[1:2])
    again = model(observed, targets, keep_state=torch.float64, restart=restart, **options).state
    assert torch.equal(again[0], ended[0]) and not torch.equal(again[1], ended[1])
    first = model(
        observed, targets, keep_state=torch.float64, restart=restart, num_steps=1, **options
    )
    unmoved = ~lowest_of_the_largest(first.state, K)
    assert torch.equal(first.state[unmoved], again[unmoved])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": {"kind": "baseline"}}, "a baseline takes no further step"),
        (
            {"state": {"kind": "embedding", "dimension": 7}, "model": {}},
            "frames have no tokens to choose from",
        ),
        ({"refinement": {"num_steps": 1}}, "there is no further step"),
    ],
)
def test_what_has_no_candidates_refuses_them_in_one_sentence(options, message):
    values = {
        "model": {"size": "4xs", **options.get("model", {})},
        "state": options.get("state", {}),
        "refinement": {"candidates": 8, **options.get("refinement", {})},
    }
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


class PlainSteps(candidates.CandidateSteps):
    """The same steps in plain autograd, with V numbers a row and gathered rows of the map."""

    def first(self, direction, targets, *, probabilities, state, keep_whole, out):
        rows = [None if u is None else u.flatten(0, 1) for u in (probabilities, state)]
        hidden = direction.flatten(0, 1)
        x = vocabulary_descend_reference(
            self.weight, hidden, probabilities=rows[0], x=rows[1], clamps=self.clamps
        )
        mask = lowest_of_the_largest(x, self.count)
        ids = mask.nonzero()[:, 1].view(len(x), self.count)
        tail = x.masked_fill(mask, -torch.inf).logsumexp(-1)
        of_target = x.gather(1, targets.clamp(min=0).flatten()[:, None]).squeeze(1)
        shape = direction.shape[:2]
        values = x.gather(1, ids)
        return candidates.CandidateState(shape, Candidates(ids, V), values, tail, of_target)

    def embed(self, state):
        q = state.values.softmax(-1)
        vectors = candidates_embed_reference(q, self.weight, state.candidates.ids)
        return vectors.unflatten(0, state.shape), q

    def update(self, state, probabilities, direction):
        move = candidates_move_reference(self.weight, direction.flatten(0, 1), state.candidates.ids)
        with mock.patch.object(candidates, "candidates_move", lambda *a, **o: move):
            return super().update(state, probabilities, direction)


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_candidates_of_groups_are_those_of_plain_autograd(monkeypatch, graph, recompute):
    model, observed, targets = grouped.build(
        data=grouped.GRID,
        model={"energy_head": CONTENT},
        refinement={
            "candidates": K,
            "num_steps": 3,
            "graph": graph,
            "update": "mirror",
            "recompute": recompute,
        },
    )
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(5, 6)}
    found = model(observed, targets, **options)
    ours = plain.gradients(model, found.loss)
    monkeypatch.setattr(states, "CandidateSteps", PlainSteps)
    expected = model(observed, targets, **options)
    theirs = plain.gradients(model, expected.loss)
    torch.testing.assert_close(found.loss_per_step, expected.loss_per_step, rtol=1e-12, atol=0)
    largest = max(u.abs().max() for u in theirs.values() if u is not None)
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None
            continue
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-10, atol=float(1e-12 * largest), msg=name
        )


def test_a_bfloat16_model_follows_its_float64_numbers():
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        model, observed, targets = build(
            state={"initial": "zeros", "map_scale": 7.0},
            refinement={"update": "mirror", "graph": "full", "candidates": V - 1},
        )
        model = model.bfloat16().to(dtype)
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(5, 6)}
        output = model(observed, targets, **options)
        found = plain.gradients(model, output.loss)
        gradients[dtype] = torch.cat([found[name].flatten().double() for name in sorted(found)])
    half, exact = gradients[torch.bfloat16], gradients[torch.float64]
    assert (half - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("backprop_steps", [1, 2, 3])
@pytest.mark.parametrize("update", ["probabilities", "logits", "mirror"])
def test_a_graph_through_the_last_steps_alone_is_exact(backprop_steps, update):
    compare(
        *build(
            state={"initial": "zeros", "map_scale": 7.0},
            refinement={
                "graph": "full",
                "num_steps": 4,
                "backprop_steps": backprop_steps,
                "update": update,
            },
        )
    )


def test_decay_is_refused_with_candidates():
    values = {"model": {"size": "4xs"}, "refinement": {"candidates": 8, "decay": 0.1}}
    values["refinement"]["update"] = "mirror"
    with pytest.raises(ConfigError, match="they cannot decay"):
        config_from_dict(values)
