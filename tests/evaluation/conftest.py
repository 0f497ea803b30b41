"""A world of walks, once for all tests of imagination."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))

from ebwm_scale.data.prepare.worlds.columns import ColumnConfig
from ebwm_scale.data.prepare.worlds.config import WorldDatasetConfig
from ebwm_scale.data.prepare.worlds.dataset import make_world_dataset
from ebwm_scale.data.prepare.worlds.opening import open_source
from ebwm_scale.data.prepare.worlds.source import Wanted


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The manifest of a dataset of walks of 10 steps, its held-out ones whole: patches 2 x 2."""
    from imagined_worlds import LENGTH
    from worlds import walk

    folder = tmp_path_factory.mktemp("world")
    (folder / "walks").mkdir()
    for seed in range(8):
        frames, moves, places = walk(LENGTH, seed=seed)
        np.savez(
            folder / "walks" / f"{seed}.npz",
            frames=frames,
            action=moves[:, None].astype(np.int64),
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
