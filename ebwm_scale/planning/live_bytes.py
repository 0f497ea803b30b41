"""Bytes in tensors that are alive, followed while a step runs: its exact peak, on any device.

    with LiveBytes() as live:
        live.see_now(model.parameters())        # what was there before
        model(...).loss.backward()
    live.peak

Storages count once, however many tensors share them, from the operation that made them to their
end. Attention is looked into: its operations are one each to a dispatch mode. What an operation of
PyTorch or a collective allocates and frees inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebwm_kernels.attention import ops as attention_ops

ATTENTION = {
    # by name: importing diffusers makes PyTorch build the overload objects anew
    operation._qualname: operation._init_fn
    for operation in (
        attention_ops._attention,
        attention_ops._gradient,
        attention_ops._double_backward,
    )
}


class InsideAttention(TorchDispatchMode):
    """Sees what the attention operations do inside, which a dispatch mode passes over."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() not in ATTENTION:
            return self.see(function, args, kwargs or {})
        with self:
            return ATTENTION[function.name()](*args, **(kwargs or {}))

    def see(self, function, args, kwargs):
        """Given each operation; returns what it does. Each subclass has its own."""
        raise NotImplementedError


class LiveBytes(InsideAttention):
    """The peak of bytes in tensors that are alive: what an allocator without waste would need."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def see_now(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._add(tensor)
        self.peak = max(self.peak, self.now)

    def see(self, function, args, kwargs):
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
