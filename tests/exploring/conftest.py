"""Small runs for an explorer: untrained energy models and Transformer++, of text and of mazes."""

import argparse
import random

import pytest
import torch

from ebwm_scale import explore
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel

LENGTH = 16


@pytest.fixture(scope="session")
def text_manifest(tmp_path_factory):
    """Every byte is a token."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    (folder / "corpus").mkdir()
    for number in range(3):
        words = (generator.choice(["abc", "def", "gh", "ij"]) for _ in range(300))
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(words))
    return make_text_dataset(
        [folder / "corpus"],
        folder / "d",
        tokenizer="bytes",
        context_length=LENGTH,
        report=lambda _: None,
    )


@pytest.fixture(scope="session")
def maze_manifest(tmp_path_factory):
    (manifest,) = make_reasoning_dataset(
        "reachability",
        tmp_path_factory.mktemp("tasks") / "mazes",
        sizes=[3],
        num_train=4,
        num_validation=6,
        report=lambda line: None,
    )
    return manifest


def model_of(manifest, *, seed=0, **model):
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "width": 24, "num_heads": 2, "predicted_input": "anchored"}
    config = config_from_dict(
        {
            "model": {**sizes, **model},
            "state": {"initial": "random_noise"},
            "refinement": {"step_size": 3.0, "num_steps": 3},
            "data": {"manifest": str(manifest)},
        }
    )
    config = fill_from_data(config, load_manifest(manifest))
    return WorldModel(config).eval(), config


@pytest.fixture
def runs(monkeypatch, text_manifest, maze_manifest):
    """Models by a name that stands for a run folder; a test may add others."""
    known = {
        "text": model_of(text_manifest),
        "second": model_of(text_manifest, seed=1),
        "plain": model_of(text_manifest, seed=2, kind="baseline"),
        "mazes": model_of(maze_manifest),
        "plain_mazes": model_of(maze_manifest, seed=2, kind="baseline"),
    }
    monkeypatch.setattr(explore, "load_checkpoint", lambda path, device: known[str(path)])
    return known


@pytest.fixture
def opened(runs):
    """opened("text", "--prompt", "abc"): the explorer that a command line opens."""

    def open_it(*arguments):
        options: argparse.Namespace = explore.parser().parse_args(list(arguments))
        return explore.opened(options)

    return open_it
