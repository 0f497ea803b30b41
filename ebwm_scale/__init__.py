"""ebwm_scale: pretraining of energy-based world models and Energy-Based Transformers.

import ebwm_scale
model, config = ebwm_scale.load_checkpoint("runs/quickstart")
"""

import os
from typing import Literal

# Threads of OpenMP that wait for work sleep. By default they spin, and a training beside other work
# takes several times as long. Read when torch is loaded; what the user has set is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"


def load_checkpoint(path, *, device="cpu", weights: Literal["trained", "ema"] = "trained"):
    """(model in eval mode, Config) of a run folder or a checkpoint folder:
    ebwm_scale/checkpoint/load.py. weights: trained, or ema for their average.
    """
    from ebwm_scale.checkpoint.load import load_checkpoint as load

    return load(path, device=device, weights=weights)
