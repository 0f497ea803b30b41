"""Groups, documents, windows, values of another dimension: attention is its definition to second
order, and what a row does not see does not reach it.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from attention_cases import Case, derivatives
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ebwm_kernels.attention.flops
from ebwm_kernels import causal_attention, cross_attention, energy_attention
from ebwm_kernels.attention import ops, reference, row_blocks
from ebwm_kernels.attention.causal import causal_attention_definition
from ebwm_kernels.attention.energy import energy_attention_definition
from ebwm_kernels.attention.row_blocks import ROWS, block_rows, blocks
from ebwm_kernels.attention.tensors import Cotangents, Inputs
from ebwm_kernels.attention.visibility import Shape, visible_keys, visible_pairs

BITS = Path(__file__).with_name("attention_bits.safetensors")


class Seen(NamedTuple):
    """S queries in groups of n, C keys in groups of m; documents: how many, per sample."""

    n: int
    m: int
    S: int
    C: int
    offset: int = 0
    documents: int = 0
    window: int | None = None
    B: int = 2
    d: int = 4
    d_v: int = 4

    def options(self) -> dict:
        options = {
            "group_size": self.n,
            "context_group": self.m,
            "context_offset": self.offset,
            "window": self.window,
        }
        if self.documents:
            options["first_visible"] = self.first_visible()
        return options

    def first_visible(self) -> torch.Tensor:
        """Starts of documents inside groups as well: each row's own key is the latest."""
        generator = torch.Generator().manual_seed(self.S)
        last = ((torch.arange(self.S) // self.n + 1) * self.m + self.offset).clamp(max=self.C)
        samples = []
        for _ in range(self.B):
            starts = torch.randint(1, self.C, (self.documents,), generator=generator).tolist()
            first = torch.zeros(self.S, dtype=torch.int32)
            for start in sorted(starts):
                first[last > start] = start
            samples.append(first)
        return torch.stack(samples)

    def inputs(self, own: bool) -> list[torch.Tensor]:
        """q [, k_self, v_self], K, V with two heads that share one key head."""
        generator = torch.Generator().manual_seed(1)
        sizes = [(self.B, 2, self.S, self.d)]
        if own:
            sizes += [(self.B, 2, self.S, self.d), (self.B, 2, self.S, self.d_v)]
        sizes += [(self.B, 1, self.C, self.d), (self.B, 1, self.C, self.d_v)]
        draw = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
        return [u.requires_grad_() for u in draw]


CASES = [
    Seen(1, 1, 5, 5, documents=1),
    Seen(1, 1, 5, 5, window=2),
    Seen(1, 1, 1, 1),
    Seen(1, 1, 70, 72, offset=2, documents=3),
    Seen(1, 1, 130, 130, documents=2, window=40),
    Seen(1, 2, 6, 12),
    Seen(3, 3, 3, 3),
    Seen(3, 3, 12, 12, documents=2),
    Seen(3, 3, 66, 66, window=7),
    Seen(3, 5, 12, 21, offset=1, documents=2, window=9),
    Seen(3, 2, 9, 4),
    Seen(16, 16, 80, 80, documents=3),
    Seen(16, 16, 16, 16, d_v=6),
    Seen(37, 37, 74, 76, offset=2, documents=2),
    Seen(37, 40, 74, 80, window=60),
    Seen(196, 196, 196, 196, B=1),
    Seen(196, 196, 392, 392, documents=2, B=1),
    Seen(196, 198, 392, 396, window=250, B=1, d_v=2),
]
SMALL = [
    Seen(1, 1, 4, 5, offset=1, documents=2, d_v=3),
    Seen(1, 1, 4, 4, window=2),
    Seen(3, 3, 3, 3),
    Seen(3, 2, 6, 5, offset=1, documents=2),
    Seen(3, 3, 6, 6, window=4, d_v=2),
]
OWN = pytest.mark.parametrize("own", [True, False], ids=["energy", "causal"])


def pair(own: bool):
    """(operation, definition)."""
    if own:
        return energy_attention, energy_attention_definition
    return causal_attention, causal_attention_definition


def check(case: Seen, own: bool) -> None:
    attention, definition = pair(own)
    options = case.options()
    ours = derivatives(lambda *x: attention(*x, **options, backend="reference"), case.inputs(own))
    plain = derivatives(lambda *x: definition(*x, **options), case.inputs(own))
    for mine, theirs in zip(ours, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@OWN
@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_documents_and_windows_equal_plain_autograd_to_second_order(case, own):
    check(case, own)


@OWN
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(case, own):
    attention, _ = pair(own)
    options = case._replace(B=1).options()

    def function(*inputs):
        return attention(*inputs, **options, backend="reference")

    inputs = case._replace(B=1).inputs(own)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@OWN
@pytest.mark.parametrize("case", [*SMALL, Seen(37, 40, 74, 80, documents=2)], ids=str)
def test_the_tangent_is_forward_mode_of_the_definition(case, own):
    _, definition = pair(own)
    options = case.options()
    inputs = [u.detach() for u in case.inputs(own)]
    tangents = [u.sin() for u in inputs]
    _, expected = torch.func.jvp(
        lambda *x: definition(*x, **options), tuple(inputs), tuple(tangents)
    )
    q, *self_pair, k, v = inputs
    a, *self_tangents, b, c = tangents
    self_pair = self_pair or [None, None]
    self_tangents = self_tangents or [None, None]
    shape = Shape(case.d**-0.5, case.offset, True, case.n, case.m)
    first = ebwm_kernels.attention.visibility.first_visible_keys(
        "test", q, case.C, options.get("first_visible"), case.window, shape, own=own
    )
    point = Inputs(q, k, v, *self_pair, first)
    output = reference.forward(point, shape)
    moved = reference.tangent(Cotangents(a, b, c, *self_tangents), point, output, shape)
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)


def spoil(mechanism: str, monkeypatch) -> None:
    Block = row_blocks.Block
    if mechanism == "own group":
        right_own = Block._own
        monkeypatch.setattr(Block, "_own", lambda self, own: right_own(self, own).roll(1, 0))
    elif mechanism == "lower bound":
        right_early = Block._too_early
        monkeypatch.setattr(Block, "_too_early", lambda self, x: right_early(self, x) & False)
    elif mechanism == "block-causal bound":
        right_last = row_blocks.last_visible
        monkeypatch.setattr(row_blocks, "last_visible", lambda *x: right_last(x[0], x[1], x[2]) - 1)
    else:
        right_start = Block.__init__

        def skip_one_more(self, *arguments):
            right_start(self, *arguments)
            self.first_key = min(self.first_key + 1, self.last_key - 1)

        monkeypatch.setattr(Block, "__init__", skip_one_more)


@pytest.mark.parametrize(
    "mechanism", ["own group", "lower bound", "block-causal bound", "skipped keys"]
)
def test_the_comparison_notices_a_broken_mechanism(mechanism, monkeypatch):
    case = Seen(3, 3, 12, 12, documents=2)
    check(case, own=True)
    spoil(mechanism, monkeypatch)
    with pytest.raises(AssertionError):
        check(case, own=True)


def test_keys_that_a_block_does_not_see_are_not_multiplied():
    first = torch.zeros(2, 4 * ROWS, dtype=torch.int32)
    first[:, 2 * ROWS :] = 2 * ROWS - 5
    seen = [
        (block.first_key, block.last_key)
        for block in blocks(4 * ROWS, 4 * ROWS, first, Shape(1.0, 0, True))
    ]
    skipped = 2 * ROWS - 5
    assert seen == [(skipped, 4 * ROWS), (skipped, 3 * ROWS), (0, 2 * ROWS), (0, ROWS)]


@pytest.mark.parametrize("size", [1, 3, 16, 37, 64, 65, 196])
def test_blocks_hold_whole_groups_or_a_part_of_one_and_every_row_once(size):
    bounds = block_rows(4 * size, size)
    rows = [row for first, last in bounds for row in range(first, last)]
    assert rows == list(range(4 * size))
    for first, last in bounds:
        assert last - first <= ROWS
        whole_groups = first % size == 0 and last % size == 0
        assert whole_groups or first // size == (last - 1) // size


def plain_products() -> dict[str, Tensor]:
    """By name: plain PyTorch of the shapes below, whose bits tell kinds of processors apart."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(7)
        q, k = (
            torch.randn(2, rows, 4, generator=generator, dtype=torch.float64).to(dtype)
            for rows in (66, 68)
        )
        scores = torch.bmm(q, k.mT)
        p = scores.softmax(-1)
        name = str(dtype).split(".")[1]
        found[f"plain.{name}.output"] = torch.bmm(p, k)
        found[f"plain.{name}.keys"] = torch.bmm((p * scores).mT, q)
    return found


def test_one_own_key_per_row_keeps_its_bits():
    """attention_bits.safetensors: outputs and derivatives of the code before there were groups.

    Processors differ in the last bits of products. attention_bits_xeon.safetensors: of a second
    kind, by code whose bits on the first kind are the former's; a machine whose plain products have
    that kind's bits has to have all of them. Others may differ from the first in the last bits.
    """
    second_kind = load_file(BITS.with_name("attention_bits_xeon.safetensors"))
    is_second = all(torch.equal(x, second_kind[name]) for name, x in plain_products().items())
    stored = second_kind if is_second else load_file(BITS)
    cases = {
        "energy": (Case(1, 2, 1, 66, 68, 4, 2), torch.float64),
        "causal": (Case(1, 2, 1, 66, 68, 4, 2, False), torch.float64),
        "all_keys": (Case(1, 2, 2, 5, 9, 4, 0, False, False), torch.float64),
        "half": (Case(1, 2, 1, 66, 66, 4), torch.float16),
        "single": (Case(2, 2, 1, 17, 17, 8), torch.float32),
    }
    for name, (case, dtype) in cases.items():
        inputs = case.inputs(dtype=dtype, seed=3)
        ours = derivatives(lambda *x: case.attention(*x, backend="reference"), inputs)
        for index, tensor in enumerate(ours):
            expected = stored[f"{name}.{index}"]
            last_bits = 0.0 if is_second else 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                tensor,
                expected,
                rtol=0,
                atol=last_bits * float(expected.abs().max()),
                msg=f"{name} {index}",
            )


def test_a_row_that_sees_no_key_gets_zeros_and_gives_no_gradient():
    """What the operations promise where the values of first_visible are not checked."""
    q, k, v = Seen(1, 1, 4, 4, B=1).inputs(own=False)
    first = torch.tensor([[0, 1, 3, 3]], dtype=torch.int32)  # row 2 sees keys before 3
    point = Inputs(q, k, v, None, None, first)
    out = ops.attend(point, Shape(0.5, 0, True), "reference")
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    inner = torch.autograd.grad(out.sin().sum(), [q, k, v], create_graph=True)
    outer = torch.autograd.grad(sum(g.cos().sum() for g in inner), [q, k, v])
    assert all(u.isfinite().all() for u in (*inner, *outer))
    assert not inner[0][:, :, 2].any() and not outer[0][:, :, 2].any()
    point = Inputs(q.detach(), k.detach(), v.detach(), None, None, first)
    _, normalizer = reference.forward(point, Shape(0.5, 0, True))
    assert torch.equal(normalizer.isneginf()[0, 0], torch.tensor([False, False, True, False]))


def test_cross_attention_sees_every_key():
    case = Seen(1, 1, 3, 7, d_v=6)

    def plain(q, k, v):
        scores = case.d**-0.5 * q @ k.mT
        return scores.softmax(-1) @ v

    ours = derivatives(cross_attention, case.inputs(own=False))
    for mine, theirs in zip(ours, derivatives(plain, case.inputs(own=False))):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@OWN
@pytest.mark.parametrize("case", [Seen(3, 5, 12, 21, offset=1, documents=2), Seen(1, 1, 9, 9)])
def test_flops_count_the_pairs_that_exist(case, own):
    attention, _ = pair(own)
    case = case._replace(d_v=6)
    options = case.options()
    shape = Shape(1.0, case.offset, True, case.n, case.m)
    mask = visible_keys(case.S, case.C, options.get("first_visible"), shape, torch.device("cpu"))
    pairs = int(mask.sum()) * (1 if mask.ndim == 3 else case.B)
    assert visible_pairs(case.S, case.C, case.offset, True, case.n, case.m) == int(
        visible_keys(case.S, case.C, None, shape, torch.device("cpu")).sum()
    )
    if own and case.n > 1:
        pairs += case.B * case.S * case.n
    counter = FlopCounterMode(display=False)
    with counter:
        attention(*case.inputs(own), **options)
    assert counter.get_total_flops() == 2 * 2 * pairs * (case.d + case.d_v)


@pytest.mark.parametrize("own", [True, False])
def test_counted_products_are_those_that_are_made(own, monkeypatch):
    """ops.PRODUCTS of the reference, by counting calls of a single block."""
    case = Seen(1, 1, 4, 4)
    q, *self_pair, k, v = (u.detach() for u in case.inputs(own))
    self_pair = self_pair or [None, None]
    cotangents = Cotangents(q, None, None, *self_pair) if own else Cotangents(q, k, v, None, None)
    shape = Shape(0.5, 0, True)
    made = []
    multiply = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *x, **o: made.append(1) or multiply(*x, **o))
    point = Inputs(q, k, v, *self_pair, None)
    output = reference.forward(point, shape)
    assert len(made) == ops.PRODUCTS["reference"]["forward"]
    for with_keys in (False, True):
        made.clear()
        reference.gradient(q, point, output, shape, with_keys=with_keys)
        assert len(made) == ops.PRODUCTS["reference"]["gradient"][with_keys]
    made.clear()
    reference.double_backward(cotangents, q, point, output, shape)
    assert len(made) == ops.PRODUCTS["reference"]["double_backward"][not own]


BAD = [
    ({"group_size": 4}, "6 queries in groups of group_size 4; the size must divide"),
    ({"group_size": 0}, "group_size is 0; must be 1 or more"),
    ({"context_group": 0}, "context_group is 0; must be 1 or more"),
    ({"group_size": 3, "context_offset": -1}, "context_offset is -1; must be 0 or more"),
    ({"window": 0}, "window is 0; must be 1 or more"),
    ({"first_visible": torch.zeros(2, 6)}, "first_visible is torch.float32; .* integer"),
    ({"first_visible": torch.zeros(2, 6, dtype=torch.bool)}, "first_visible is torch.bool"),
    ({"first_visible": torch.zeros(6, dtype=torch.int32)}, r"shape \(6,\); .* = \(2, 6\)"),
    ({"first_visible": torch.tensor([[0, 0, 2, 1, 3, 3]] * 2)}, "falls from 2 to 1 at row 3"),
    ({"first_visible": torch.tensor([[-1, 0, 0, 0, 0, 0]] * 2)}, "holds -1; the first key is 0"),
]


@OWN
@pytest.mark.parametrize("options, message", BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_refused(options, message, own):
    attention, _ = pair(own)
    with pytest.raises(ValueError, match=message):
        attention(*Seen(1, 1, 6, 6).inputs(own), **options)


def test_a_row_without_any_key_is_refused_unless_it_has_its_own():
    case = Seen(1, 1, 6, 6)
    first = torch.tensor([[0, 2, 2, 2, 2, 2]] * 2)
    with pytest.raises(ValueError, match="first_visible is 2 at row 1 of sample 0, which sees"):
        causal_attention(*case.inputs(own=False), first_visible=first)
    options = {"first_visible": first}
    ours = derivatives(lambda *x: energy_attention(*x, **options), case.inputs(own=True))
    plain = derivatives(lambda *x: energy_attention_definition(*x, **options), case.inputs(True))
    for mine, theirs in zip(ours, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_window_needs_causal_attention():
    with pytest.raises(ValueError, match="window is 2 with causal=False"):
        causal_attention(*Seen(1, 1, 6, 6).inputs(own=False), causal=False, window=2)
