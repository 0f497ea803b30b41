"""The observed stream takes flash-attn where it can run, says why where it cannot, and computes
causal attention either way.
"""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from ebwm_kernels import observed_attention
from ebwm_kernels import observed_attention as function
from ebwm_kernels.attention import packed_documents
from ebwm_kernels.attention.causal import causal_attention_definition
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.model import attention_paths

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

    use_flash_attn(monkeypatch, flash_attn_func=flash_attn_func)
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
    with pytest.raises(
        ValueError, match="backend is 'fast'; allowed: auto, flash_attn, flex, sdpa"
    ):
        observed_attention(*tensors(), backend="fast")
    with pytest.raises(
        ValueError,
        match="cannot run torch.float64, head dimension 16 on cpu: it needs a GPU; "
        "use backend auto or sdpa",
    ):
        observed_attention(*tensors(), backend="flash_attn")


def documents() -> torch.Tensor:
    return torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 6]], dtype=torch.int32)


MASKS = [
    {"group_size": 7},
    {"first_visible": documents()},
    {"window": 2},
    {"first_visible": documents(), "window": 3},
]


@pytest.mark.parametrize("options", MASKS, ids=["group", "documents", "window", "both"])
def test_groups_documents_and_windows_are_those_of_the_definition(options):
    expected = causal_attention_definition(*tensors(), **options)
    torch.testing.assert_close(observed_attention(*tensors(), **options), expected)
    assert not torch.allclose(observed_attention(*tensors()), expected)


@pytest.mark.parametrize("options", MASKS, ids=["group", "documents", "window", "both"])
def test_the_mask_given_to_flex_attention_is_the_same(options, monkeypatch):
    """Uncompiled, on a CPU: the launch itself was never run."""
    from torch.nn.attention import flex_attention

    eager = (flex_attention.flex_attention, flex_attention.create_block_mask)
    monkeypatch.setattr(module, "_compiled_flex", lambda: eager)
    monkeypatch.setattr(module, "why_not_flex", lambda *_: None)
    inputs = [u.float() for u in tensors()]
    torch.testing.assert_close(
        observed_attention(*inputs, **options, backend="flex"),
        observed_attention(*inputs, **options, backend="sdpa"),
    )


def use_flash_attn(monkeypatch, **functions) -> None:
    """Functions with the signatures of flash-attn 2.8, which needs a GPU, in its place."""
    stand_in = ModuleType("flash_attn")
    for name, stub in functions.items():
        setattr(stand_in, name, stub)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(module, "why_not_flash_attn", lambda *_: None)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """Sequences of rows (rows, H, d) one after the other, each alone."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    bounds = cu_seqlens_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(q) == len(k)
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert min(lengths) > 0 and max(lengths) == max_seqlen_q == max_seqlen_k
    assert causal and dropout_p == 0 and window_size[1] <= 0
    window = None if window_size == (-1, -1) else window_size[0] + 1
    outputs = []
    for start, end in itertools.pairwise(bounds):
        alone = [u[start:end].transpose(0, 1)[None] for u in (q, k, v)]
        outputs.append(causal_attention_definition(*alone, window=window)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_flash_attn_is_given_documents_as_sequences_of_their_lengths(backend, window, monkeypatch):
    options = {"first_visible": documents(), "window": window}
    expected = observed_attention(*tensors(), **options, backend="sdpa")
    gradients = []
    for chosen in ("sdpa", backend):
        inputs = [u.requires_grad_() for u in tensors()]
        with monkeypatch.context() as patch:
            if chosen != "sdpa":
                use_flash_attn(patch, flash_attn_varlen_func=flash_attn_varlen_func)
            out = observed_attention(*inputs, **options, backend=chosen)
        torch.testing.assert_close(out, expected)
        gradients.append(torch.autograd.grad(out.sin().sum(), inputs))
    torch.testing.assert_close(*gradients)


def test_the_devices_lengths_are_read_once_for_all_layers(monkeypatch):
    use_flash_attn(monkeypatch, flash_attn_varlen_func=flash_attn_varlen_func)
    found = []
    right = packed_documents._find
    monkeypatch.setattr(packed_documents, "_find", lambda x: found.append(x) or right(x))
    first_visible = documents()
    for _ in range(3):
        observed_attention(*tensors(), first_visible=first_visible)
    assert len(found) == 1
    first_visible[0, 3:] = 0  # one document: what was found before is of another mask
    changed = observed_attention(*tensors(), first_visible=first_visible)
    assert len(found) == 2
    expected = causal_attention_definition(*tensors(), first_visible=first_visible)
    torch.testing.assert_close(changed, expected)


def test_flash_attn_gets_a_window_and_is_refused_what_it_does_not_know(monkeypatch):
    asked = []

    def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
        asked.append((causal, window_size))
        return q

    use_flash_attn(monkeypatch, flash_attn_func=flash_attn_func)
    observed_attention(*tensors(), window=3)
    assert asked == [(True, (2, 0))]
    sliding = torch.tensor([[0, 0, 1, 2, 3, 4, 5]] * 2, dtype=torch.int32)
    for options in ({"first_visible": sliding}, {"group_size": 7}):
        with pytest.raises(ValueError, match="flash_attn cannot run .* it knows no groups"):
            observed_attention(*tensors(), **options, backend="flash_attn")
        torch.testing.assert_close(
            observed_attention(*tensors(), **options),
            causal_attention_definition(*tensors(), **options),
        )


def test_a_gpu_without_flash_attn_takes_flex_for_what_is_masked(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    where = ("auto", torch.device("cuda"), torch.bfloat16, 64)
    assert module.resolve_observed_backend(*where) == "sdpa"
    assert module.resolve_observed_backend(*where, is_masked=True) == "flex"
    assert module.resolve_observed_backend(*where, is_windowed=True) == "flex"
    assert module.resolve_observed_backend(*where, has_documents=True) == "flex"
    assert (
        module.resolve_observed_backend("auto", torch.device("cuda"), torch.float64, 64) == "sdpa"
    )


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="7 queries in groups of group_size 2"):
        observed_attention(*tensors(), group_size=2)


def test_a_run_says_which_path_computes_its_documents(monkeypatch):
    config = config_from_dict({"model": {"size": "4xs"}}).model
    gpu, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(attention_paths, "resolve_backend", lambda *_: "triton")
    monkeypatch.setattr(attention_paths, "why_not_triton", lambda *_: None)

    def path(**options) -> str:
        return attention_paths.attention_paths(config, gpu, half, **options)["observed"]

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert path() == "flash_attn"
    assert path(has_documents=True) == "flash_attn (a sequence per document)"
    assert path(has_groups=True).startswith("flex (flash_attn: it knows no groups")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert path(has_documents=True).startswith("flex (flash_attn: flash-attn is not installed")
