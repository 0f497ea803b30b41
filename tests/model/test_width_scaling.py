"""Width transfer: every tensor has a role, the base is the standard model to the bit, what training
changes stays O(1) over widths, and each broken rule shows.
"""

import math
import re

import pytest
import torch
from coordinates import BASE, WIDTHS, growth, new_model, run, train, width_config
from torch import nn

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.model import width_scaling
from ebwm_scale.model.width_scaling import ROLES, query_factor, role_of, width_factors
from ebwm_scale.training.optimizer import new_optimizer, parameter_groups
from ebwm_scale.world_model import WorldModel

EVERY_TERM = ["linear", "quadratic", "bilinear", "context"]
HELD = 0.25  # power of the width that counts as none, at these widths
FRAMES = {"kind": "embedding", "dimension": 6, "initial": "zeros", "map_scale": 1.0}


def of_frames(kind: str, **model):
    """A model of frames with conditions of both kinds."""
    model = {"kind": kind, "num_layers": 1, "width": 64, "num_heads": 4, **model}
    model |= {"parametrization": "width_scaled", "base_width": 32, "base_num_heads": 2}
    conditions = [
        {"name": "push", "width": 2},
        {"name": "button", "kind": "discrete", "num_values": 3},
    ]
    return config_from_dict(
        {
            "model": model,
            "state": {"kind": "embedding", "dimension": 6},
            "data": {"context_length": 4, "conditions": conditions},
            "optimizer": {"learning_rate": 0.01},
        }
    )


def with_everything():
    """Configurations that together have every parameter there is."""
    whole = width_config(64, energy_head=EVERY_TERM, conditioning="adaln", qk_norm=True)
    refinement = whole.refinement.replace(reencode="all", loss_weights="exits")
    state = whole.state.replace(workspace=4)
    return [
        whole.replace(refinement=refinement, state=state),
        width_config(64, kind="baseline"),
        of_frames("energy"),
        of_frames("baseline", output="two_linear"),
    ]


def deviation(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def test_every_parameter_has_a_role_and_every_role_a_parameter():
    names = set()
    for config in with_everything():
        with torch.device("meta"):
            names |= {name for name, _ in WorldModel(config).named_parameters()}
    roles = {name: role_of(name) for name in names}
    used = {next(p for p, _ in ROLES if re.fullmatch(p, name)) for name in names}
    assert used == {pattern for pattern, _ in ROLES}
    assert roles["network.head.weight"] == roles["output.weight"] == "output"
    assert roles["state_map"] == roles["frame_projection.weight"] == "input"
    with pytest.raises(KeyError, match="network.novelty.weight has no role"):
        role_of("network.novelty.weight")


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_at_the_base_width_it_is_the_standard_model_to_the_bit(kind):
    scaled = width_config(BASE, kind=kind, energy_head=EVERY_TERM)
    standard = width_config(BASE, kind=kind, energy_head=EVERY_TERM, scaled=False)
    ours, theirs = new_model(scaled), new_model(standard)
    losses = [train(m, new_optimizer(m, m.config), 2) for m in (ours, theirs)]
    assert losses[0] == losses[1]
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    assert len(parameter_groups(ours, scaled)) == len(parameter_groups(theirs, standard))


def test_starts_and_rates_are_those_of_the_roles():
    m, base, vocabulary = 8, 32, 32
    config = width_config(m * base, energy_head=EVERY_TERM, num_heads=2, base_num_heads=2)
    model = new_model(config)
    expected = {  # deviation, power of m in the rate
        "token_embedding.weight": (1, 0),
        "state_map": (math.sqrt(2 / (vocabulary + base)), 0),
        "network.head.weight": (math.sqrt(2 / (1 + base)) / m, -1),
        "network.content.quadratic.weight": (math.sqrt(2) / base / m**1.5, -2),
        "network.content.bilinear.weight": (base**-0.5 / m**1.5, -2),
        "network.layers.0.attention.wk.weight": ((m * base) ** -0.5, -1),
        "network.layers.0.attention.wq.weight": ((m * base) ** -0.5 / m**0.5, -1.5),
        "network.layers.1.ffn_norm.weight": (1, 0),
        "step_size": (2.0, 0),
    }
    rates = {}
    for group in parameter_groups(model, config):
        for p in group["params"]:
            rates[id(p)] = (group["rate_scale"], group["weight_decay"])
    for name, (start, power) in expected.items():
        parameter = model.get_parameter(name)
        assert deviation(parameter.detach()) == pytest.approx(start, rel=0.15), name
        rate, decay = rates[id(parameter)]
        own = 6.0 if name == "step_size" else 1.0
        assert rate / own == pytest.approx(m**power), name
        if name != "step_size":
            assert rate * decay == pytest.approx(config.optimizer.weight_decay)


def test_a_baselines_output_begins_and_learns_as_an_output():
    config = width_config(256, kind="baseline")
    weight = new_model(config).output.weight
    assert deviation(weight.detach()) == pytest.approx(math.sqrt(2 / 64) / 8, rel=0.1)
    assert width_factors(config.model, "output.weight", weight.shape).rate == 1 / 8


def test_a_rule_of_the_optimizer_multiplies_on_top():
    rule = {"parameters": r"network\.head\.weight", "rate": 0.5}
    config = width_config(64, optimizer={"rules": [rule]})
    model = new_model(config)
    for group in parameter_groups(model, config):
        if any(p is model.energy_network.head.weight for p in group["params"]):
            assert group["rate_scale"] == 0.5 * BASE / 64


def test_energy_inner_gradient_and_prediction_keep_their_size_over_widths():
    powers = growth(scaled=True)
    assert all(abs(power) < HELD for power in powers.values()), powers
    standard = growth(scaled=False)
    for name in ("activations", "energy", "inner gradient", "prediction"):
        assert standard[name] > HELD, standard


def test_a_baselines_prediction_keeps_its_size_over_widths():
    powers = growth(kind="baseline", scaled=True)
    assert all(abs(power) < HELD for power in powers.values()), powers
    assert growth(kind="baseline", scaled=False)["prediction"] > HELD


def test_content_terms_of_the_energy_keep_their_size_over_widths():
    terms = ["linear", "bilinear", "context"]
    powers = growth(energy_head=terms, optimizer={"learning_rate": 0.002}, seeds=1)
    assert all(abs(power) < HELD for power in powers.values()), powers


@pytest.mark.parametrize(
    "role, power, options",
    [
        ("hidden", 0, {}),
        ("output", 0, {"optimizer": {"learning_rate": 0.02}}),
        ("input", -1, {}),
        ("output", 0, {"kind": "baseline", "optimizer": {"learning_rate": 0.002}}),
        ("pull", -1, {"energy_head": ["bilinear"]}),
    ],
)
def test_a_broken_rule_fails_the_coordinate_check(monkeypatch, role, power, options):
    monkeypatch.setitem(width_scaling.RATE_POWERS, role, power)
    powers = growth(seeds=1, **options)
    assert any(abs(p) > HELD for p in powers.values()), powers


class Times(nn.Module):
    """A linear map whose output is multiplied: what a factor in the forward pass would be."""

    def __init__(self, linear: nn.Linear, factor: float):
        super().__init__()
        self.linear = linear
        self.factor = factor

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def forward(self, x):
        return self.factor * self.linear(x)


def explicit(config, factors: dict[str, float]):
    """The model with factors in its forward pass, by the name of a linear map: weights over them,
    and rates over them.
    """
    model = new_model(config, dtype=torch.float64)
    groups = parameter_groups(model, config)
    with torch.no_grad():
        for name, factor in factors.items():
            linear = model.get_submodule(name)
            linear.weight.div_(factor)
            groups = apart(groups, linear.weight, factor)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Times(linear, factor))
    return model, groups


def apart(groups: list[dict], parameter: nn.Parameter, factor: float) -> list[dict]:
    """The groups with a parameter in a group of its own, its rate over a factor."""
    found = []
    for group in groups:
        rest = [p for p in group["params"] if p is not parameter]
        if len(rest) < len(group["params"]):
            own = {**group, "params": [parameter]}
            own["rate_scale"] = group["rate_scale"] / factor
            own["weight_decay"] = group["weight_decay"] * factor
            found.append(own)
        found.append({**group, "params": rest})
    return [group for group in found if group["params"]]


def trajectory(model, groups) -> list[float]:
    return train(model, torch.optim.AdamW(groups, eps=1e-30), 4)


def test_scores_over_d_and_a_head_over_m_are_what_the_starts_and_rates_say():
    """float64: factors in the forward pass, through both orders of the energy's gradient, train
    exactly as their place in start and rate does.
    """
    config = width_config(128, num_heads=2, base_num_heads=2)  # heads of 64, 16 at the base
    assert query_factor(config.model) == 0.5
    ours = new_model(config, dtype=torch.float64)
    expected = trajectory(ours, parameter_groups(ours, config))
    names = [f"network.layers.{layer}.attention.wq" for layer in range(2)]
    factors = {**dict.fromkeys(names, 0.5), "network.head": 0.25}
    found = trajectory(*explicit(config, factors))
    assert found == pytest.approx(expected, rel=1e-10)
    assert len(set(expected)) == 4

    model, groups = explicit(config, factors)  # a rate that is forgotten shows
    groups[0]["rate_scale"] *= 2
    assert trajectory(model, groups) != pytest.approx(expected, rel=1e-4)


def test_a_head_over_m_is_alpha_over_m():
    """float64: the linear head times m, and alpha over m, make the same predictions."""
    config = width_config(128)
    ours = new_model(config, dtype=torch.float64)
    expected = trajectory(ours, parameter_groups(ours, config))
    other = new_model(config, dtype=torch.float64)
    m = 128 / BASE
    groups = parameter_groups(other, config)
    groups = apart(groups, other.energy_network.head.weight, 1 / m)
    groups = apart(groups, other.step_size, m)
    with torch.no_grad():
        other.energy_network.head.weight.mul_(m)
        other.step_size.div_(m)
    assert trajectory(other, groups) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_scores_go_over_d_with_and_without_normed_queries(qk_norm):
    wide = width_config(128, num_heads=2, base_num_heads=2, qk_norm=qk_norm)
    model = new_model(wide)
    attention = model.network.layers[0].attention
    name = "network.layers.0.attention." + ("q_norm" if qk_norm else "wq") + ".weight"
    standard = new_model(wide.replace(model=wide.model.replace(parametrization="standard")))
    ratio = model.get_parameter(name) / standard.get_parameter(name)
    assert torch.allclose(ratio, torch.tensor(0.5))
    assert torch.equal(attention.wk.weight, standard.network.layers[0].attention.wk.weight)


def test_muons_matrices_change_their_outputs_alike_at_every_width():
    """The spectral norm of an update, of a square matrix, is the same over widths."""
    norms = []
    for width in (32, 128):
        config = width_config(width, optimizer={"name": "muon", "weight_decay": 0.0})
        model = new_model(config)
        weight = model.network.layers[0].attention.wo.weight
        before = weight.detach().clone()
        train(model, new_optimizer(model, config), 1)
        norms.append(torch.linalg.matrix_norm(weight.detach() - before, 2).item())
    assert norms[1] == pytest.approx(norms[0], rel=0.15)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_width": None}, "model.base_width is absent"),
        ({"base_num_heads": None}, "model.base_num_heads is absent"),
        ({"base_num_heads": 3}, "model.base_width 32 over model.base_num_heads 3"),
        ({"parametrization": "standard"}, "model.base_width is 32 with .* standard"),
    ],
)
def test_a_base_is_asked_for_and_nothing_else(change, message):
    values = width_config(64).to_dict()
    values["model"] |= change
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_the_published_rate_of_a_size_is_not_taken_for_the_bases():
    with pytest.raises(ConfigError, match="optimizer.learning_rate is absent"):
        width_config(64, optimizer={"learning_rate": None})


def test_muon_with_heads_of_another_size_than_the_bases_is_refused():
    muon = {"name": "muon"}
    with pytest.raises(ConfigError, match="muon with heads of 64 numbers, 16 at the base"):
        width_config(128, num_heads=2, optimizer=muon)
    width_config(128, num_heads=2, qk_norm=True, optimizer=muon)


def test_a_step_of_refinement_needs_no_factor_of_the_width():
    """What a converted or evaluated model computes follows from its weights alone."""
    config = width_config(WIDTHS[0])
    model = new_model(config)
    standard = config.replace(model=config.model.replace(parametrization="standard"))
    other = WorldModel(standard)
    other.load_state_dict(model.state_dict())
    assert run(model.eval()).loss.item() == run(other.eval()).loss.item()
