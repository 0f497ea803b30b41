"""Tasks on grids from shards to what is solved: a tiny model learns them, its weights read a larger
grid, and both kinds are evaluated by exact solution.
"""

import pytest
import torch

from ebwm_scale.checkpoint.comparison import behaviour
from ebwm_scale.checkpoint.released_ebt import hparams_of
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError, UserError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.evaluation.solving import evaluate_solving
from ebwm_scale.inference.samples import samples_to_look_at
from ebwm_scale.inference.scoring import Scorer
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.dry_run import measure_step, part_of
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel


@pytest.fixture(scope="module")
def mazes(tmp_path_factory):
    """The manifests of mazes of 3 x 3, and of 4 x 4 cells."""
    return make_reasoning_dataset(
        "reachability",
        tmp_path_factory.mktemp("tasks") / "mazes",
        sizes=[3],
        larger=[4],
        num_train=32,
        num_validation=8,
        report=lambda line: None,
    )


def model_of(manifest, **changes):
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model": {
                "num_layers": 1,
                "width": 24,
                "num_heads": 2,
                "predicted_input": "anchored",
                **changes,
            },
            "state": {"initial": "zeros", "map_scale": 10},
            "refinement": {"num_steps": 2, "step_size": 2, "update": "mirror", "graph": "full"},
        }
    )
    config = fill_from_data(config, load_manifest(manifest))
    return WorldModel(config), config


def solved(model, config, manifest):
    split = open_split(manifest, "validation", verify="sizes")
    return evaluate_solving(model.eval(), config, split, max_samples=8, batch_size=8, steps=[1])


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_a_tiny_model_learns_mazes_and_its_weights_read_larger_ones(mazes, kind):
    model, config = model_of(mazes[0], kind=kind)
    before = solved(model, config, mazes[0])
    split = open_split(mazes[0], "train", verify="sizes")
    ids = torch.arange(32)
    stored = torch.stack([torch.from_numpy(split.read(i)) for i in ids.tolist()])
    observed, targets = Observation(split.manifest, "cpu")(stored)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    losses = []
    for step in range(12):
        loss = model(observed, targets, sample_ids=ids, source=NoiseSource(1, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    after = solved(model, config, mazes[0])
    last = [result["steps"][-1] for result in (before, after)]
    assert last[1]["loss"]["mean"] < 0.9 * last[0]["loss"]["mean"]
    assert last[1]["accuracy"]["mean"] > last[0]["accuracy"]["mean"]
    larger = solved(model, config, mazes[1])
    assert larger["grid"] == (4, 4) and model.network.group_size == 16
    again = solved(model, config, mazes[0])  # and back
    assert again["steps"] == after["steps"]


def test_what_else_reads_a_model_takes_whole_groups_or_says_no(mazes):
    model, config = model_of(mazes[0])
    found = behaviour(config, {name: p.detach() for name, p in model.named_parameters()})
    assert found["loss"].isfinite() and "gradient of state_map" in found
    assert measure_step(config, 2, lambda line: None) > 0
    longer = config.replace(data=config.data.replace(context_length=36))
    assert part_of(longer, 1, 1.0).config.data.context_length == 9  # never less than a group
    split = open_split(mazes[0], "validation", verify="sizes")
    assert samples_to_look_at(model, split, seed=0) == {"continuations": []}
    with pytest.raises(UserError, match="predicts groups of tokens"):
        Scorer(model, None)
    with pytest.raises(ConfigError, match=r"data.group_size is 9 \(only groups of 1\)"):
        hparams_of(config)
