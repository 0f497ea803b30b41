"""What a backend of attention has to offer; attention/reference.py defines what each computes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ebwm_kernels.attention.reference import Cotangents
from ebwm_kernels.attention.visibility import Shape


class Implementation(Protocol):
    """What a backend is: three levels and the tangent, as attention/reference.py defines them."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_self: Tensor | None,
        v_self: Tensor | None,
        first_visible: Tensor | None,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]: ...

    def gradient(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_self: Tensor | None,
        v_self: Tensor | None,
        first_visible: Tensor | None,
        out: Tensor,
        log_normalizer: Tensor,
        shape: Shape,
        *,
        with_keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...

    def double_backward(
        self,
        cotangents: Cotangents,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_self: Tensor | None,
        v_self: Tensor | None,
        first_visible: Tensor | None,
        out: Tensor,
        log_normalizer: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...

    def tangent(
        self,
        tangents: Cotangents,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_self: Tensor | None,
        v_self: Tensor | None,
        first_visible: Tensor | None,
        out: Tensor,
        log_normalizer: Tensor,
        shape: Shape,
    ) -> Tensor: ...
