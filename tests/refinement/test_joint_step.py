"""A whole training step whose attention runs in Triton, each layer's two backwards in one pass,
gives the loss and gradients of the reference, in float64 to 1e-10: in Triton's interpreter.
"""

import pytest
import torch
from test_fused_step import OBSTACLE, step

from ebwm_kernels.attention import ops

# Triton has wheels for Linux x86-64 alone, and there the test extra brings it.
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")
# Name in test_fused_step.OPTIONS -> passes of two layers and two steps that join.
JOINED = {
    "default": 4,
    "block by block, shared keys": 4,
    "a step computed again": 4,
    "full graph": 4,
    "the context alone": 0,
}
QUICK = "default"


@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.soak) for name in JOINED],
)
def test_the_gradients_are_those_of_the_reference(name, monkeypatch):
    monkeypatch.setattr("ebwm_scale.model.fused.runs_fused", lambda *_: False)
    joined = []
    right = ops.joined_backward

    def counted(waiting, *rest, **options):
        joined.append(len(waiting))
        return right(waiting, *rest, **options)

    monkeypatch.setattr(ops, "joined_backward", counted)
    ours, plain = step(name, "triton"), step(name, "reference")
    assert joined == [1] * JOINED[name]
    for mine, theirs in zip(ours, plain, strict=True):
        rounding = 1e-10 * float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=rounding)
