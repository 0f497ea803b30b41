"""QK-norm, logit soft-capping and the z-loss are exact to second order, in float64; a defect in one
is seen, and without them nothing changes.
"""

import itertools

import pytest
import torch
from plain_autograd import B, build, compare, plain_operations
from torch.nn import functional as F

from ebwm_kernels.vocabulary import formulas, softmax_cross_entropy
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.model import attention
from ebwm_scale.refinement.noise import NoiseSource

GROUPED = {"num_kv_heads": 2, "qk_norm": True}
OPTIONS = {
    "qk_norm": {"model": GROUPED},
    "qk_norm, blocks": {"model": GROUPED, "refinement": {"recompute": "block", "tile_rows": 3}},
    "qk_norm, step": {"model": GROUPED, "refinement": {"recompute": "step"}},
    "qk_norm, encoded again": {
        "model": {**GROUPED, "conditioning": "adaln", "predicted_layers": 1},
        "refinement": {"reencode": "all"},
    },
    "qk_norm, time_embed": {"model": {**GROUPED, "conditioning": "time_embed"}},
    "qk_norm of frames": {"model": GROUPED, "kind": "embedding"},
    "soft": {"model": {"logit_softcap": 0.4}},
    "soft, mirror": {
        "model": {"logit_softcap": 0.4},
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "num_steps": 3},
    },
    "soft, logits": {"model": {"logit_softcap": 0.7}, "refinement": {"update": "logits"}},
    "soft, clamped": {
        "model": {"logit_softcap": 0.4},
        "refinement": {"change_clamp": 0.3, "state_clamp": 0.9},
    },
    "z": {"z_loss": 0.3},
    "z, mirror": {
        "z_loss": 0.3,
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "num_steps": 3, "tile_rows": 4},
    },
    "z, logits, rising": {
        "z_loss": 0.3,
        "refinement": {"update": "logits", "loss_weights": "rising"},
    },
    "all": {"model": {**GROUPED, "logit_softcap": 0.4}, "z_loss": 0.3},
}


@pytest.mark.parametrize(
    "graph, loss", [("detach", "every"), ("truncate", "last"), ("full", "every")]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_stability_options_are_exact(graph, loss, name):
    options = dict(OPTIONS[name])
    own = options.pop("refinement", {})
    if loss == "last" and "loss_weights" in own:
        return  # a last loss has no weights
    refinement = {**own, "graph": graph, "loss": loss}
    built = build(**options, refinement=refinement)
    compare(*built, num_steps=own.get("num_steps", 2))


@pytest.mark.parametrize("name", ["z", "soft", "all"])
def test_candidates_are_exact_where_all_tokens_are_candidates_but_one(name):
    """The further steps' loss over all tokens, against the whole vocabulary's by finite steps."""
    options = dict(OPTIONS[name])
    refinement = {"update": "mirror", "candidates": 12, "num_steps": 2, "graph": "full"}
    model, observed, targets = build(**options, refinement=refinement)
    model.train()
    arguments = {"sample_ids": torch.arange(B), "source": NoiseSource(5, 6), "num_steps": 2}
    loss = model(observed, targets, **arguments).loss
    model.zero_grad()
    loss.backward()
    for parameter in (model.state_map, model.step_size, model.network.head.weight):
        direction = torch.randn_like(parameter)
        slope = (parameter.grad * direction).sum()
        sides = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            sides.append(model(observed, targets, **arguments).loss.detach())
            parameter.data -= sign * 1e-6 * direction
        torch.testing.assert_close((sides[0] - sides[1]) / 2e-6, slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("lost", ["q", "k"])
def test_the_comparison_notices_a_norm_that_does_not_bend(monkeypatch, recompute, lost):
    """Breaks QK-norm on purpose: values are right, the norm's factor counts as a constant."""
    right = attention.Attention._rotate

    def wrong(attention, x, norm, rotary):
        if norm is not getattr(attention, f"{lost}_norm"):
            return right(attention, x, norm, rotary)

        def straight(heads):
            wide = heads.detach()
            factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
            return heads * factor * norm.weight

        return right(attention, x, straight, rotary)

    model, observed, targets = build(model=GROUPED, refinement={"recompute": recompute})
    source, sample_ids = NoiseSource(5, 6), torch.tensor([4, 9, 2])
    model.train()
    monkeypatch.setattr(attention.Attention, "_rotate", wrong)

    def gradient():
        model.zero_grad()
        model(observed, targets, sample_ids=sample_ids, source=source, num_steps=2).loss.backward()
        return model.network.layers[0].attention.wq.weight.grad.clone()

    broken = gradient()
    monkeypatch.setattr(attention.Attention, "_rotate", right)
    assert (broken - gradient()).abs().max() > 1e-3 * broken.abs().max()


def test_the_comparison_notices_a_soft_cap_without_its_slope(monkeypatch):
    right = formulas._step

    def flat(*arguments):
        state, slope = right(*arguments)
        return state, None if slope is None else torch.ones_like(slope)

    monkeypatch.setattr("ebwm_kernels.vocabulary.autograd._step", flat)
    with pytest.raises(AssertionError):
        compare(*build(**OPTIONS["soft"]))


def test_the_comparison_notices_a_z_loss_without_its_gradient(monkeypatch):
    right = softmax_cross_entropy.CrossEntropyRows.to_residual_

    def without(rows, probabilities):
        rows.log_normalizer = None
        return right(rows, probabilities)

    monkeypatch.setattr(softmax_cross_entropy.CrossEntropyRows, "to_residual_", without)
    with pytest.raises(AssertionError):
        compare(*build(**OPTIONS["z"]))


@pytest.mark.parametrize("loops, loop_loss", [(1, "last"), (3, "every")])
def test_a_baseline_with_all_of_them_is_plain_autograd(loops, loop_loss):
    settings = {"kind": "baseline", "loops": loops, "loop_loss": loop_loss, **GROUPED}
    model, observed, targets = build(model={**settings, "logit_softcap": 0.8}, z_loss=0.3)
    output = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0))
    model.zero_grad()
    output.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    with plain_operations():
        passes = model.network.after_each_loop(model.embed_observed(observed))
        total, pure = 0.0, []
        for hidden in passes if loop_loss == "every" else passes[-1:]:
            logits = 0.8 * torch.tanh(hidden @ model.output.weight.T / 0.8)
            torch.testing.assert_close(model.output(hidden), logits)
            pure.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
            total = total + pure[-1] + 0.3 * logits.logsumexp(-1).square().mean()
        total = total / len(pure)
    model.zero_grad()
    total.backward()
    torch.testing.assert_close(output.loss, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss_per_step, torch.stack(pure).detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)
    model.eval()
    evaluated = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0))
    torch.testing.assert_close(evaluated.loss_per_step[-1], pure[-1].detach())


def test_logged_and_validated_losses_are_without_the_z_loss():
    losses = {}
    for weight, training in itertools.product((0.0, 0.3), (True, False)):
        model, observed, targets = build(z_loss=weight)
        model.train(training)
        output = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(5, 6))
        losses[weight, training] = (output.loss_per_step, output.loss.detach())
    for training in (True, False):
        torch.testing.assert_close(losses[0.3, training][0], losses[0.0, training][0])
    assert losses[0.3, True][1] > losses[0.0, True][1] + 0.1
    torch.testing.assert_close(losses[0.3, False][1], losses[0.0, False][1])


def test_a_soft_cap_bounds_the_logits_of_every_step():
    model, observed, targets = build(model={"logit_softcap": 0.4}, refinement={"num_steps": 3})
    model.eval()
    output = model(
        observed,
        targets,
        sample_ids=torch.arange(B),
        source=NoiseSource(5, 6),
        keep_state=torch.float64,
    )
    assert 0.3 < output.state.abs().max() <= 0.4


@pytest.mark.parametrize(
    "sections, key",
    [
        ({"state": {"kind": "embedding"}, "train": {"z_loss": 0.1}}, "train.z_loss"),
        ({"state": {"kind": "embedding"}, "model": {"logit_softcap": 1.0}}, "model.logit_softcap"),
        ({"refinement": {"loss_weights": "exits"}, "train": {"z_loss": 0.1}}, "train.z_loss"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(sections, key):
    with pytest.raises(ConfigError, match=key) as caught:
        config_from_dict(sections)
    assert "\n" not in str(caught.value)
