"""Denormal numbers as zero: the tails of a softmax over a vocabulary are denormal, and 100 times
slower to multiply.
"""

from __future__ import annotations

import numpy as np
import torch


def flush_denormals() -> None:
    """From here on.

    NumPy looks for the smallest denormal when it is first asked about a type and warns if there is
    none: it is asked before.
    """
    np.finfo(np.float32)
    np.finfo(np.float64)
    torch.set_flush_denormal(True)
