"""ebwm_scale: pretraining of energy-based world models and Energy-Based Transformers.

import ebwm_scale
model, config = ebwm_scale.load_checkpoint("runs/quickstart")
"""

import os
from typing import Literal

# Threads of OpenMP that wait for work spin for a moment and then sleep. By default they spin for
# long, and a training beside other work takes several times as long. Where they sleep at once, a
# model of small operations can take ten times as long on a machine of its own, for each of them
# wakes a thread. Read when torch is loaded; what the user has set is kept.
SPINS = "1000"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if os.environ["OMP_WAIT_POLICY"].lower() == "passive":
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

__version__ = "0.1.0"


def load_checkpoint(path, *, device="cpu", weights: Literal["trained", "ema"] = "trained"):
    """(model in eval mode, Config) of a run folder or a checkpoint folder:
    ebwm_scale/checkpoint/load.py. weights: trained, or ema for their average.
    """
    from ebwm_scale.checkpoint.load import load_checkpoint as load

    return load(path, device=device, weights=weights)
