"""What a refinement promises beside its gradients: no look ahead, evaluation that is cheap and
leaves no trace, tiles that change nothing.
"""

import itertools
from unittest import mock

import pytest
import torch
from plain_autograd import ALL_TERMS, CONTENT, B, S, V, build, gradients, plain_operations
from torch.nn import functional as F

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model import states
from ebwm_scale.refinement import deferred_backward
from ebwm_scale.refinement import loop as refinement_loop
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.step_plan import plan_steps
from ebwm_scale.refinement.tiling import tiles_of
from ebwm_scale.world_model import WorldModel


@pytest.mark.parametrize("kind", ["vocabulary", "embedding"])
@pytest.mark.parametrize("conditioning", ["default", "time_embed"])
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("reencode", ["none", "all", 2])
def test_what_comes_later_changes_no_earlier_prediction(kind, conditioning, reencode, loops):
    """The anchor in front of a later block, the context term and a context that predictions shaped
    have seen o_1 .. o_t only.
    """
    model, observed, targets = build(
        kind=kind,
        model={
            "conditioning": conditioning,
            "loops": loops,
            "num_layers": 3,
            "predicted_layers": 2,
            "predicted_input": "anchored",
            "energy_head": ALL_TERMS,
        },
        state={"workspace": 4} if reencode == "all" else None,
        refinement={"reencode": reencode, "num_steps": 3},
    )
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }
    later = observed.clone()
    later[:, 3:] = later[:, :2]
    states = [model.eval()(x, targets, **options).state for x in (observed, later)]
    assert torch.equal(states[0][:, :3], states[1][:, :3])
    assert not torch.equal(states[0][:, 3], states[1][:, 3])


def test_a_parameter_that_no_step_reads_has_a_gradient_of_zeros():
    """Engines reduce all parameters' gradients: one step reads no U, detached steps no beta."""
    model, observed, targets = build(
        model={"energy_head": CONTENT}, state={"workspace": 6}, refinement={"reencode": "all"}
    )
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(5, 6)}
    found = gradients(model, model(observed, targets, num_steps=1, **options).loss)
    unread = ("network.feedback.weight", "network.workspace_feedback.weight", "workspace_step_size")
    assert all(found[name].abs().max() == 0 for name in unread)
    assert found["network.workspace_map.weight"] is not None


def test_a_large_embedding_gets_no_second_gradient_of_zeros(monkeypatch):
    """It has one through the observed stream; zeros beside it would be V x D numbers."""
    handed_out = []
    right = deferred_backward._SumsAsGradients.apply

    def noted(value, sums, dtypes, *sources):
        handed_out.extend(zip(sources, sums))
        return right(value, sums, dtypes, *sources)

    monkeypatch.setattr(deferred_backward._SumsAsGradients, "apply", noted)
    model, observed, targets = build()
    model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(5, 6))
    weight = model.token_embedding.weight
    assert [total for source, total in handed_out if source is weight] == [None]


def test_a_fresh_model_has_one_context_for_all_steps():
    """U starts at zero: a further step first reads what the first one did."""
    states = []
    for reencode in ("none", "all"):
        model, observed, targets = build(refinement={"reencode": reencode})
        if reencode == "all":
            torch.nn.init.zeros_(model.network.feedback.weight)
            fresh = WorldModel(model.config)
            assert fresh.network.feedback.weight.abs().max() == 0
        plain, _, _ = build()
        model.load_state_dict(plain.state_dict(), strict=False)
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        states.append(model.eval()(observed, targets, keep_state=torch.float64, **options).state)
    assert torch.equal(states[0], states[1])


def test_a_tile_below_a_sample_is_refused_where_contexts_are_encoded_again():
    model, observed, targets = build(refinement={"reencode": "all", "tile_rows": S - 1})
    with pytest.raises(ValueError, match=f"tile_rows is {S - 1}.*give at least {S}"):
        model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2))


def test_every_other_step_reads_the_context_of_the_one_before():
    for every, expected in ((1, [0, 1, 2, 3, 4]), (2, [0, 1, 1, 3, 3])):
        config = RefinementConfig(reencode="all", reencode_every=every)
        plan = plan_steps(config, [0] * 5, training=True)
        assert [step.encoded_before for step in plan] == expected
        assert [step.index for step in plan if step.encodes_again] == sorted(set(expected) - {0})


@pytest.mark.parametrize(
    "kind, update, change, state",
    [
        ("vocabulary", "probabilities", 4.0, 4.0),
        ("vocabulary", "logits", 0.3, 0.8),
        ("vocabulary", "mirror", 4.0, 6.0),
        ("embedding", "probabilities", 0.8, 1.2),
    ],
)
def test_each_clamp_binds_somewhere_and_not_everywhere(kind, update, change, state):
    """So that the comparisons above mean something; and no state is beyond its bound, nor moved
    further than a step may.
    """
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }

    def final(**clamps):
        model, observed, targets = build(
            kind=kind, refinement={"update": update, "num_steps": 1, **clamps}
        )
        return model.eval()(observed, targets, **options).state

    free, changed, bounded = final(), final(change_clamp=change), final(state_clamp=state)
    for clamped in (changed, bounded):
        same = torch.isclose(clamped, free, rtol=1e-12, atol=1e-13)
        assert same.any() and not same.all()
    assert bounded.abs().max() <= state
    start = final(change_clamp=1e-300)
    assert (changed - start).abs().max() <= change * (1 + 1e-12)


def test_tiles_cover_a_batch_once_and_are_of_about_the_same_size():
    for num_samples, num_positions, rows in itertools.product(
        (1, 2, 5), (1, 4, 7), (1, 2, 3, 7, 9, 14, 100)
    ):
        seen = torch.zeros(num_samples, num_positions, dtype=torch.int64)
        sizes = []
        for samples, positions in tiles_of(num_samples, num_positions, rows):
            for part in positions:
                seen[samples, part] += 1
                sizes.append(seen[samples, part].numel())
        assert seen.eq(1).all() and max(sizes) <= rows and max(sizes) <= 2 * min(sizes), (
            num_samples,
            num_positions,
            rows,
            sizes,
        )


@pytest.mark.parametrize("tile_rows", [5, 2])
def test_a_tile_changes_neither_the_final_state_nor_the_energies(tile_rows):
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }
    outputs = [
        model.eval()(observed, targets, **options)
        for rows in (100, tile_rows)
        for model, observed, targets in [build(refinement={"tile_rows": rows})]
    ]
    torch.testing.assert_close(outputs[1].state, outputs[0].state, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        outputs[1].energy_per_step, outputs[0].energy_per_step, rtol=1e-12, atol=1e-13
    )
    assert outputs[0].state.shape == (B, S, V)


def test_the_choices_differ_so_the_comparison_means_something():
    losses = {
        graph: gradients(
            model,
            model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0)).loss,
        )["network.head.weight"]
        for graph in ("detach", "truncate", "full")
        for model, observed, targets in [build(refinement={"graph": graph, "loss": "every"})]
    }
    assert not torch.allclose(losses["detach"], losses["full"]) and not torch.allclose(
        losses["detach"], losses["truncate"]
    )


def test_the_first_step_from_zeros_has_no_product_over_the_vocabulary(monkeypatch):
    """N 1, mirror: one product into the loss and two back, as many as a Transformer++ has."""
    model, observed, targets = build(
        state={"initial": "zeros"}, refinement={"update": "mirror", "num_steps": 1}
    )
    embed = mock.Mock(side_effect=AssertionError("the whole state was embedded"))
    monkeypatch.setattr(states, "vocabulary_embed", embed)
    monkeypatch.setattr(states.VocabularyState, "embed", embed)
    model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2)).loss.backward()
    assert model.state_map.grad is not None


def test_a_fresh_step_is_what_a_fresh_transformer_does():
    """The context term's first step gives logits of a Transformer++'s size, whatever alpha and
    the map's factor are.
    """
    sizes = {"num_layers": 1, "width": 64, "vocabulary_size": 200}
    deviations = []
    for kind, step_size, scale in (("baseline", 1.0, 1.0), ("energy", 2.0, 10.0)) * 2:
        model, *_ = build(
            model=sizes | {"kind": kind, "energy_head": ["linear", "context"]},
            state={"map_scale": scale, "initial": "zeros"},
            refinement={"step_size": step_size * 50, "update": "mirror", "num_steps": 1},
        )
        tokens = torch.arange(B * S).view(B, S)
        if kind == "baseline":
            logits = model.output(model.network(model.embed_observed(tokens)))
        else:
            context = model.network.encode_context(model.embed_observed(tokens))
            weight = model.state_space().weight
            logits = model.step_size * model.network.content.scale * context.readout @ weight.T
        deviations.append(logits.std())
    assert 0.8 < deviations[1] / deviations[0] < 1.25


@pytest.mark.parametrize(
    "weights, num_steps, expected",
    [
        ("rising", 2, [0.2, 0.8]),
        ("rising", 1, [1.0]),
        ((1.0, 2.0, 5.0), 3, [0.125, 0.25, 0.625]),
        ((1.0, 3.0, 5.0), 2, [0.375, 0.625]),
        ((1.0, 3.0), 3, [0.0, 0.25, 0.75]),
    ],
)
def test_loss_weights_sum_to_one_and_count_from_the_last_step(weights, num_steps, expected):
    config = RefinementConfig(loss_weights=weights, num_steps=num_steps)
    plan = plan_steps(config, range(num_steps), training=True)
    assert [step.loss_weight for step in plan] == pytest.approx(expected)
    assert [step.needs_graph for step in plan] == [weight > 0 for weight in expected]
    losses = [torch.tensor(float(i)) for i in range(num_steps)]
    total = sum(weight * i for i, weight in enumerate(expected))
    assert refinement_loop.total_loss(losses, config).item() == pytest.approx(total)


@pytest.mark.parametrize("kind", ["vocabulary", "embedding"])
def test_evaluation_builds_no_second_order_graph_and_touches_no_random_state(kind):
    model, observed, targets = build(
        kind=kind, refinement={"step_size_random_factor": 2.0, "noise": 0.5, "num_steps": 3}
    )
    plain, _, _ = build(kind=kind, refinement={"num_steps": 3})
    state = torch.get_rng_state()
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    with mock.patch("torch.autograd.grad", side_effect=torch.autograd.grad) as inner:
        evaluated = model.eval()(observed, targets, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        all(not call.kwargs.get("create_graph") for call in inner.call_args_list)
        and inner.call_count == 3
    )
    assert not evaluated.loss.requires_grad and evaluated.initial_loss is not None
    trained = plain.train()(observed, targets, **options)
    torch.testing.assert_close(
        evaluated.loss_per_step, trained.loss_per_step
    )  # the same draws, without the randomness of training
    torch.testing.assert_close(
        model.eval()(observed, targets, **options).loss_per_step,
        evaluated.loss_per_step,
        rtol=0,
        atol=0,
    )


def test_the_observed_stream_is_encoded_once_where_landscapes_share_it():
    for conditioning, landscapes, expected in (
        ("default", "per_step", 1),
        ("predicted_only", "per_step", 1),
        ("time_embed", "per_step", 3),
        ("time_embed", "one", 1),
    ):
        model, observed, targets = build(
            model={"conditioning": conditioning},
            refinement={"num_steps": 3, "landscapes": landscapes},
        )
        with mock.patch.object(
            model.network, "context_of", side_effect=model.network.context_of
        ) as encode:
            model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0))
        assert encode.call_count == expected, conditioning


def test_results_do_not_depend_on_how_a_batch_is_cut():
    model, observed, targets = build(refinement={"step_size_random_factor": 2.0, "noise": 0.5})
    options = {"source": NoiseSource(1, 2)}
    whole = model(observed, targets, sample_ids=torch.tensor([7, 8, 9]), **options).loss
    parts = [
        model(
            observed[i : i + 1], targets[i : i + 1], sample_ids=torch.tensor([7 + i]), **options
        ).loss
        for i in range(B)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_the_baseline_is_an_ordinary_decoder():
    for kind in ("vocabulary", "embedding"):
        model, observed, targets = build(kind=kind, model={"kind": "baseline"})
        loss = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0)).loss
        with plain_operations():
            prediction = model.output(model.network(model.embed_observed(observed)))
            plain = (
                F.cross_entropy(prediction.flatten(0, 1), targets.flatten())
                if kind == "vocabulary"
                else F.smooth_l1_loss(prediction, targets)
            )
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        later = observed.clone()
        later[:, -1] = later[:, 0]
        hidden = [model.network(model.embed_observed(x))[:, :-1] for x in (observed, later)]
        torch.testing.assert_close(*hidden)  # causal: the last token changes nothing before it


def test_gradients_taken_step_by_step_can_be_used_once_and_not_differentiated():
    model, observed, targets = build()
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(0, 0)}
    loss = model(observed, targets, **options).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        loss.backward()
    with pytest.raises(RuntimeError, match="call backward without create_graph=True"):
        torch.autograd.grad(
            model(observed, targets, **options).loss,
            list(model.parameters()),
            create_graph=True,
            allow_unused=True,
        )


def test_a_scaled_loss_scales_every_gradient():
    model, observed, targets = build(model={"conditioning": "time_embed"})
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(0, 0)}
    once = gradients(model, model(observed, targets, **options).loss)
    thrice = gradients(model, 3 * model(observed, targets, **options).loss)
    for name in once:
        assert once[name] is None or torch.allclose(
            3 * once[name], thrice[name], rtol=1e-12, atol=1e-300
        ), name
