"""What a training step asks of its device, counted without one: launches, bytes and FLOPs.

    count = count_step(config, num_samples)     forward and backward on the meta device
    count_graphed_step(config, num_samples)     the same where a CUDA graph is replayed: launches

The meta device has shapes and no numbers, so the largest model is counted in seconds. What is
counted is what a GPU would be given in half precision: attention and the fused operations in
Triton, the observed stream by a flash kernel.

    launch   an operation that PyTorch dispatches and that is no view, or a Triton program
    bytes    what it reads and what it writes, each tensor once, as if every operand came from the
             device's memory; of an expanded tensor what it holds, of a gather what it takes
    FLOPs    those of PyTorch's FLOP counter: matrix products and attention

Not in it: the optimizer, communication, and what one operation launches beyond its first kernel
(a sort behind index_put_).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ebwm_kernels.attention.flops  # noqa: F401  registers them
from ebwm_kernels.attention import first_order
from ebwm_kernels.attention import ops as attention_ops
from ebwm_kernels.fused import launches
from ebwm_scale.config.schema import Config
from ebwm_scale.refinement import graphed
from ebwm_scale.refinement import noise as noise_module
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_LAUNCH |= {"_unsafe_view", "lift_fresh", "alias"}
WRITTEN_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # of what they change
# What reads or writes some rows of a tensor: the bytes are those of the rows.
TAKES_ROWS = {"embedding", "gather", "index", "index_select"}
PUTS_ROWS = {"scatter_", "scatter_add_", "index_add_", "index_put_", "embedding_dense_backward"}
CREATES = {"new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv"}
# Programs that Triton launches for an operation of attention, own keys without groups
# (kernels/ebwm_kernels/attention/triton_backend.py).
ATTENTION_LAUNCHES = {
    "attention": 1,
    "attention_gradient": 1,
    "attention_double_backward": 4,
    "attention_double_backward_up": 1,
    "attention_double_backward_down": 2,
}

# Of PyTorch's operations on lists, per kernel (aten/src/ATen/native/cuda/MultiTensorApply.cuh):
# numbers of a piece, pieces, and tensors where a kernel reads one list and writes another.
FOREACH_PIECE = 65536
FOREACH_PIECES = 320
FOREACH_TENSORS = 64


@dataclass
class Amount:
    """launches, bytes moved, FLOPs."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def add(self, launches: int, moved: int, flops: int = 0) -> None:
        self.launches += launches
        self.bytes += moved
        self.flops += flops


@dataclass
class StepCount:
    """What was counted, by operation; an operation belongs to one of the three kinds."""

    operations: dict[str, Amount] = field(default_factory=lambda: defaultdict(Amount))

    @property
    def total(self) -> Amount:
        return self._sum(self.operations)

    @property
    def products(self) -> Amount:
        """Matrix products."""
        return self._sum(name for name in self.operations if name in PRODUCTS)

    @property
    def attention(self) -> Amount:
        """Of both streams."""
        return self._sum(name for name in self.operations if "attention" in name)

    @property
    def pointwise(self) -> Amount:
        """Everything else: norms, activations, rotations, sums, casts, copies, the vocabulary's
        passes over states, noise.
        """
        rest = [name for name in self.operations if name not in PRODUCTS]
        return self._sum(name for name in rest if "attention" not in name)

    def _sum(self, names) -> Amount:
        total = Amount()
        for name in names:
            amount = self.operations[name]
            total.add(amount.launches, amount.bytes, amount.flops)
        return total


def count_step(config: Config, num_samples: int, dtype: torch.dtype = torch.bfloat16) -> StepCount:
    """Forward and backward of one micro-batch of num_samples samples of text.

    The model's weights are in dtype; states are float32.
    """
    count = StepCount()
    model = _model_of(config, dtype)
    with as_on_a_gpu(), _counting_fused(count), _Counter(count):
        _run_step(model, num_samples)
    return count


def count_graphed_step(
    config: Config, num_samples: int, dtype: torch.dtype = torch.bfloat16
) -> StepCount:
    """The same of a micro-batch whose refinement was recorded before (refinement/graphed.py).

    The replay is one launch here, and its bytes and FLOPs are those of `count_step`. Raises
    ValueError for a configuration that is not recorded, with the reason.
    """
    count = StepCount()
    model = _model_of(config, dtype)
    reasons: list[str] = []

    def capture(function):
        function()

        def replay() -> None:
            count.operations["graph_replay"].add(1, 0)

        return replay

    model.graphs = graphed.GraphedRefinement(capture, reasons.append)
    model.graphs.warm_up = 0  # nothing has to be compiled here
    with as_on_a_gpu(), mock.patch.object(graphed, "DEVICES", ("meta",)):
        with _counting_fused(StepCount()):
            _run_step(model, num_samples)
        if reasons:
            raise ValueError(reasons[0])
        count.operations.clear()
        with _counting_fused(count), _Counter(count):
            _run_step(model, num_samples)
    return count


def _model_of(config: Config, dtype: torch.dtype) -> WorldModel:
    with torch.device("meta"):
        return WorldModel(config).to(dtype)


def _run_step(model: WorldModel, num_samples: int) -> None:
    context_length = model.config.data.context_length
    assert context_length is not None, "a step has positions"
    stream = torch.zeros(num_samples, context_length + 1, dtype=torch.int64, device="meta")
    output = model(
        stream[:, :-1],
        stream[:, 1:],
        sample_ids=torch.arange(num_samples, device="cpu"),
        source=NoiseSource(0, 0),
    )
    assert output.loss is not None, "it was given targets"
    output.loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it meta tensors take the paths of a GPU's."""
    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (NoiseSource, "normal", _normal),
            (attention_ops, "why_not_triton", lambda device, dtype, head_dimension: None),
            (first_order.F, "scaled_dot_product_attention", _flash_attention),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _counting_fused(count: StepCount):
    """Count fused kernels in place of their launches."""

    def launch(kernel, num_programs, reads, writes, *, tile, again=(), **constants) -> None:
        moved = _held([*reads.values(), *writes.values(), *(reads[name] for name in again)])
        name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
        count.operations[name.removeprefix("_")].add(1, moved)

    return mock.patch.object(launches, "launch", launch)


def _normal(
    source: NoiseSource,
    sample_ids: Tensor,
    num_positions: int,
    size: int,
    *,
    purpose: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    first_position: int = 0,
) -> Tensor:
    """NoiseSource.normal on a GPU, without its generators."""
    block = noise_module.DEVICE_POSITIONS
    first = first_position // block
    last = -(-(first_position + num_positions) // block)
    shape = (len(sample_ids), (last - first) * block, size)
    result = torch.empty(*shape, device=device, dtype=dtype)
    for sample in result:
        for start in range(0, shape[1], block):
            sample[start : start + block].normal_()
    start = first_position - first * block
    return result[:, start : start + num_positions].contiguous()


def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """One kernel forward, one backward."""
    if attn_mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=enable_gqa)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


class _Counter(TorchDispatchMode):
    def __init__(self, count: StepCount):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in NO_LAUNCH or _is_view(func):
            return out
        launches = ATTENTION_LAUNCHES.get(name, 1)
        if name.startswith("_foreach_"):
            launches = _foreach_launches(args[0])
        if name == "attention_gradient":
            launches += args[-2]  # with_keys
        if name == "attention_double_backward_down":
            launches += args[-1]  # the same
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.count.operations[name].add(
            launches, _bytes_moved(func, name, args, kwargs, out), flops
        )
        return out


def _foreach_launches(tensors: list[Tensor]) -> int:
    """Kernels for a list of tensors: each takes so many pieces, and so many tensors, at most."""
    pieces = sum(-(-tensor.numel() // FOREACH_PIECE) for tensor in tensors)
    return max(-(-pieces // FOREACH_PIECES), -(-len(tensors) // FOREACH_TENSORS))


def _is_view(func) -> bool:
    """Whether the operation returns its argument's memory, unchanged."""
    returns = func._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def _bytes_moved(func, name: str, args, kwargs, out) -> int:
    given = [*zip(func._schema.arguments, args)]
    given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments
              if argument.name in kwargs]  # fmt: skip
    read = 0
    written = 0
    for argument, value in given:
        size = _held(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.is_out or name in WRITTEN_ONLY:
                written += size
            elif name in PUTS_ROWS:
                continue
            else:
                written += 2 * size
        else:
            read += size
    if not any(value.alias_info for value in func._schema.returns):
        written += _held(out)
    if name in CREATES:
        return written
    if name in TAKES_ROWS:
        return 2 * _held(out)
    if name in PUTS_ROWS:
        return 3 * max(_held(value) for _, value in given[1:])
    return read + written


def _held(value) -> int:
    """Bytes of the numbers that a tensor, or each of several, holds."""
    if isinstance(value, (tuple, list)):
        return sum(_held(one) for one in value)
    if not isinstance(value, Tensor):
        return 0
    numbers = 1
    for size, stride in zip(value.shape, value.stride()):
        numbers *= size if stride else 1
    return numbers * value.element_size()
