"""Models of the world of walks, and its held-out split."""

import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel

LENGTH = 10  # steps of an episode
SETTINGS = {"horizons": [1, 2, 4, 16], "max_windows": 6, "batch_size": 4, "seed": 3}


def model_of(manifest, **model):
    config = config_from_dict(
        {
            "model": {"num_layers": 1, "width": 32, "num_heads": 2, **model},
            "state": {"kind": "embedding", "initial": "most_recent"},
            "refinement": {"step_size": 3.0},
            "data": {"manifest": str(manifest)},
        }
    )
    torch.manual_seed(0)
    return WorldModel(fill_from_data(config, load_manifest(manifest))).eval()


def opened(manifest):
    split = open_split(manifest, "validation", verify="sizes")
    return split, Observation(split.manifest, "cpu")
