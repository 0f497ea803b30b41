"""The signatures that the operations of attention share, for torch.library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ebwm_kernels.attention.tensors import Inputs, Output
from ebwm_kernels.attention.visibility import Shape

# What every operation is given: tensors.Inputs, and visibility.Shape with the backend.
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? k_self, Tensor? v_self, Tensor? first_visible"
OUTPUT = "Tensor out, Tensor log_normalizer"
COTANGENTS = "Tensor a, Tensor? b, Tensor? c, Tensor? b_self, Tensor? c_self"
REST = (
    "float scale, SymInt offset, bool causal, SymInt group_size, SymInt context_group, str backend"
)
NUM_INPUTS = len(Inputs._fields)
NUM_REST = len(Shape._fields) + 1


def parts_of(arguments: Sequence) -> tuple[Inputs, Output, Sequence]:
    """Inputs, output and the rest of an operation's arguments."""
    end = NUM_INPUTS + len(Output._fields)
    return Inputs(*arguments[:NUM_INPUTS]), Output(*arguments[NUM_INPUTS:end]), arguments[end:]


def empty_for_none(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The results of an operation: empty in place of None."""
    return tuple(like.new_empty(0) if x is None else x for x in results)
