"""A looped Transformer++ is its definition in plain operations: in its loss and gradients, with a
cache, and after more loops than were trained. With one loop nothing changed.
"""

import pytest
import torch
from torch.nn import functional as F

from ebwm_scale.checkpoint.released_ebt import hparams_of
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.inference.generation import Session
from ebwm_scale.model.baseline import BaselineTransformer
from ebwm_scale.model.kv_cache import LandscapeKVCache
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

V, B, S, SIZE = 11, 2, 6, 3
EOS = 0
CASES = {
    "text": {},
    "groups": {"data": {"group_size": SIZE}},
    "documents": {"data": {"mask_documents": True, "eos_id": EOS}},
    "frames": {"state": {"kind": "embedding", "dimension": 5}, "model": {"output": "two_linear"}},
}


def build(case="text", *, loops=3, **model):
    sections = {name: dict(values) for name, values in CASES[case].items()}
    sections["model"] = {
        "kind": "baseline",
        "num_layers": 2,
        "width": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "loops": loops,
        **({} if case == "frames" else {"vocabulary_size": V}),
        **sections.get("model", {}),
        **model,
    }
    sections["data"] = {"context_length": S, **sections.get("data", {})}
    torch.manual_seed(0)
    built = WorldModel(config_from_dict(sections)).double()
    generator = torch.Generator().manual_seed(1)
    size = sections["data"].get("group_size", 1)
    if case == "frames":
        states = torch.randn(B, S + size, 5, generator=generator, dtype=torch.float64)
    else:
        states = torch.randint(V, (B, S + size), generator=generator)
        states[:, 0] = states[0, 3] = EOS
    return built, states[:, :-size], states[:, size:]


def run(model, observed, targets):
    return model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0))


def norm(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotated(x, network):
    """x (B, S, H, d) by the angles of its positions, pairs as complex numbers."""
    factors = torch.view_as_complex(network.rotary(S, x[..., 0, :]).factors)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * factors[:, None]).flatten(-2)


def plain_block(layer, x, visible, network):
    """A block on (B, S, D), heads one after the other; visible (B, S, S), bool."""
    attention, d = layer.attention, layer.attention.head_dimension
    normed = norm(x, layer.attention_norm.weight, layer.attention_norm.epsilon)
    q = rotated((normed @ attention.wq.weight.T).unflatten(-1, (-1, d)), network)
    k = rotated((normed @ attention.wk.weight.T).unflatten(-1, (-1, d)), network)
    v = (normed @ attention.wv.weight.T).unflatten(-1, (-1, d))
    heads = []
    for head in range(attention.num_heads):
        shared = head * attention.num_kv_heads // attention.num_heads
        scores = q[:, :, head] @ k[:, :, shared].mT / d**0.5
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, :, shared])
    x = x + torch.cat(heads, -1) @ attention.wo.weight.T
    normed = norm(x, layer.ffn_norm.weight, layer.ffn_norm.epsilon)
    ffn = layer.feed_forward
    return x + (F.silu(normed @ ffn.w1.weight.T) * (normed @ ffn.w3.weight.T)) @ ffn.w2.weight.T


def plain_predictions(model, observed, num_loops):
    """What the definition predicts after each loop."""
    network, data = model.network, model.config.data
    place = torch.arange(S) // (data.group_size or 1)
    visible = (place[:, None] >= place[None]).expand(len(observed), S, S)
    if data.mask_documents:
        document = (observed == EOS).cumsum(1)
        visible = visible & (document[:, :, None] == document[:, None])
    x = model.embed_observed(observed)
    hidden = torch.zeros_like(x)
    predictions = []
    for _ in range(num_loops):
        hidden = hidden + x
        for layer in network.layers:
            hidden = plain_block(layer, hidden, visible, network)
        predictions.append(model.output(norm(hidden, network.norm.weight, network.norm.epsilon)))
    return predictions


def plain_losses(model, observed, targets, num_loops):
    losses = []
    for prediction in plain_predictions(model, observed, num_loops):
        if prediction.shape[-1] == V:
            losses.append(F.cross_entropy(prediction.flatten(0, 1), targets.flatten()))
        else:
            losses.append(F.smooth_l1_loss(prediction, targets))
    return torch.stack(losses)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def compare(model, observed, targets):
    """Loss, losses of loops and gradients against the definition's, in float64."""
    loops, every = model.config.model.loops, model.config.model.loop_loss == "every"
    output = run(model, observed, targets)
    losses = plain_losses(model, observed, targets, loops)
    expected = losses.mean() if every else losses[-1]
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(output.loss, expected, **close)
    torch.testing.assert_close(output.loss_per_step, losses if every else losses[-1:], **close)
    ours, plain = gradients(model, output.loss), gradients(model, expected)
    for (name, _), one, other in zip(model.named_parameters(), ours, plain):
        torch.testing.assert_close(one, other, **close, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("loop_loss", ["last", "every"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_definition(case, loop_loss):
    compare(*build(case, loop_loss=loop_loss))


def test_the_comparison_notices_a_pass_that_is_not_told_the_input(monkeypatch):
    def without_input(self, observed, first_visible, num_loops):
        for _ in range(num_loops):
            (observed,) = right(self, observed, first_visible, 1)
            yield observed

    right = BaselineTransformer._passes
    monkeypatch.setattr(BaselineTransformer, "_passes", without_input)
    with pytest.raises(AssertionError):
        compare(*build())
    compare(*build(loops=1))


def test_evaluation_scores_every_loop_whatever_training_scores():
    model, observed, targets = build()
    losses = plain_losses(model, observed, targets, 3)
    output = run(model.eval(), observed, targets)
    torch.testing.assert_close(output.loss_per_step, losses, rtol=1e-9, atol=0)
    assert output.loss == output.loss_per_step[-1]


def test_one_loop_is_transformer_plus_plus_to_the_bit():
    """Its passes written out as they were before there were loops."""
    model, observed, targets = build(loops=1)
    network = model.network
    hidden = model.embed_observed(observed)
    rotary = network.rotary(S, hidden)
    for layer in network.layers:
        hidden = layer.forward_observed(hidden, *layer.keys_values(hidden, rotary), rotary)
    before = model.output(network.norm(hidden), targets)
    output = run(model, observed, targets)
    assert torch.equal(output.loss, before)
    for ours, plain in zip(gradients(model, output.loss), gradients(model, before)):
        assert torch.equal(ours, plain)
    values = model.config.to_dict()
    assert values["model"].pop("loops") == 1 and values["model"].pop("loop_loss") == "last"
    assert config_from_dict(values) == model.config  # a file from before says nothing of loops
    looped = build(loops=3)[0]
    assert looped.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("loops", [1, 2, 5])
def test_more_or_fewer_loops_than_trained_are_the_definitions(loops):
    model, observed, _ = build()
    hidden = model.network.after_each_loop(model.embed_observed(observed), None, loops)
    plain = plain_predictions(model, observed, loops)
    assert len(hidden) == loops
    for ours, expected in zip(hidden, plain):
        torch.testing.assert_close(model.output(ours), expected, rtol=1e-9, atol=1e-11)


def session_is_right(case):
    """Prompts of different lengths with a cache, then further positions, as without one."""
    model, observed, _ = build(case)
    model.eval()
    size = model.config.data.group_size or 1
    prompts = [observed[0, :size], observed[1, : S - size]]
    session = Session(model, prompts)
    for index in range(2):
        state = session.predict().state
        for row, prompt in enumerate(prompts):
            network = model.network
            hidden = network(model.embed_observed(prompt[None]), model.first_visible(prompt[None]))
            right = model.output(hidden)[0, -size:].float()
            found = state[row] if size > 1 else state[row][None]
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
        if index == 0:
            new = [observed[row, len(prompt) :][:size] for row, prompt in enumerate(prompts)]
            session.accept(torch.stack(new) if size > 1 else torch.cat(new))
            prompts = [torch.cat(pair) for pair in zip(prompts, new)]


@pytest.mark.parametrize("case", CASES)
def test_a_cache_has_keys_of_each_loop_and_predicts_the_same(case):
    session_is_right(case)


def test_a_cache_whose_loops_share_keys_is_seen(monkeypatch):
    right = LandscapeKVCache._seen
    monkeypatch.setattr(LandscapeKVCache, "_seen", lambda self, index: right(self, index % 2))
    with pytest.raises(AssertionError):
        session_is_right("text")


def test_what_no_loop_belongs_to_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"model.loop_loss is every: only a baseline is scored"):
        config_from_dict({"model": {"loops": 2, "loop_loss": "every"}})
    with pytest.raises(ConfigError, match=r"model.loop_loss is every with model.loops 1"):
        config_from_dict({"model": {"kind": "baseline", "loop_loss": "every"}})
    with pytest.raises(ConfigError, match=r"model.loops is 3 \(only one pass\)"):
        hparams_of(build()[0].config)
    energy = {"model": {"loops": 2, "vocabulary_size": V}}
    with pytest.raises(ConfigError, match=r"model.loops is 2 \(only one pass\)"):
        hparams_of(config_from_dict(energy))
