"""A whole step with fused operations is no further from the exact one than 1.5 times plain PyTorch,
in float32, bfloat16 and under autocast: tools/check_fused_step.py, whose result file says so of
every form. Which rounding a step magnifies differs between models, so what is held is the median of
many.
"""

import json
from pathlib import Path

import pytest
import torch

from ebwm_kernels.fused import norm as fused_norm
from ebwm_kernels.fused.launches import why_not_fused

# The test extra installs Triton where it has wheels, on Linux x86-64; elsewhere nothing is fused.
OBSTACLE = why_not_fused(torch.device("cpu"), torch.float64)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "fused_step_errors.json"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_fused_step

    return check_fused_step


def test_a_step_in_bfloat16_under_autocast_too_rounds_as_plain_pytorch_does(tool):
    found = tool.errors("Transformer++", "bfloat16", 1)
    assert tool.within_limit(found, torch.bfloat16), found
    found = tool.errors("Transformer++", "autocast", 1)
    assert tool.within_limit(found, torch.bfloat16), found


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    "form", ["default", "adaln, logits, clamped", "full graph, mirror", "candidates"]
)
def test_a_step_of_every_form_rounds_as_plain_pytorch_does(tool, form, precision):
    found = tool.errors(form, precision, 24)  # of a few models chance decides
    multiplied_in = torch.float32 if precision == "float32" else torch.bfloat16
    assert tool.within_limit(found, multiplied_in), found


def test_the_result_file_holds_every_form_within_its_limit(tool):
    found = json.loads(RESULTS.read_text())
    rows = found["steps"]
    assert found["seeds"] >= 24
    assert {row["form"] for row in rows} == set(tool.FORMS)
    assert {row["precision"] for row in rows} >= {"float32", "bfloat16", "autocast"}
    for row in rows:
        assert row["right"] and row["gradients"] <= tool.LIMIT * row["plain_gradients"], row


def test_a_norm_that_is_two_hundredths_off_is_noticed(tool, monkeypatch):
    right = fused_norm.forward

    def wrong(*x, **o):
        y, total = right(*x, **o)
        return 1.02 * y, total

    monkeypatch.setattr(fused_norm, "forward", wrong)
    found = tool.errors("Transformer++", "bfloat16", 1)
    assert not tool.within_limit(found, torch.bfloat16)
