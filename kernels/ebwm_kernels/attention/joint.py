"""The ordinary backward together with the second half of the double backward.

A loss behind an inner gradient sends two gradients through attention. With dQ, dk*, dv* the
gradient of a cotangent G on O, and A, b*, c* what the loss sends to these:

    double backward, up      A, b*, c*  -> gG, mu, phi       needed at once: the layers above wait
    double backward, down                  gQ, gK, gV, ..    needed when the layers below go on
    ordinary backward        gO         -> the same five     the layers below go on with it

Both of the last read Q, K, V and compute the weights again. So the second half waits at the node of
the ordinary backward, and one pass computes the sum of both: with rho = rowsum(gO O)

    Y   = P (gO V' - rho)                   y* = p* (gO.v* - rho)
    gQ += s (Y K + y* k*)                   gK += s Y' Q            gV += P' gO
    gk* += s y* q                           gv* += p* gO

that is Z + Y for Z in the formulas of reference.py, and 3 + 5 + 8 products in place of
3 + 4 + 6 + 3 + 4.

The node of the gradient has an edge to the node of the ordinary backward, so that autograd runs it
first: O is one of its arguments, though no gradient flows there. What waits belongs to one run of
autograd: a run that ended in an error leaves nothing to the next. Where the engine will not run the
node, nothing waits and the double backward is computed whole.

For the Triton kernels with a single own key per query and no cotangents on dK and dV: what a
refinement step asks for. The reference computes both halves in one pass over the weights, which is
as much work. Not under torch.compile or transforms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.library import custom_op

from ebwm_kernels.attention.schema import INPUTS, OUTPUT, REST, empty_for_none, parts_of
from ebwm_kernels.attention.tensors import Cotangents, Inputs, Statistics, empty_gradient
from ebwm_kernels.attention.tuning import has_joint_tiles
from ebwm_kernels.attention.visibility import Shape
from ebwm_kernels.autograd_rules import without_autocast

DIRECTION = "Tensor a, Tensor? b_self, Tensor? c_self, Tensor grad"
STATISTICS = "Tensor mu, Tensor phi, Tensor delta"
NUM_STATISTICS = len(Statistics._fields)


class Waiting(NamedTuple):
    """The second half of a double backward, at the node of the ordinary backward.

    run: of autograd. cotangents: A, b*, c*. grad: G.
    """

    run: int
    cotangents: Cotangents
    grad: Tensor
    statistics: Statistics


# ----------------------------------------------------------------------------------- the two nodes


def may_join(inputs: Inputs, rest: Sequence, *, with_keys: bool) -> bool:
    """Whether the double backward of a gradient that is being computed can wait: asked by the
    ordinary backward's node, under create_graph.
    """
    *numbers, backend = rest
    shape = Shape(*numbers)
    is_single = shape.group_size == 1 and shape.context_group == 1
    if backend != "triton" or inputs.k_self is None or not is_single or with_keys:
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if TracingContext.try_get() is not None:
        return False
    return has_joint_tiles(max(inputs.q.shape[-1], inputs.v.shape[-1]), inputs.q.dtype)


def wait_for(gradient: Tensor, node: torch.autograd.graph.Node) -> None:
    """Let the double backward of this gradient know the node of the ordinary backward."""
    if gradient.grad_fn is not None:
        gradient.grad_fn.ordinary_backward = node  # pyright: ignore[reportAttributeAccessIssue]


def first_half(
    node, cotangents: Cotangents, grad: Tensor, saved: Sequence[Tensor | None], rest: Sequence
) -> Tensor | None:
    """gG, with the second half left where the ordinary backward takes it; or None where it cannot
    wait. node: of the gradient, while its backward runs; saved: inputs and output.
    """
    ordinary = getattr(node, "ordinary_backward", None)
    if ordinary is None or cotangents.key is not None:
        return None
    if not torch._C._will_engine_execute_node(ordinary):
        return None
    g_grad, *statistics = torch.ops.ebwm.attention_double_backward_up(
        *_direction(cotangents), grad, *saved, *rest
    )
    waiting = Waiting(_run_of_autograd(), cotangents, grad, Statistics(*statistics))
    ordinary.waiting = [*_of_this_run(ordinary), waiting]
    return g_grad


def _direction(cotangents: Cotangents) -> tuple[Tensor | None, ...]:
    return cotangents.query, cotangents.k_self, cotangents.v_self


def take_waiting(node) -> list[Waiting]:
    """What waits at a node of the ordinary backward, which is running."""
    if not getattr(node, "waiting", None):
        return []
    waiting = _of_this_run(node)
    node.waiting = []
    return waiting


def _of_this_run(node) -> list[Waiting]:
    """What waits there, without what a run that ended in an error has left."""
    run = _run_of_autograd()
    return [one for one in getattr(node, "waiting", ()) if one.run == run]


def _run_of_autograd() -> int:
    return torch._C._current_graph_task_id()


def joined_backward(
    waiting: Sequence[Waiting],
    g_out: Tensor | None,
    saved: Sequence[Tensor | None],
    rest: Sequence,
    *,
    with_keys: bool,
) -> list[Tensor]:
    """gQ, gK, gV, gk*, gv* of all that waits and of gO, empty where there is none."""
    total: list[Tensor] = []
    for one in waiting:
        part = torch.ops.ebwm.attention_double_backward_down(
            *_direction(one.cotangents),
            one.grad,
            *one.statistics,
            g_out,
            *saved,
            *rest,
            with_keys,
        )
        g_out = None  # it is with the first
        total = [x + y for x, y in zip(total, part)] if total else list(part)
    return total


# --------------------------------------------------------------------------------------- operations


@custom_op(
    "ebwm::attention_double_backward_up",
    mutates_args=(),
    schema=f"({DIRECTION}, {INPUTS}, {OUTPUT}, {REST}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _up(a, b_self, c_self, grad, *arguments):
    """gG, mu, phi, D; each statistic (B, H, S)."""
    from ebwm_kernels.attention import triton_backend

    inputs, output, rest = parts_of(arguments)
    cotangents = Cotangents(a, None, None, b_self, c_self)
    g_grad, statistics = triton_backend.double_backward_up(
        cotangents, grad, inputs, output, Shape(*rest[:-1])
    )
    return g_grad, *statistics


@_up.register_fake
def _(_a, _b_self, _c_self, grad, *arguments):
    _, output, _ = parts_of(arguments)
    statistics = [torch.empty_like(output.log_normalizer) for _ in range(NUM_STATISTICS)]
    return empty_gradient(grad), *statistics


@custom_op(
    "ebwm::attention_double_backward_down",
    mutates_args=(),
    schema=f"({DIRECTION}, {STATISTICS}, Tensor? g_out, {INPUTS}, {OUTPUT}, {REST}, bool with_keys)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _down(a, b_self, c_self, grad, mu, phi, delta, g_out, *arguments):
    """gQ, gK, gV, gk*, gv*, with what the ordinary backward of g_out adds; gK and gV empty without
    with_keys.
    """
    from ebwm_kernels.attention import triton_backend

    *arguments, with_keys = arguments
    inputs, output, rest = parts_of(arguments)
    result = triton_backend.double_backward_down(
        Cotangents(a, None, None, b_self, c_self),
        grad,
        g_out,
        Statistics(mu, phi, delta),
        inputs,
        output,
        Shape(*rest[:-1]),
        with_keys=with_keys,
    )
    return empty_for_none(result, result.q)


@_down.register_fake
def _(_a, _b_self, _c_self, _grad, _mu, _phi, _delta, _g_out, q, k, v, k_self, v_self, *rest):
    keys = (k, v) if rest[-1] else (None, None)
    tensors = (q, *keys, k_self, v_self)
    return empty_for_none((None if x is None else empty_gradient(x) for x in tensors), q)
