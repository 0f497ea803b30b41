"""Small untrained runs for an explorer: text, tasks, worlds and video, and how they are made."""

import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))

from worlds import MOVES, walk, write_world

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.prepare.worlds.columns import ColumnConfig
from ebwm_scale.data.prepare.worlds.config import WorldDatasetConfig
from ebwm_scale.data.prepare.worlds.dataset import make_world_dataset
from ebwm_scale.data.prepare.worlds.opening import open_source
from ebwm_scale.data.prepare.worlds.source import Wanted
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel

LENGTH = 16  # tokens of the context of text
NUM_STEPS = 10  # of an episode


def text_dataset(folder):
    """Every byte is a token."""
    generator = random.Random(0)
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


def task_dataset(folder, family, size):
    (manifest,) = make_reasoning_dataset(
        family,
        folder / family,
        sizes=[size],
        num_train=4,
        num_validation=6,
        report=lambda line: None,
    )
    return manifest


def world_dataset(folder, *, discrete=False, name="walk"):
    """Walks whose held-out ones are kept whole: frames of 2 x 2 patches, actions and places.

    discrete: actions are ids; otherwise two numbers, the move in pixels.
    """
    (folder / "walks").mkdir()
    for seed in range(6):
        frames, moves, places = walk(NUM_STEPS, seed=seed)
        actions = moves[:, None].astype(np.int64) if discrete else MOVES[moves].astype(np.float32)
        np.savez(
            folder / "walks" / f"{name}-{seed}.npz",
            frames=frames,
            action=actions,
            proprio=places[:-1].astype(np.float32),
        )
    config = WorldDatasetConfig(
        context_length=4,
        height=16,
        width=16,
        encoder="raw",
        encoder_settings={"patch": 8},
        validation_fraction=0.5,
        stride=1,
        columns=ColumnConfig(conditions=("action", "proprio")),
    )
    wanted = Wanted(conditions=("action", "proprio"))
    source = open_source(str(folder / "walks"), wanted, report=lambda _: None)
    return make_world_dataset(
        source, wanted, folder / "dataset", config, workers=1, report=lambda _: None
    )


def video_dataset(folder, *, stored="jpeg"):
    """Clips of 5 frames without actions."""
    return write_world(
        folder / "clips",
        num_clips=16,
        stored=stored,
        proprio=False,
        outcomes=False,
        changes={"conditions": []},
    )


def model_of(manifest, *, seed=0, workspace=None, **model):
    """A fresh tiny model of a dataset of text or of tasks, and its configuration."""
    sizes = {"num_layers": 1, "width": 24, "num_heads": 2, "predicted_input": "anchored"}
    state = {"initial": "random_noise", "workspace": workspace}
    return _model_of(manifest, seed, {**sizes, **model}, state, {"num_steps": 3, "step_size": 3.0})


def frame_model_of(manifest, *, seed=0, initial="random_noise", refinement=None, **model):
    """The same of a dataset of frames."""
    sizes = {"num_layers": 1, "width": 24, "num_heads": 2}
    state = {"kind": "embedding", "initial": initial}
    refinement = {"num_steps": 3, "step_size": 3.0, **(refinement or {})}
    return _model_of(manifest, seed, {**sizes, **model}, state, refinement)


def _model_of(manifest, seed, model, state, refinement):
    torch.manual_seed(seed)
    sections = {
        "model": model,
        "state": state,
        "refinement": refinement,
        "data": {"manifest": str(manifest)},
    }
    if model.get("kind") == "baseline" and "kind" in state:
        sections |= {"state": {"kind": "embedding"}}
        del sections["refinement"]
    config = fill_from_data(config_from_dict(sections), load_manifest(manifest))
    return WorldModel(config).eval(), config
