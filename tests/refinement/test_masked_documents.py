"""data.mask_documents: a packed sequence gives each of its documents the losses and gradients that
it would have alone, in float64.
"""

import dataclasses
import itertools

import pytest
import torch

from ebwm_kernels import energy_attention, observed_attention
from ebwm_scale import world_model
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError, UserError
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.generation import Session
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.model import attention
from ebwm_scale.model.documents import document_starts, last_document
from ebwm_scale.refinement import inner_gradient
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.world_model import WorldModel

V, S, EOS = 13, 9, 0
TOKENS = torch.tensor(
    [
        [5, 3, EOS, 7, 7, 2, EOS, EOS, 4, 9],
        [EOS, 1, 2, 3, 4, EOS, 8, 6, 5, EOS],
    ]
)
OBSERVED, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
DOCUMENTS = [(0, 0, 2), (0, 2, 6), (0, 6, 7), (0, 7, 9), (1, 0, 5), (1, 5, 9)]  # sample, from, to
NUMBERS = torch.randn(2, S, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class NumberedNoise(TrainingNoise):
    """x_0 of a position, wherever the sequence that is given begins."""

    first = 0

    def initial_state(self):
        start, stop = self.first + self.positions.start, self.first + self.positions.stop
        return NUMBERS[self.sample_ids, start:stop].clone()


@pytest.fixture(autouse=True)
def numbered_noise(monkeypatch):
    monkeypatch.setattr(world_model, "TrainingNoise", NumberedNoise)


def build(*, refinement=None, model=None, state=None, data=None) -> WorldModel:
    config = config_from_dict(
        {
            "model": {
                "num_layers": 2,
                "width": 16,
                "num_heads": 4,
                "vocabulary_size": V,
                **(model or {}),
            },
            "state": state or {},
            "refinement": {"num_steps": 2, "step_size": 3.0, **(refinement or {})},
            "data": {"context_length": S, "mask_documents": True, "eos_id": EOS, **(data or {})},
        }
    )
    torch.manual_seed(1)
    built = WorldModel(config).double()
    for parameter in built.parameters():
        if parameter.abs().max() == 0:  # zero-initialised parts must not hide a missing path
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def unmasked(model: WorldModel) -> WorldModel:
    """The same weights without the mask."""
    model.config = model.config.replace(data=model.config.data.replace(mask_documents=False))
    return model


def gradients(model: WorldModel) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def packed(model: WorldModel):
    """(loss, gradients) of the packed batch."""
    output = model(OBSERVED, TARGETS, sample_ids=torch.arange(2), source=NoiseSource(0, 0))
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def alone(model: WorldModel, monkeypatch):
    """(loss, gradients) of the documents one by one, weighted by their positions."""
    model = unmasked(model)
    total = torch.zeros((), dtype=torch.float64)
    for sample, start, stop in DOCUMENTS:
        monkeypatch.setattr(NumberedNoise, "first", start)
        output = model(
            OBSERVED[sample : sample + 1, start:stop],
            TARGETS[sample : sample + 1, start:stop],
            sample_ids=torch.tensor([sample]),
            source=NoiseSource(0, 0),
        )
        loss = output.loss * (stop - start) / OBSERVED.numel()
        loss.backward()
        total += loss.detach()
    monkeypatch.setattr(NumberedNoise, "first", 0)
    return total, gradients(model)


def check(monkeypatch, **settings) -> None:
    loss, grads = packed(build(**settings))
    expected_loss, expected = alone(build(**settings), monkeypatch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-12)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


CHOICES = list(itertools.product(["detach", "full"], ["every", "last"], ["none", "step", "block"]))
TILE_ROWS = [4, 99, 5, 9, 4, 99, 7]  # each choice of recompute meets several


@pytest.mark.parametrize(
    "graph, loss, recompute, tile_rows",
    [(*choice, rows) for choice, rows in zip(CHOICES, itertools.cycle(TILE_ROWS))],
)
def test_packed_documents_train_as_each_alone(graph, loss, recompute, tile_rows, monkeypatch):
    refinement = {"graph": graph, "loss": loss, "recompute": recompute, "tile_rows": tile_rows}
    check(monkeypatch, refinement=refinement)


@pytest.mark.parametrize(
    "model",
    [
        {"conditioning": "adaln"},
        {"conditioning": "predicted_only"},
        {"num_kv_heads": 2, "predicted_input": "anchored"},
    ],
    ids=str,
)
def test_the_same_with_other_networks(model, monkeypatch):
    check(monkeypatch, model=model)


def test_the_same_for_the_baseline(monkeypatch):
    check(monkeypatch, model={"kind": "baseline"})


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_same_where_predictions_shape_the_context(recompute, monkeypatch):
    refinement = {"graph": "full", "reencode": "all", "recompute": recompute}
    check(monkeypatch, refinement=refinement, state={"workspace": 5})


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_same_where_the_context_is_read_several_times(recompute, monkeypatch):
    check(monkeypatch, refinement={"recompute": recompute}, model={"loops": 3})


def test_the_function_that_is_compiled_gets_the_documents(monkeypatch):
    """Uncompiled here; test_compiled_refinement.py compiles it."""
    monkeypatch.setattr(inner_gradient, "_compiled", lambda: inner_gradient._gradient_inside)
    check(monkeypatch, refinement={"compile": True, "tile_rows": 5})


@pytest.mark.parametrize("stream", ["observed", "predicted", "starts", "tile"])
def test_the_comparison_notices_a_stream_that_sees_another_document(stream, monkeypatch):
    model = build(refinement={"tile_rows": 5})
    if stream == "observed":
        monkeypatch.setattr(
            attention,
            "observed_attention",
            lambda *x, first_visible, **o: observed_attention(*x, **o),  # noqa: PLW0108
        )
    elif stream == "predicted":
        monkeypatch.setattr(
            attention,
            "energy_attention",
            lambda *x, first_visible, **o: energy_attention(*x, **o),  # noqa: PLW0108
        )
    elif stream == "starts":
        monkeypatch.setattr(
            world_model, "document_starts", lambda *x: (document_starts(*x) - 1).clamp(min=0)
        )
    else:  # the wrong rows' starts
        right = inner_gradient.Context.visible_to
        monkeypatch.setattr(
            inner_gradient.Context,
            "visible_to",
            lambda self, positions: dataclasses.replace(
                right(self, positions),
                first_visible=self.first_visible[:, : positions.stop - positions.start],
            ),
        )
    loss, _ = packed(model)
    monkeypatch.undo()
    monkeypatch.setattr(world_model, "TrainingNoise", NumberedNoise)
    expected, _ = alone(build(refinement={"tile_rows": 5}), monkeypatch)
    assert abs(float(loss - expected)) > 1e-6


def test_where_documents_begin():
    expected = [[0, 0, 2, 2, 2, 2, 6, 7, 7], [0, 0, 0, 0, 0, 5, 5, 5, 5]]
    starts = document_starts(OBSERVED, EOS)
    assert starts.tolist() == expected and starts.dtype == torch.int32
    assert last_document(torch.tensor([4, EOS, 5, EOS, 6, 7]), EOS).tolist() == [EOS, 6, 7]
    assert last_document(torch.tensor([4, 5]), EOS).tolist() == [4, 5]


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_thinking_over_packed_documents_is_that_over_each(kind):
    model = build(model={"kind": kind}, state={"initial": "zeros"}).eval()
    whole = last_states(model, OBSERVED, ThinkingConfig(num_steps=3))
    for sample, start, stop in DOCUMENTS:
        document = OBSERVED[sample : sample + 1, start:stop]
        own = last_states(model, document, ThinkingConfig(num_steps=3))
        torch.testing.assert_close(whole[sample, start:stop], own[0], rtol=1e-9, atol=1e-11)


def test_energies_of_selected_samples_keep_their_documents():
    model = build()
    observed = model.embed_observed(OBSERVED).detach()
    candidates = torch.randn(2, S, 16, generator=torch.Generator().manual_seed(0)).double()
    energy = SequenceEnergy(model, observed, model.first_visible(OBSERVED))
    whole = energy(candidates, 0)
    rows = torch.tensor([1])
    torch.testing.assert_close(energy.select(rows)(candidates[rows], 0), whole[rows])


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_generation_sees_the_last_document_of_a_prompt_and_begins_another_at_its_end(kind):
    model = build(model={"kind": kind}, state={"initial": "zeros"}).eval()
    config = ThinkingConfig(num_steps=2)
    prompts = [torch.tensor([5, 3, EOS, 7, 2]), torch.tensor([1, 2])]
    session = Session(model, prompts, config)
    own = Session(model, [torch.tensor([EOS, 7, 2]), torch.tensor([1, 2])], config)
    torch.testing.assert_close(session.predict().state, own.predict().state)
    session.accept(torch.tensor([EOS, 4]))
    new = Session(model, [torch.tensor([EOS]), torch.tensor([1, 2, 4])], config)
    torch.testing.assert_close(session.predict().state, new.predict().state)


def test_what_has_no_documents_or_an_uneven_view_of_them_is_refused():
    with pytest.raises(ConfigError, match="mask_documents is true: only text has documents"):
        build(state={"kind": "embedding", "dimension": 7}, model={"vocabulary_size": None})
    with pytest.raises(ConfigError, match="mask_documents is true with .* time_embed: its token"):
        build(model={"conditioning": "time_embed"})
    model = build(data={"eos_id": None})
    with pytest.raises(UserError, match="data.mask_documents is true and data.eos_id absent"):
        packed(model)
