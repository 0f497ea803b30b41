"""Attention of the predicted stream: every query sees a causal context and own keys, under a single
softmax.

    p_t attends to  o_1 .. o_(t + offset)  and to itself:
        softmax([q_t k_1, .., q_t k_(t + offset), q_t k*_t]) [v_1, .., v*_t]

With groups (the patches of a frame, a block of text, the cells of a puzzle) a query sees the own
keys of all positions of its group, in both directions, and the context up to its group's place.

The observed stream never enters as a query. The inner gradient of a refinement step runs through q,
k* and v* only, and the context's keys and values collect their gradients in the outer backward
(autograd_rules.py). Who sees what: attention/visibility.py; formulas: attention/reference.py;
levels: attention/ops.py.
"""

from __future__ import annotations

from torch import Tensor

from ebwm_kernels.attention.definition import attention_definition
from ebwm_kernels.attention.ops import attend, resolve_backend
from ebwm_kernels.attention.tensors import Inputs
from ebwm_kernels.attention.visibility import (
    Shape,
    check_groups,
    first_visible_keys,
    score_scale,
)


def energy_attention(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    scale: float | None = None,
    context_offset: int = 0,
    group_size: int = 1,
    context_group: int | None = None,
    first_visible: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Output (B, H, S, d_v) of the predicted stream's attention, differentiable twice with respect
    to all five tensors.

    q, k_self: (B, H, S, d); v_self: (B, H, S, d_v); k_context: (B, H_kv, C, d); v_context: (B,
    H_kv, C, d_v) with H % H_kv == 0; one floating dtype and device.
    scale: default d ** -0.5. backend: "triton", "reference", or "auto": Triton for float16,
    bfloat16 and float32 on an NVIDIA GPU, else the reference.

    Query t, of group g = t // group_size, sees the own keys of its group, and the context keys j
    with first_visible[b, t] <= j < (g + 1) context_group + context_offset. group_size divides S;
    context_group (default group_size): context keys per group. With groups of 1, that is its own
    key and j <= t + context_offset.
    first_visible: (B, S) integers that do not decrease along S, without gradient (None: all 0): the
    start of the row's document in a packed sequence. window: at most so many context keys, the
    last that the row sees.

    With groups the outputs of a group depend on all its candidates, so energies do not separate by
    row: the inner gradient of the summed energies is, for one candidate, the sum of what every row
    of its group contributes, not the gradient of that row's energy alone.

    A third derivative raises RuntimeError. Raises ValueError for shapes, dtypes, groups, first keys
    or a backend that do not fit.
    """
    operation = "energy_attention"
    group = group_size if context_group is None else context_group
    _check(q, k_self, v_self, k_context, v_context)
    check_groups(operation, q.shape[2], context_offset, group_size, group)
    shape = Shape(score_scale(scale, q.shape[-1]), context_offset, True, group_size, group)
    first = first_visible_keys(
        operation, q, k_context.shape[2], first_visible, window, shape, own=True
    )
    widest = max(q.shape[-1], v_context.shape[-1])
    backend = resolve_backend(backend, q.device, q.dtype, widest, operation)
    inputs = Inputs(q, k_context, v_context, k_self, v_self, first)
    return attend(inputs, shape, backend)


def energy_attention_definition(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    scale: float | None = None,
    context_offset: int = 0,
    group_size: int = 1,
    context_group: int | None = None,
    first_visible: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The definition in plain operations, for tests and readers."""
    group = group_size if context_group is None else context_group
    shape = Shape(score_scale(scale, q.shape[-1]), context_offset, True, group_size, group)
    C = k_context.shape[2]
    first = first_visible_keys("definition", q, C, first_visible, window, shape, own=True)
    return attention_definition(q, k_context, v_context, k_self, v_self, first, shape)


def _check(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor) -> None:
    check_tensors(
        "energy_attention",
        {
            "q": q,
            "k_self": k_self,
            "v_self": v_self,
            "k_context": k_context,
            "v_context": v_context,
        },
    )
    if k_self.shape != q.shape:
        raise ValueError(
            f"energy_attention: k_self has shape {tuple(k_self.shape)}, q has {tuple(q.shape)}; "
            "they must be equal"
        )
    expected = (*q.shape[:-1], v_context.shape[-1])
    if v_self.shape != expected:
        raise ValueError(
            f"energy_attention: v_self has shape {tuple(v_self.shape)}; with q {tuple(q.shape)} "
            f"and v_context {tuple(v_context.shape)} it must be {expected}"
        )
    check_keys("energy_attention", q, {"k_context": k_context, "v_context": v_context})


def check_tensors(operation: str, tensors: dict[str, Tensor]) -> None:
    """Four dimensions, one floating dtype, one device. Raises ValueError."""
    q = tensors["q"]
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions "
                "(batch, heads, positions, head dimension)"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device or not q.dtype.is_floating_point:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on "
                f"{q.device}; "
                "all must share one floating dtype and one device (torch.autocast casts nothing "
                "here: cast them yourself, q.to(v.dtype) for example)"
            )


def check_keys(operation: str, q: Tensor, context: dict[str, Tensor]) -> None:
    """Keys (B, H_kv, C, d) and values (B, H_kv, C, d_v) that fit the queries, at least one of them.

    Raises ValueError.
    """
    (k_name, k), (v_name, v) = context.items()
    B, H, _, d = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != B or k.shape[3] != d:
        raise ValueError(
            f"{operation}: {k_name} has shape {tuple(k.shape)} and {v_name} {tuple(v.shape)}; "
            f"q {tuple(q.shape)} needs both to be ({B}, H_kv, C, {d}), values of any last size"
        )
    if k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"{operation}: {k.shape[1]} key/value heads for {H} query heads; must divide them"
        )
    if k.shape[2] == 0 or v.shape[3] == 0:
        raise ValueError(
            f"{operation}: {k_name} has shape {tuple(k.shape)} and {v_name} {tuple(v.shape)}; "
            "at least one key is needed, and values of at least one number"
        )
