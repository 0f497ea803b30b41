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
    "damped": {"refinement": {"update": "mirror", "decay": 0.3, "damping": 1.0}},
    "momentum": {
        "model": BILINEAR,
        "state": {"workspace": 5},
        "refinement": {"update": "mirror", "decay": 0.2, "momentum": 0.6, "graph": "full"},
    },
    "momentum of frames": {
        "state": {"kind": "embedding", "dimension": V},
        "refinement": {"momentum": 0.8, "step_size": 9.0},
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
        after = spectrum.take_step(model, function, parts, landscape, 2, needs_graph=True)
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
    index = eigenvalues.abs().argmax(-1, keepdim=True)
    return eigenvalues.gather(-1, index)[..., 0]


def iterated(matrices, point, size, count=spectrum.NUM_ITERATIONS, *, turns=False):
    """What power iteration with the transposed matrices says, from the same random start.

    turns: eigenvalues may be complex, so what is meant is the mean growth of the later half.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(u.shape, generator=generator, dtype=torch.float64) for u in point]
    v = torch.cat([part.unflatten(1, (-1, size)).flatten(2) for part in parts], -1)
    all_found = []
    for _ in range(count):
        v = v / v.norm(dim=-1, keepdim=True)
        image = torch.einsum("bgij,bgi->bgj", matrices, v)
        all_found.append((image * v).sum(-1).sign() * image.norm(dim=-1))
        v = image
    if not turns:
        return all_found[-1]
    later = torch.stack(all_found[count // 2 :])
    sign = torch.where((later < 0).all(0), -1, 1)
    return sign * later.abs().log().mean(0).exp()


@pytest.mark.parametrize("case", CASES)
def test_the_eigenvalues_are_those_of_the_written_out_jacobian(case):
    model, observed = build(case)
    points = spectrum.points_after(model, torch.arange(2), observed, steps=[2], seed=SEED)
    point, function = points[2]
    size = model.network.group_size
    where = (model, function, point, model.landscapes(2)[-1])
    matrices = jacobians(*where)
    got = spectrum.step_eigenvalues(*where, 2)
    refinement = model.config.refinement
    turns = refinement.momentum > 0
    expected = iterated(matrices, point, size, turns=turns)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    in_the_end = iterated(matrices, point, size, 5000, turns=turns).abs()
    torch.testing.assert_close(in_the_end, largest(matrices).abs(), rtol=0.02, atol=1e-6)
    kept = 1 - refinement.decay / 3**refinement.damping
    if turns:  # the curvature is that of a step from rest
        where = (model, function, point[: len(point) // 2], model.landscapes(2)[-1])
        point = where[2]
        matrices = jacobians(*where)
    else:  # a gradient step of an energy
        assert torch.linalg.eigvals(matrices).imag.abs().max() < 1e-8
    of_curvature = kept * torch.eye(matrices.shape[-1], dtype=torch.float64) - matrices
    got = spectrum.step_eigenvalues(*where, 2, of_curvature=True)
    torch.testing.assert_close(got, iterated(of_curvature, point, size), rtol=1e-6, atol=1e-9)
    assert got.shape == (2, S // size)


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
