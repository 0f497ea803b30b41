"""ebwm_scale: pretraining of energy-based world models and Energy-Based Transformers.

import ebwm_scale
model, config = ebwm_scale.load_checkpoint("runs/quickstart")
"""

__version__ = "0.1.0"


def load_checkpoint(path, *, device="cpu"):
    """(model in eval mode, Config) of a run folder or a checkpoint folder:
    ebwm_scale/checkpoint/load.py.
    """
    from ebwm_scale.checkpoint.load import load_checkpoint as load

    return load(path, device=device)
