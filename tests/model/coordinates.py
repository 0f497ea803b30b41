"""The coordinate check: how far a few AdamW steps move what a model computes, at several widths.

Source: Tensor Programs V, arXiv 2203.03466, appendix D.1. For an energy model the inner gradient
and what a refinement step does to the logits are coordinates too.
"""

from __future__ import annotations

import math

import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.schema import Config
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.optimizer import new_optimizer
from ebwm_scale.world_model import WorldModel

WIDTHS = (64, 128, 256)
BASE = 32
VOCABULARY, SAMPLES, POSITIONS = 32, 4, 8
STEPS, RATE, STEP_SIZE = 6, 0.004, 2.0


def width_config(
    width: int,
    *,
    scaled: bool = True,
    kind: str = "energy",
    base_num_heads: int = 2,
    optimizer: dict | None = None,
    state: dict | None = None,
    **model,
) -> Config:
    """A two-layer model of text; heads of 16 numbers unless model says otherwise."""
    section = {
        "kind": kind,
        "num_layers": 2,
        "width": width,
        "num_heads": width // 16,
        "vocabulary_size": VOCABULARY,
        "predicted_input": "anchored",
        **model,
    }
    if scaled:
        section |= {"parametrization": "width_scaled", "base_width": BASE}
        section["base_num_heads"] = base_num_heads
    refinement = {"num_steps": 2, "step_size": STEP_SIZE, "update": "mirror", "graph": "full"}
    return config_from_dict(
        {
            "model": section,
            "state": {"initial": "zeros", "map_scale": 10.0, **(state or {})},
            "refinement": {**refinement, "learning_rate_multiplier": 6.0},
            "data": {"context_length": POSITIONS},
            "optimizer": {"learning_rate": RATE, **(optimizer or {})},
        }
    )


def new_model(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> WorldModel:
    torch.manual_seed(seed)
    return WorldModel(config).to(dtype).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(observed, targets), (SAMPLES, POSITIONS) token ids."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (SAMPLES, POSITIONS + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def run(model: WorldModel, **options):
    observed, targets = batch()
    ids = torch.arange(SAMPLES)
    return model(observed, targets, sample_ids=ids, source=NoiseSource(0, 0), **options)


def train(model: WorldModel, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    """The losses in front of each update; rates as the engine sets them."""
    rate = model.config.optimizer.learning_rate
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(model).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def coordinates(model: WorldModel) -> dict[str, torch.Tensor]:
    """What is to stay O(1) per number: hidden and logits of a baseline; of an energy model e of
    states that are sure, the normed output, E, dE/de times the width, alpha W dE/de and the refined
    prediction.
    """
    observed, _ = batch()
    with torch.no_grad():
        embedded = model.embed_observed(observed)
        if model.config.model.kind == "baseline":
            hidden = model.network(embedded)
            return {"activations": hidden, "prediction": model.output(hidden)}
    network, space = model.energy_network, model.state_space()
    with torch.no_grad():
        context = network.encode_context(embedded)
        candidates = space.embed_zeros(tuple(observed.shape)).vectors
    entering = []
    hook = network.norm.register_forward_hook(lambda _, __, out: entering.append(out.detach()))
    candidates = candidates.detach().clone().requires_grad_()
    energy = network.energy(candidates, context)
    hook.remove()
    (gradient,) = torch.autograd.grad(energy.sum(), candidates)
    with torch.no_grad():
        moved = model.step_size * gradient @ space.weight.T
        model.eval()
        state = run(model, keep_state=gradient.dtype).state
        model.train()
    return {
        "embedded states": space.weight.detach().clone(),
        "activations": entering[0],
        "energy": energy.detach(),
        "inner gradient": gradient * gradient.shape[-1],
        "step of the logits": moved,
        "prediction": state.log_softmax(-1),
    }


def changes(width: int, *, seeds: int = 2, **options) -> dict[str, float]:
    """Root mean square of what training changes in each coordinate, averaged over seeds."""
    sums: dict[str, float] = {}
    for seed in range(seeds):
        config = width_config(width, **options)
        model = new_model(config, seed)
        before = coordinates(model)
        train(model, new_optimizer(model, config))
        for name, after in coordinates(model).items():
            change = (after - before[name]).square().mean().sqrt().item()
            sums[name] = sums.get(name, 0.0) + change / seeds
    return sums


def growth(**options) -> dict[str, float]:
    """By coordinate: the power of the width with which its change grows, over WIDTHS."""
    found = [changes(width, **options) for width in WIDTHS]
    logs = torch.tensor([math.log(width) for width in WIDTHS])
    logs = logs - logs.mean()
    powers = {}
    for name in found[0]:
        values = torch.tensor([math.log(of_width[name]) for of_width in found])
        powers[name] = ((values * logs).sum() / logs.square().sum()).item()
    return powers
