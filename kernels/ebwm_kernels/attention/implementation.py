"""What a backend of attention has to offer; attention/reference.py defines what each computes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ebwm_kernels.attention.tensors import Cotangents, Gradients, Inputs, Output, SecondGradients
from ebwm_kernels.attention.visibility import Shape


class Implementation(Protocol):
    """What a backend is: three levels and the tangent, as attention/reference.py defines them."""

    def forward(self, inputs: Inputs, shape: Shape) -> Output: ...

    def gradient(
        self, grad: Tensor, inputs: Inputs, output: Output, shape: Shape, *, with_keys: bool
    ) -> Gradients: ...

    def double_backward(
        self, cotangents: Cotangents, grad: Tensor, inputs: Inputs, output: Output, shape: Shape
    ) -> SecondGradients: ...

    def tangent(
        self, tangents: Cotangents, inputs: Inputs, output: Output, shape: Shape
    ) -> Tensor: ...
