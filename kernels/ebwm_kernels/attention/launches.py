"""How the Triton kernels of attention are launched: one call of a level, its tensors made ready
and where they lie, its sizes, and its tiles for the GPU at hand.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, overload

import torch
import triton.language as tl
from torch import Tensor

from ebwm_kernels.attention.intervals import Mask
from ebwm_kernels.attention.row_tiles import Head, Strides
from ebwm_kernels.attention.tensors import Inputs, empty_gradient, empty_output, wide_dtype
from ebwm_kernels.attention.tuning import (
    Tile,
    architecture_of,
    padded_for,
    part_for,
    sum_columns_for,
    tile_for,
)
from ebwm_kernels.attention.visibility import Shape

# What programs that run at the same time read again and again should stay in the GPU's cache: H100
# has 50 MB, A100 40 MB.
CACHE_BYTES = 24 * 2**20
ALIGNMENT = 16  # bytes, of every tensor a kernel reads: a load is 16 bytes


# One number per row, (B, H, S), and what visibility gives: the tensors that always lie alike.
STATISTICS = frozenset({"FIRST", "LAST_ROW", "L", "DELTA", "MU", "PHI", "RHO", "Z", "DS"})


class Call:
    """One call of a level: the tensors all of its kernels read, and how they are launched."""

    def __init__(self, inputs: Inputs, shape: Shape):
        q, k, v = inputs.q, inputs.k, inputs.v
        self.q, self.k, self.v = ready(q), ready(k), ready(v)
        self.k_self, self.v_self = ready(inputs.k_self), ready(inputs.v_self)
        self.first_visible = None
        if inputs.first_visible is not None:
            self.first_visible = ready(inputs.first_visible.to(torch.int32))
        self.batch, self.heads, self.num_rows = q.shape[:3]
        self.key_heads, self.num_keys = k.shape[1:3]
        self.shape, self.dtype, self.device = shape, q.dtype, q.device
        self.own = self.k_self is not None
        self.has_groups = (shape.group_size, shape.context_group) != (1, 1)
        self.architecture = architecture(q.device)
        self.head, self.value = self._head(q.shape[-1]), self._head(v.shape[-1])
        self.mask = Mask(shape.causal, self.has_groups, self.first_visible is not None)

    def _head(self, d: int) -> Head:
        padded = padded_for(d)
        return Head(
            d=d,
            padded=padded,
            part=part_for(self.architecture, padded, self.dtype),
            align=alignment_of(d, self.dtype),
            acc=tl.float64 if self.dtype == torch.float64 else tl.float32,
            precision=precision_for(self.dtype),
            sum_columns=sum_columns_for(self.architecture, self.dtype),
        )

    # ------------------------------------------------------------------------------------- tensors

    @property
    def own_groups(self) -> bool:
        """Whether own keys come in groups, whose gradients are sums over rows."""
        return self.own and self.has_groups

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What kernels over rows are given first."""
        return self.q, self.k, self.v, self.k_self, self.v_self, self.first_visible

    @property
    def context_keys(self) -> tuple[Tensor | None, ...]:
        """What kernels over context keys are given first."""
        return self.q, self.k, self.v, self.last_row

    @property
    def own_keys(self) -> tuple[Tensor | None, ...]:
        """What kernels over own keys are given first."""
        return self.q, self.k_self, self.v_self, None

    def empty_output(self) -> Tensor:
        return empty_output(self.q, self.v.shape[-1])

    def statistic(self) -> Tensor:
        shape = self.q.shape[:-1]
        return torch.empty(shape, dtype=wide_dtype(self.dtype), device=self.device)

    @functools.cached_property
    def last_row(self) -> Tensor | None:
        """(B, C) int32: one past the last row that sees a key, for first_visible (B, S)."""
        if self.first_visible is None:
            return None
        keys = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        keys = keys.expand(self.batch, -1).contiguous()
        return torch.searchsorted(self.first_visible, keys, right=True, out_int32=True)

    # ------------------------------------------------------------------------------------ launches

    def over_rows(self, kernel, *tensors: Tensor | None, with_keys: bool = False, **flags) -> None:
        """One program per tile of query rows of a head; a tensor that is None is not read."""
        tile = self._tile(kernel, with_keys or self.own_groups, flags.get("JOINT", False))
        bytes_per_head = self.num_keys * self._row_bytes()
        sharing = self.heads // self.key_heads
        self._run(
            kernel,
            tile,
            self.batch * self.heads * _num_tiles(self.num_rows, tile.rows),
            tensors,
            self._sizes(
                self.num_keys, sharing, self.heads, sharing * (CACHE_BYTES // bytes_per_head)
            ),
            flags,
        )

    def over_keys(self, kernel, *tensors: Tensor | None, with_keys: bool = False, **flags) -> None:
        """One program per tile of context keys of a key head."""
        sharing = self.heads // self.key_heads
        self._over_keys(kernel, tensors, self.num_keys, self.key_heads, sharing, with_keys, flags)

    def over_own_keys(self, kernel, *tensors: Tensor | None, **flags) -> None:
        """One program per tile of a head's own keys."""
        flags["OWN"] = True
        self._over_keys(kernel, tensors, self.num_rows, self.heads, 1, True, flags)

    def _over_keys(
        self, kernel, tensors, num_keys: int, heads: int, sharing: int, with_keys: bool, flags
    ) -> None:
        tile = self._tile(kernel, with_keys, flags.get("JOINT", False), sharing > 1)
        bytes_per_head = sharing * self.num_rows * self._row_bytes()
        self._run(
            kernel,
            tile,
            self.batch * heads * _num_tiles(num_keys, tile.keys),
            tensors,
            self._sizes(num_keys, sharing, heads, CACHE_BYTES // max(1, bytes_per_head)),
            {"OWN": False, "SHARED": sharing > 1, **flags},
        )

    def _sizes(self, num_keys: int, sharing: int, heads: int, heads_at_once: int) -> dict[str, int]:
        """intervals.SIZES by name; a kernel takes those that it names."""
        return {
            "S": self.num_rows,
            "C": num_keys,
            "offset": self.shape.offset,
            "group_size": self.shape.group_size,
            "context_group": self.shape.context_group,
            "sharing": sharing,
            "heads": heads,
            "all_heads": self.batch * heads,
            "heads_at_once": min(max(1, heads_at_once), self.batch * heads),
        }

    def _row_bytes(self) -> int:
        """Of a key and its value, or a query and its cotangent."""
        return (self.head.d + self.value.d) * self.dtype.itemsize

    def _tile(self, kernel, with_keys: bool, joint: bool, sharing: bool = False) -> Tile:
        padded = max(self.head.padded, self.value.padded)
        return tile_for(
            kernel.__name__,
            self.architecture,
            padded,
            self.dtype,
            with_keys,
            sharing=sharing,
            joint=joint,
        )

    def _run(self, kernel, tile: Tile, num_programs: int, tensors, sizes, flags) -> None:
        if num_programs == 0:
            return
        arguments: dict[str, Any] = {
            **sizes,
            "scale": float(self.shape.scale),
            "factor": self.shape.scale * math.log2(math.e),
            "HEAD": self.head,
            "VALUE": self.value,
            "MASK": self.mask,
            "BM": tile.rows,
            "BN": tile.keys,
            **flags,
        }
        pointers = [self.q if tensor is None else tensor for tensor in tensors]
        arguments["AT"] = _layout(kernel, tensors)
        named = {name: arguments[name] for name in kernel.arg_names[len(pointers) :]}
        on_its_device = contextlib.nullcontext()
        if self.device.type == "cuda":
            on_its_device = torch.cuda.device(self.device)
        with on_its_device:
            launch(kernel, num_programs, pointers, named, tile)


def launch(kernel, num_programs: int, pointers, named: dict[str, Any], tile: Tile) -> None:
    """tools/compile_kernels.py compiles here instead, so that it reports what is launched."""
    kernel[(num_programs,)](*pointers, **named, **options_of(tile))


def options_of(tile: Tile) -> dict[str, int | None]:
    """What Triton's compiler is told of a tile, beside its sizes."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the tuning table for a device that ops.why_not_triton finds nothing against."""
    if device.type != "cuda":
        return "interpreter"
    found = architecture_of(torch.cuda.get_device_capability(device))
    if found is None:
        raise RuntimeError(f"no tiles for {torch.cuda.get_device_name(device)}")
    return found


NO_STRIDES = Strides(0, 0, tl.constexpr(0))


@functools.cache
def _layout_type(names: tuple[str, ...]) -> type:
    return namedtuple("Layout", names)  # pyright: ignore[reportUntypedNamedTuple]


def _layout(kernel, tensors: Sequence[Tensor | None]) -> tuple:
    """Strides of the tensors (B, H, S, d) that a kernel is given, by its names for them."""
    strides = {}
    for name, tensor in zip(kernel.arg_names, tensors):
        if name not in STATISTICS:
            strides[name] = NO_STRIDES if tensor is None else strides_of(tensor)
    return _layout_type(tuple(strides))(**strides)


def strides_of(x: Tensor) -> Strides:
    """Of a tensor (B, H, S, d) that is ready, as kernels take them."""
    align = alignment_of(x.shape[-1], x.dtype)
    batch, head, row = _steps(x)
    return Strides(batch // align * 16, head // align * 16, tl.constexpr(row))


def _steps(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, heads and rows; what has one place needs no step, but a single row has
    that of many rows, so that it needs no program of its own.
    """
    batch = x.stride(0) if x.shape[0] > 1 else 0
    head = x.stride(1) if x.shape[1] > 1 else 0
    row = x.stride(2)
    if x.shape[2] == 1 and row % alignment_of(x.shape[3], x.dtype):
        row = x.shape[3]
    return batch, head, row


def alignment_of(width: int, dtype: torch.dtype) -> int:
    """The numbers that a row's place is a multiple of: as many as one load takes, if rows do."""
    return math.gcd(width, ALIGNMENT // dtype.itemsize)


def _num_tiles(count: int, size: int) -> int:
    """How many tiles of `size` cover `count`."""
    return -(-count // size)


def precision_for(dtype: torch.dtype) -> str:
    """float32 is multiplied in three TF32 passes (near float32), or in one where the user allows
    that for matrix products.

    fp32_precision also says what the older allow_tf32 was set to, which raises once a user has set
    the newer one.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@overload
def empty_for(x: Tensor) -> Tensor: ...
@overload
def empty_for(x: Tensor | None) -> Tensor | None: ...
def empty_for(x: Tensor | None) -> Tensor | None:
    """Memory for the gradient of a tensor."""
    return None if x is None else empty_gradient(x)


@overload
def ready(x: Tensor) -> Tensor: ...
@overload
def ready(x: Tensor | None) -> Tensor | None: ...
def ready(x: Tensor | None) -> Tensor | None:
    """A tensor that kernels can read: itself, wherever its rows lie, or else a copy."""
    if x is None:
        return None
    if x.ndim != 4 or not _can_be_read(x):
        x = x.contiguous()
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    return x


def _can_be_read(x: Tensor) -> bool:
    """Whether each row of a tensor (B, H, S, d) is in one piece and starts at a multiple of what
    one load takes, and a head's rows are in reach of 32 bits.
    """
    in_one_piece = x.shape[3] == 1 or x.stride(3) == 1
    align = alignment_of(x.shape[3], x.dtype)
    steps = _steps(x)
    return (
        in_one_piece and not any(step % align for step in steps) and x.shape[2] * steps[2] < 2**31
    )
