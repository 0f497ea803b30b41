"""A real training step of a small model, and what it is seen to do."""

import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.model.conditions import example_conditions
from ebwm_scale.planning.live_bytes import InsideAttention
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

SAMPLES, FRAME = 2, 7


FRAMES = {"kind": "embedding", "dimension": FRAME}


CONDITIONS = [
    {"name": "action", "kind": "continuous", "width": 2},
    {"name": "button", "kind": "discrete", "num_values": 3},
]


def configuration(
    *,
    model=None,
    refinement=None,
    state=None,
    train=None,
    deepspeed=None,
    data=None,
    context_length=9,
    vocabulary_size=11,
):
    """Two small blocks whose sizes differ from one another, so that a mistaken factor shows."""
    sizes = {"size": "4xs", "num_layers": 2, "width": 16, "num_heads": 4, "feed_forward_width": 24}
    if (state or {}).get("kind") != "embedding":
        sizes["vocabulary_size"] = vocabulary_size
    return config_from_dict(
        {
            "model": sizes | (model or {}),
            "refinement": refinement or {},
            "state": state or {},
            "deepspeed": deepspeed or {},
            "data": {"context_length": context_length} | (data or {}),
            "train": {"global_batch_size": SAMPLES} | (train or {}),
        }
    )


def training_step(config, mode, build=WorldModel, **options):
    """One forward and backward of a WorldModel under a dispatch mode; gradients are there already,
    as under accumulation.
    """
    torch.manual_seed(0)
    model = build(config).train()
    size = config.data.group_size or 1
    shape = (config.train.global_batch_size, config.data.context_length + size)
    stream = (
        torch.randn(*shape, FRAME)
        if config.state.kind == "embedding"
        else torch.randint(config.model.vocabulary_size, shape)
    )
    num_groups = config.data.context_length // size
    conditions = example_conditions(config.data.conditions, shape[0], num_groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with mode:
        for parameter in model.parameters():  # shows a Live mode what was there before the step
            parameter.detach().mul_(1), parameter.grad.mul_(1)
        model(
            stream[:, :-size],
            stream[:, size:],
            conditions=conditions,
            sample_ids=torch.arange(shape[0]),
            source=NoiseSource(3, 0),
            **options,
        ).loss.backward()
    return mode


class Counted(InsideAttention):
    """FLOPs of matrix products and of scaled_dot_product_attention.

    torch.utils.flop_counter does not know addmm_ nor the attention that runs on a CPU; the formulas
    are its own. A batched product of vectors (a row-wise inner product) is no matrix product, nor
    is one of a matrix and a vector (mv: the means and sums of RMSNorm).
    """

    def __init__(self):
        super().__init__()
        self.flops = {"products": 0, "predicted": 0, "observed": 0}

    def see(self, function, args, kwargs):
        name, tensors = (
            function.overloadpacket.__name__,
            [a for a in args if isinstance(a, torch.Tensor)],
        )
        if name in ("mm", "addmm", "addmm_"):
            self.flops["products"] += 2 * tensors[-2].numel() * tensors[-1].shape[1]
        elif name.startswith("_embedding_bag"):
            if "per_sample_weights" in name:  # of each weight, the product of two rows
                gradient, _, ids = tensors[:3]
                self.flops["products"] += 2 * ids.numel() * gradient.shape[1]
            else:
                vectors, ids = tensors[:2]
                self.flops["products"] += 2 * ids.numel() * vectors.shape[1]
        elif name in ("bmm", "baddbmm", "baddbmm_"):
            left, right = tensors[-2:]
            self.flops["predicted"] += 2 * left.numel() * right.shape[2]
        elif name.startswith("_scaled_dot_product"):
            backward = name.endswith("backward")
            query, key = tensors[int(backward) :][:2]
            self.flops["observed"] += (5 if backward else 2) * 2 * query.numel() * key.shape[2]
        assert function.namespace != "ebwm", f"{function} was not looked into"
        assert name not in ("addbmm", "convolution", "_scaled_mm"), f"{name} is not counted"
        return function(*args, **kwargs)
