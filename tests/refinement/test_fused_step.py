"""A whole training step whose pointwise operations run in Triton gives the loss and gradients of
plain PyTorch, in float64 to 1e-10: in Triton's interpreter. Attention, which the interpreter takes
seconds for and which has tests of its own, stays with its reference.
"""

import functools

import pytest
import torch

from ebwm_kernels.fused.launches import why_not_fused
from ebwm_scale.config.load import load_config
from ebwm_scale.model import attention
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

OBSTACLE = why_not_fused(torch.device("cpu"), torch.float64)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")
OPTIONS = {
    "default": [],
    "adaln, mirror": ["model.conditioning=adaln", "refinement.update=mirror"],
    "block by block, shared keys": ["refinement.recompute=block", "model.num_kv_heads=1"],
    "a step computed again": ["refinement.recompute=step", "state.initial=zeros"],
    "logits, clamped": ["refinement.update=logits", "refinement.change_clamp=1"],
    "few candidates": ["refinement.candidates=4", "refinement.update=mirror"],
    "transformer++": ["model.kind=baseline"],
    "full graph": ["refinement.graph=full", "refinement.loss=last"],
    "full graph, mirror": ["refinement.graph=full", "refinement.update=mirror", "train.z_loss=0.1"],
    "full graph, logits, clamped": [
        "refinement.graph=full",
        "refinement.update=logits",
        "refinement.change_clamp=0.05",
        "refinement.state_clamp=2",
    ],
    "the context alone": ["model.own_keys=false"],
}

QUICK = "adaln, mirror"  # the others take as long, and are of the same operations


@pytest.fixture(autouse=True)
def reference_attention(monkeypatch):
    for name in ("energy_attention", "causal_attention"):
        right = getattr(attention, name)
        plain = functools.partial(with_reference, right)
        monkeypatch.setattr(attention, name, plain)


def with_reference(attention, *tensors, backend, **options):
    return attention(*tensors, **options, backend="reference")


def step(name: str, backend: str) -> list[torch.Tensor]:
    """Loss, and every parameter's gradient, as a hook sees it: an engine that partitions gradients
    (ZeRO) hangs on them, and counts that each parameter's comes once.
    """
    config = load_config(
        None,
        [
            "model.num_layers=2",
            "model.width=16",
            "model.num_heads=2",
            "model.vocabulary_size=11",
            "data.context_length=4",
            "refinement.num_steps=2",
            f"model.attention_backend={backend}",
            *OPTIONS[name],
        ],
    )
    torch.manual_seed(0)
    model = WorldModel(config).double()
    for parameter in model.parameters():  # norms' weights start at 1, adaLN's biases at 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        hook = functools.partial(note_gradient, seen[parameter_name])
        parameter.register_post_accumulate_grad_hook(hook)
    tokens = torch.randint(11, (1, 5), generator=torch.Generator().manual_seed(1))
    output = model(
        tokens[:, :-1], tokens[:, 1:], sample_ids=torch.arange(1), source=NoiseSource(0, 0)
    )
    output.loss.backward()
    assert all(len(gradients) == 1 for gradients in seen.values()), seen.keys()
    return [output.loss.detach(), *(gradients[0] for gradients in seen.values())]


def note_gradient(seen: list[torch.Tensor], parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    seen.append(parameter.grad.clone())


def relative_error(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float((ours - plain).norm() / plain.norm().clamp_min(1e-12))


@pytest.mark.parametrize(
    "name",
    [QUICK, *(pytest.param(name, marks=pytest.mark.soak) for name in OPTIONS if name != QUICK)],
)
def test_loss_and_gradients_are_those_of_plain_pytorch(name):
    errors = map(relative_error, step(name, "triton"), step(name, "reference"))
    assert max(errors) < 1e-10


@pytest.mark.soak
def test_the_comparison_notices_projections_in_another_order(monkeypatch):
    right = attention.joined_product
    monkeypatch.setattr(
        attention, "joined_product", lambda x, *linears: right(x, *reversed(linears))
    )
    with pytest.raises(AssertionError):
        test_loss_and_gradients_are_those_of_plain_pytorch("default")
