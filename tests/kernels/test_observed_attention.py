"""The observed stream takes flash-attn where it can run, says why where it cannot, and computes
causal attention either way.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from ebwm_kernels import observed_attention
from ebwm_kernels import observed_attention as function
from ebwm_kernels.attention.causal import causal_attention_definition

module = sys.modules["ebwm_kernels.attention.first_order"]


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, 7, 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]


def test_it_is_causal_attention_with_shared_heads():
    torch.testing.assert_close(
        observed_attention(*tensors()), causal_attention_definition(*tensors())
    )


def test_flash_attn_is_called_as_its_documentation_says(monkeypatch):
    """(B, S, H, d), heads shared by itself, causal; a stand-in with flash-attn's signature, since
    it needs a GPU.
    """

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.shape == (2, 7, 4, 16) and k.shape == v.shape == (2, 7, 2, 16)
        return F.scaled_dot_product_attention(
            *(u.transpose(1, 2) for u in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(module, "why_not_flash_attn", lambda *_: None)
    torch.testing.assert_close(
        function(*tensors(), backend="flash_attn"), observed_attention(*tensors(), backend="sdpa")
    )


@pytest.mark.parametrize(
    "device, dtype, d, reason",
    [
        ("cpu", torch.bfloat16, 64, "needs a GPU"),
        ("cuda", torch.bfloat16, 64, "not installed"),
    ],
)
def test_what_keeps_flash_attn_from_running_is_said(device, dtype, d, reason, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert reason in module.why_not_flash_attn(torch.device(device), dtype, d)


def test_limits_of_flash_attn(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    on_gpu = torch.device("cuda")
    assert module.why_not_flash_attn(on_gpu, torch.bfloat16, 64) is None
    assert "float16 and bfloat16" in module.why_not_flash_attn(on_gpu, torch.float32, 64)
    assert "multiples of 8" in module.why_not_flash_attn(on_gpu, torch.float16, 20)


def test_a_backend_that_is_unknown_or_cannot_run_is_refused():
    with pytest.raises(ValueError, match="backend is 'fast'; allowed: auto, flash_attn, sdpa"):
        observed_attention(*tensors(), backend="fast")
    with pytest.raises(
        ValueError,
        match="cannot run torch.float64, head dimension 16 on cpu: it needs a GPU; "
        "use backend auto or sdpa",
    ):
        observed_attention(*tensors(), backend="flash_attn")
