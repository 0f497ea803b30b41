"""A compiled refinement step gives the gradients of the eager one, whose own are held against plain
autograd in plain_autograd.py.
"""

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.refinement import inner_gradient
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel


def gradients(compiled: bool, options: dict):
    config = config_from_dict(
        {
            "model": {
                "num_layers": 1,
                "width": 16,
                "num_heads": 2,
                "vocabulary_size": 13,
                **options.get("model", {}),
            },
            "refinement": {"step_size": 3.0, "compile": compiled, **options.get("refinement", {})},
            "data": options.get("data", {}),
        }
    )
    torch.manual_seed(1)
    model = WorldModel(config).double()
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(2))
    size = options.get("data", {}).get("group_size", 1)
    loss = model(
        tokens[:, :-size],
        tokens[:, size:],
        sample_ids=torch.tensor([3, 5]),
        source=NoiseSource(1, 2),
    ).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refinement": {"graph": "full", "loss": "last"}},
        pytest.param(
            {
                "model": {
                    "num_layers": 2,
                    "predicted_layers": 1,
                    "predicted_input": "anchored",
                    "energy_head": ["linear", "quadratic", "bilinear", "context"],
                },
                "refinement": {"num_steps": 1},
            },
            marks=pytest.mark.soak,
        ),
        pytest.param(
            {"model": {"conditioning": "adaln", "num_kv_heads": 1}, "refinement": {"tile_rows": 3}},
            marks=pytest.mark.soak,
        ),  # compiles for four shapes
        pytest.param({"data": {"mask_documents": True, "eos_id": 12}}, marks=pytest.mark.soak),
        pytest.param(
            {"data": {"group_size": 2}, "model": {"num_heads": 2}}, marks=pytest.mark.soak
        ),
    ],
    ids=["detach", "full", "heads_of_a_shallow_stream", "adaln_in_tiles", "documents", "groups"],
)
@pytest.mark.multiprocess
def test_a_compiled_step_has_the_gradients_of_the_eager_one(options):
    torch._dynamo.reset()
    (loss, ours), (eager_loss, eager) = gradients(True, options), gradients(False, options)
    torch.testing.assert_close(loss, eager_loss, rtol=1e-12, atol=0)
    largest = max(g.abs().max() for g in eager.values() if g is not None)
    for name, expected in eager.items():
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=1e-9,
            atol=float(1e-12 * largest),
            msg=lambda text: f"{name}: {text}",
        )


@pytest.mark.multiprocess
def test_the_comparison_notices_a_compiled_step_whose_inner_gradient_has_no_graph(monkeypatch):
    right = inner_gradient._compiled()
    monkeypatch.setattr(
        inner_gradient,
        "_compiled",
        lambda: lambda *a: (lambda energy, g: (energy, g.detach() + 0 * energy.sum()))(*right(*a)),
    )
    with pytest.raises(AssertionError):
        test_a_compiled_step_has_the_gradients_of_the_eager_one({})


def test_compiling_and_checkpointing_together_are_refused():
    with pytest.raises(
        ConfigError, match="refinement.compile is true with refinement.recompute step"
    ):
        config_from_dict({"refinement": {"compile": True, "checkpoint": "step"}})
