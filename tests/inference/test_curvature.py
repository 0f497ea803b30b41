"""The largest eigenvalue of the energy's second derivatives is that of the written-out matrix, in
float64; a product that leaves something out is seen.
"""

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.inference import curvature
from ebwm_scale.inference.curvature import energy_curvature, largest_eigenvalue
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.world_model import WorldModel

B, S, V = 1, 2, 7
CASES = {
    "probabilities": {},
    "mirror": {"refinement": {"update": "mirror"}},
    "logits": {"refinement": {"update": "logits"}},
    "frames": {"state": {"kind": "embedding", "dimension": 5}},
    "scaled, damped, adaln": {
        "model": {"conditioning": "adaln", "qk_norm": True},
        "state": {"map_scale": 2.0},
        "refinement": {"damping": 1.0},
    },
    "encoded again": {"refinement": {"reencode": "all"}},
}


def build(case):
    sections = {
        "model": {"num_layers": 1, "width": 8, "num_heads": 2, "energy_head": ["quadratic"]},
        "refinement": {"num_steps": 2, "step_size": 3.0},
        "data": {"context_length": S},
    }
    for section, values in CASES[case].items():
        sections[section] = sections.get(section, {}) | values
    is_text = sections.get("state", {}).get("kind") != "embedding"
    if is_text:
        sections["model"]["vocabulary_size"] = V
    torch.manual_seed(3)
    model = WorldModel(config_from_dict(sections)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    if is_text:
        return model, torch.randint(V, (B, S))
    return model, torch.randn(B, S, 5, dtype=torch.float64)


def measured(model, observed):
    source = NoiseSource(5, EVALUATION_STEP)
    return energy_curvature(model, observed, sample_ids=torch.arange(B), source=source)


def dense(model, function, state, landscape, row):
    """(n, n) of a row: the second derivatives of its energy by what a step moves."""
    b, t = row
    context = function.context(landscape)
    space = model.state_space()
    rule = getattr(space, "update_rule", "embedding")

    def energy(u):
        if rule == "embedding":
            mapped = space.projection(u)
        else:
            mapped = (u.softmax(-1) if rule == "logits" else u) @ space.weight
        rows = torch.zeros(B, S, mapped.shape[-1], dtype=torch.float64)
        rows = rows.index_put((torch.tensor(b), torch.tensor(t)), mapped)
        return model.network.energy(rows, context, landscape)[b, t]

    x = state[b, t]
    p = x.softmax(-1)
    at = p if rule in ("probabilities", "mirror") else x
    matrix = torch.autograd.functional.hessian(energy, at)
    if rule == "mirror":
        matrix = matrix @ (torch.diag(p) - torch.outer(p, p))
    return matrix


@pytest.mark.parametrize("case", CASES)
def test_the_largest_eigenvalue_is_that_of_the_written_out_matrix(case, monkeypatch):
    monkeypatch.setattr(curvature, "NUM_ITERATIONS", 100)
    model, observed = build(case)
    seen = []
    operator = curvature._operator

    def noted(model, function, state, landscape):
        rows = [(b, t) for b in range(B) for t in range(S)]
        matrices = [dense(model, function, state, landscape, row) for row in rows]
        seen.append(torch.stack([torch.linalg.eigvals(m).real.max() for m in matrices]))
        return operator(model, function, state, landscape)

    monkeypatch.setattr(curvature, "_operator", noted)
    found = measured(model, observed)
    assert len(found) == len(seen) == 2
    for step, (ours, plain) in enumerate(zip(found, seen)):
        # W a never leaves the map's image, where H has rank D: beyond it eigenvalues are zero.
        found_by_us = ours.eigenvalue.flatten().clamp(min=0)
        expected = plain.clamp(min=0)
        largest = float(expected.max())
        # Rounds approach it from below, slowly where another one lies near.
        assert (found_by_us <= expected + 1e-7 * largest).all()
        torch.testing.assert_close(found_by_us, expected, rtol=0.02, atol=0.02 * largest)
        damping = model.config.refinement.damping
        alpha = 3.0 / (step + 1) ** damping
        torch.testing.assert_close(ours.times_alpha, alpha * ours.eigenvalue)
        assert plain.max() > 1e-3


def test_a_negative_eigenvalue_that_is_larger_does_not_hide_the_largest():
    matrix = torch.diag(torch.tensor([-5.0, 2.0, 0.5], dtype=torch.float64))
    start = torch.ones(1, 2, 3, dtype=torch.float64)
    found = largest_eigenvalue(lambda v: v @ matrix, lambda v: v, start, 1)
    torch.testing.assert_close(
        found, torch.full((1, 2), 2.0, dtype=torch.float64), rtol=1e-2, atol=0
    )


def test_an_inner_gradient_without_its_own_derivative_is_seen(monkeypatch):
    model, observed = build("probabilities")
    right = measured(model, observed)
    slope = curvature._slope
    monkeypatch.setattr(curvature, "_slope", lambda *a: slope(*a) + 0.1 * a[2])
    wrong = measured(model, observed)
    assert (right[0].eigenvalue - wrong[0].eigenvalue).abs().max() > 1e-3


@pytest.mark.parametrize(
    "sections",
    [{"model": {"kind": "baseline"}}, {"state": {"workspace": 3}}],
    ids=["baseline", "workspace"],
)
def test_where_it_is_not_known_it_is_refused(sections):
    with pytest.raises(ConfigError, match="evaluation.curvature_samples is 4"):
        config_from_dict({**sections, "evaluation": {"curvature_samples": 4}})
