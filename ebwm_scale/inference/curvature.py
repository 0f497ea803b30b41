"""The largest eigenvalue of the energy's second derivatives in front of each refinement step: does
a step overshoot?

Along an eigenvector with eigenvalue h a step of size alpha multiplies the distance to the minimum
by 1 - alpha h. So above 2 a step ends further away than it began, on the other side.

With H_e = d2E/de2 of the embedded state e, and u what a step moves:

    probabilities   u = p, e = p W          H = W H_e W'
    mirror          u = x, dx = -alpha dE/dp, p = softmax(x)     H = W H_e W' S,  S = diag p - p p'
    logits          u = x, e = softmax(x) W                      H = d2E/dx2
    embedding       u = x, e = x P' + b                          H = P' H_e P

Power iteration for each group of rows that see each other, by Hessian-vector products: the inner
gradient, differentiated once more. Vectors of the first two and the last kind are W a, with a of
width D; H W a = W (H_e G a), with G = W' W or W' S W. So nothing but S is of the state's size, and
H is symmetric for the product <a, G a>. An iteration finds the eigenvalue of the largest absolute
value; where that is negative, a second one, shifted by it, finds the largest. After NUM_ITERATIONS
rounds it is an estimate from below, where other eigenvalues lie near.

The context is taken as given, and clamps, momentum and decay do not count; what they make of a step
is the step's own spectrum (evaluation/step_spectrum.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.model.states import VocabularyState
from ebwm_scale.refinement.inner_gradient import inner_gradient
from ebwm_scale.refinement.loop import MIN_STEP_SIZE, StepRecord, refine
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.refinement.step_plan import step_scale

NUM_ITERATIONS = 20

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Curvature:
    """In front of one step, float64 on the CPU, of each group of rows (B, S / P).

    eigenvalue: the largest of H. times_alpha: that times the step's size, damping included.
    """

    eigenvalue: Tensor
    times_alpha: Tensor


def energy_curvature(
    model,
    observed: Tensor,
    *,
    sample_ids: Tensor,
    source: NoiseSource,
    conditions: dict[str, Tensor] | None = None,
    step_size_scale: float = 1.0,
) -> list[Curvature]:
    """Of every step of an evaluation of `observed` (B, S) or (B, S, size), from the same noise."""
    config = model.config.refinement
    landscapes = model.landscapes(config.num_steps)
    with torch.no_grad():
        embedded = model.embed_observed(observed, conditions)
        states = _states(model, observed, embedded, landscapes, sample_ids, source)
    function = SequenceEnergy(model, embedded, model.first_visible(observed))
    alpha = model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE) * step_size_scale
    found = []
    for index, (state, landscape) in enumerate(zip(states, landscapes)):
        with torch.no_grad():
            vectors = model.state_space().embed(state.clone()).vectors
        function.begin_step(index, landscape, vectors)
        hessian, product, start = _operator(model, function, state, landscape)
        largest = largest_eigenvalue(hessian, product, start, model.network.group_size)
        scale = float(alpha) * step_scale(config, index)
        found.append(Curvature(largest, largest * scale))
    return found


def largest_eigenvalue(hessian: Map, product: Map, start: Tensor, group_size: int) -> Tensor:
    """(B, S / P) of a map of (B, S, n) that is symmetric for <a, product(b)>, group by group."""

    def inner(left: Tensor, right: Tensor) -> Tensor:
        products = (left * product(right)).sum(-1)
        return products.unflatten(1, (-1, group_size)).sum(-1).double()

    def of_rows(values: Tensor) -> Tensor:
        return values.repeat_interleave(group_size, 1)[..., None].to(start.dtype)

    def iterate(shift: Tensor) -> Tensor:
        vector = start
        value = torch.zeros_like(shift)
        for _ in range(NUM_ITERATIONS):
            length = inner(vector, vector).clamp(min=0).sqrt()
            vector = vector / of_rows(length.clamp(min=1e-30))
            image = hessian(vector) - of_rows(shift) * vector
            value = inner(vector, image)
            vector = image
        return value + shift

    first = iterate(torch.zeros_like(inner(start, start)))
    if bool((first < 0).any()):
        first = iterate(first.clamp(max=0))
    return first.cpu()


def _states(
    model,
    observed: Tensor,
    embedded: Tensor,
    landscapes: list[int],
    sample_ids: Tensor,
    source: NoiseSource,
) -> list[Tensor]:
    """The state (B, S, size) in front of each step."""
    positions = observed.shape[:2]
    noise = TrainingNoise(
        source,
        model.config.refinement,
        sample_ids,
        (positions[0], positions[1], model.state_size),
        kind=model.config.state.initial,
        randomize=False,
        device=embedded.device,
        dtype=model.state_space().dtype,
        last_observed=observed if model.config.state.kind == "embedding" else None,
    )
    states = [noise.initial_state().clone()]

    def remember(step: StepRecord) -> None:
        states.append(step.state)

    refine(
        model,
        embedded,
        None,
        config=model.config.refinement,
        landscapes=landscapes,
        noise=noise,
        training=False,
        record=remember,
        first_visible=model.first_visible(observed),
    )
    return states[:-1]


def _operator(
    model, function: SequenceEnergy, state: Tensor, landscape: int
) -> tuple[Map, Map, Tensor]:
    """(H, the product that it is symmetric for, a vector to begin with)."""
    space = model.state_space()
    is_text = isinstance(space, VocabularyState)
    rule = space.update_rule if is_text else "embedding"
    weight = space.weight.detach() if is_text else space.projection.weight.detach().T  # (size, D)
    x = state.detach().requires_grad_(rule == "logits")
    with torch.enable_grad():
        probabilities = x.softmax(-1)
        if isinstance(space, VocabularyState):
            entered = probabilities.to(weight.dtype) @ weight
        else:
            entered = space.projection(x.to(weight.dtype))
        if rule != "logits":
            entered = entered.detach().requires_grad_()
        gradient = _slope(model, function, entered, landscape)
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> Tensor:
        shape = (*state.shape[:2], width)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(state.device, state.dtype)

    if rule == "logits":
        with torch.enable_grad():
            of_p = (gradient @ weight.T).to(x.dtype)
            of_x = probabilities * (of_p - (probabilities * of_p).sum(-1, keepdim=True))

        def of_logits(v: Tensor) -> Tensor:
            return torch.autograd.grad(of_x, x, v, retain_graph=True)[0]

        return of_logits, lambda v: v, random(state.shape[-1])

    wide = weight.to(state.dtype)
    gram = wide.T @ wide

    def metric(a: Tensor) -> Tensor:
        if rule != "mirror":
            return a @ gram
        moves = a @ wide.T
        p = probabilities.detach()
        return (p * (moves - (p * moves).sum(-1, keepdim=True))) @ wide

    def hessian(a: Tensor) -> Tensor:
        direction = metric(a).to(gradient.dtype)
        image = torch.autograd.grad(gradient, entered, direction, retain_graph=True)[0]
        return image.to(state.dtype)

    return hessian, metric, random(wide.shape[1])


def _slope(model, function: SequenceEnergy, entered: Tensor, landscape: int) -> Tensor:
    """dE/de (B, S, D) with a graph to what entered."""
    config = model.config.refinement.replace(recompute="none", compile=False)
    positions = slice(0, entered.shape[1])
    context = function.context(landscape)
    _, gradient, _ = inner_gradient(
        model.network, entered, context, positions, landscape, needs_graph=True, config=config
    )
    return gradient
