"""What stands for torch.cuda.graph where there is no GPU: operations are recorded while a function
runs, and replayed on the very tensors that they read and wrote.

As of a CUDA graph, Python does not run again: a number that a step took from anywhere but the
recorded tensors stays what it was, and a read of the device while recording is an error.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
}
NOTHING_WRITTEN = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class OperationRecorder(TorchDispatchMode):
    """device: where all tensors have to be."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device")
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.device.type != self.device:
                raise RuntimeError(f"{name} reads a tensor of the {value.device.type}")
        out = func(*args, **kwargs)
        if name not in NOTHING_WRITTEN and not is_view(func):
            self.operations.append((func, tree_map(as_it_lies, (args, kwargs, out))))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, (args, kwargs, out) in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and address(old) != address(new):
                    old.copy_(new)


def is_view(func) -> bool:
    """Whether an operation launches nothing: it returns its argument's memory."""
    returns = func._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def as_it_lies(value):
    """A tensor's memory, whatever becomes of the tensor: a parameter may be moved."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorders:
    """In the place of CudaCapture. recorded: one per recording."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.recorded = []

    def __call__(self, function):
        recorder = OperationRecorder(self.device)
        with recorder:
            function()
        self.recorded.append(recorder)
        return recorder.replay
