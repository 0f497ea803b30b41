"""The eigenvalues of a step are those of its Jacobian, written out by plain autograd in float64."""

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.evaluation import step_spectrum as spectrum
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.world_model import WorldModel

S, V, SEED = 4, 7, 33
BILINEAR = {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"}
CASES = {
    "mirror": {"refinement": {"update": "mirror"}},
    "logits": {"refinement": {"update": "logits"}},
    "probabilities": {},
    "decay": {"refinement": {"update": "mirror", "decay": 0.3}},
    "workspace": {
        "model": BILINEAR,
        "state": {"workspace": 5},
        "refinement": {"update": "mirror", "decay": 0.2, "graph": "full"},
    },
    "groups": {
        "model": BILINEAR,
        "state": {"workspace": 3, "initial": "zeros"},
        "refinement": {"update": "mirror", "graph": "full"},
        "data": {"group_size": 2},
    },
    "encoded again": {"refinement": {"update": "mirror", "reencode": "all", "recompute": "block"}},
    "frames": {
        "state": {"kind": "embedding", "dimension": V},
        "model": {"conditioning": "time_embed"},
    },
}


def build(case):
    torch.manual_seed(0)
    sections = {
        "model": {"num_layers": 1, "width": 16, "num_heads": 2},
        "refinement": {"step_size": 2.0, "num_steps": 3},
        "data": {"context_length": S},
        "train": {"seed": SEED},
    }
    for section, values in CASES[case].items():
        sections[section] = sections.get(section, {}) | values
    if sections.get("state", {}).get("kind") != "embedding":
        sections["model"] = sections["model"] | {"vocabulary_size": V}
    model = WorldModel(config_from_dict(sections)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.ndim > 1 else 0
    if model.config.state.kind == "embedding":
        return model, torch.randn(2, S, V, dtype=torch.float64)
    return model, torch.randint(V, (2, S))


def jacobians(model, function, point, landscape):
    """J of every row or group, (B, S / P, n, n), by plain autograd, a number at a time."""
    size = model.network.group_size
    flat = torch.cat([part.unflatten(1, (-1, size)).flatten(2) for part in point], -1)

    def step(flat):
        parts = flat.split([size * part.shape[2] for part in point], -1)
        parts = tuple(part.unflatten(-1, (size, -1)).flatten(1, 2) for part in parts)
        after = spectrum.take_step(model, function, parts, landscape, needs_graph=True)
        return torch.cat([part.unflatten(1, (-1, size)).flatten(2) for part in after], -1)

    flat = flat.detach().requires_grad_()
    after = step(flat)
    rows = [
        torch.autograd.grad(after[..., i].sum(), flat, retain_graph=True)[0]
        for i in range(after.shape[-1])
    ]
    return torch.stack(rows, -2)


def largest(matrices):
    """The eigenvalue of largest absolute value of each."""
    eigenvalues = torch.linalg.eigvals(matrices)
    assert eigenvalues.imag.abs().max() < 1e-8  # a gradient step of an energy: they are real
    index = eigenvalues.abs().argmax(-1, keepdim=True)
    return eigenvalues.real.gather(-1, index)[..., 0]


@pytest.mark.parametrize("case", CASES)
def test_the_eigenvalues_are_those_of_the_written_out_jacobian(case, monkeypatch):
    monkeypatch.setattr(spectrum, "NUM_ITERATIONS", 100)
    model, observed = build(case)
    points = spectrum.points_after(model, torch.arange(2), observed, steps=[2], seed=SEED)
    point, function = points[2]
    landscape = model.landscapes(2)[-1]
    matrices = jacobians(model, function, point, landscape)
    got = spectrum.step_eigenvalues(model, function, point, landscape)
    expected = largest(matrices)
    torch.testing.assert_close(got.abs(), expected.abs(), rtol=0.02, atol=1e-6)
    kept = 1 - model.config.refinement.decay
    curvatures = spectrum.step_eigenvalues(model, function, point, landscape, of_curvature=True)
    of_curvature = largest(kept * torch.eye(matrices.shape[-1]) - matrices)
    torch.testing.assert_close(curvatures.abs(), of_curvature.abs(), rtol=0.02, atol=1e-6)
    clear = of_curvature.abs() > 1e-3
    assert torch.equal(curvatures.sign()[clear], of_curvature.sign()[clear])
    assert got.shape == (2, S // model.network.group_size)


@pytest.mark.parametrize("case", CASES)
def test_its_steps_are_those_of_thinking(case):
    model, observed = build(case)
    points = spectrum.points_after(model, torch.arange(2), observed, steps=[1, 3], seed=SEED)
    for num_steps, (point, _) in points.items():
        noise = SequenceSampler(model, SEED, torch.arange(2), S)
        frames = observed if model.config.state.kind == "embedding" else None
        function = SequenceEnergy(model, model.embed_observed(observed))
        config = ThinkingConfig(num_steps=num_steps, seed=SEED)
        thought = think(model, function, noise.initial(frames), config, noise=noise)
        torch.testing.assert_close(point[0], thought.state, rtol=1e-12, atol=1e-13)


def test_a_flat_energy_neither_grows_nor_shrinks_and_decay_shrinks_it():
    """No curvature is left where the head is flat: J is 1 - c."""
    found = {}
    for case in ("mirror", "decay"):
        model, observed = build(case)
        with torch.no_grad():
            head = model.energy_network.head
            assert head is not None
            head.weight.zero_()
        batches = [(torch.arange(2), observed)]
        (row,) = spectrum.step_spectrum(model, batches, steps=[2], seed=SEED)
        found[case] = row
    assert found["mirror"]["step_eigenvalue"]["mean"] == pytest.approx(1)
    assert found["decay"]["step_eigenvalue"]["mean"] == pytest.approx(0.7)
    assert found["decay"]["share_that_grows"]["mean"] == 0
    assert found["decay"]["alpha_curvature"]["mean"] == pytest.approx(0, abs=1e-12)


def test_few_samples_are_read_and_none_twice():
    model, observed = build("mirror")
    batches = [(torch.tensor([i]), observed[:1]) for i in range(20)]
    (row,) = spectrum.step_spectrum(model, batches, steps=[1], seed=SEED)
    assert row["num_samples"] == spectrum.MAX_SAMPLES
    (row,) = spectrum.step_spectrum(model, batches[:3], steps=[1], seed=SEED)
    assert row["num_samples"] == 3
