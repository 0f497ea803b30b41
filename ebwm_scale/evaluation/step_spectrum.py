"""What one more refinement step does to a small change of the state: can steps beyond the trained
ones settle?

A step is (x', z') = F(x, z), and a small change d of (x, z) becomes J d. Power iteration gives two
eigenvalues of J for all rows that see each other (the cells of a group; else each row by itself):

    step_eigenvalue      the one of the largest absolute value. Between -1 and 1: changes shrink.
                         Above 1 the energy curves down, below -1 the step is too long for its
                         curvature: changes grow, and further steps lead away.
    alpha_curvature      the same of (1 - c) I - J, with c of `refinement.decay`: where the state
                         itself moves along the energy, that is alpha H, of its second derivatives
                         H. Above 2 - c a step overshoots, below -c changes grow.

Where the energy is flat J is 1 - c. So without decay no step_eigenvalue is far below 1. With
`refinement.damping` alpha and c are those of the step at hand.

With `refinement.momentum` a step is a map of what moved before it as well: step_eigenvalue is that
of this larger map, alpha_curvature that of a step from rest. The larger map can turn: of a pair of
complex eigenvalues the absolute value is given, as the mean growth of several rounds.

The iteration is with J', which has J's eigenvalues: the vector-Jacobian product of one step, whose
inner gradient is differentiated once more. The context is taken as given, also where it is encoded
again. Clamps count as they bind, Langevin noise does not. With `refinement.candidates` all tokens
are taken to move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.evaluation.bootstrap import bootstrap_ci
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.refinement.inner_gradient import inner_gradient
from ebwm_scale.refinement.loop import MIN_STEP_SIZE
from ebwm_scale.refinement.momentum import carried_from, motion_of, plus_carried
from ebwm_scale.refinement.step_plan import INFERENCE_STEP, step_scale

NUM_ITERATIONS = 24
MAX_SAMPLES = 16
MAX_NUMBERS = 2**25  # of a state; a differentiated step holds about ten times as much

Point = tuple[Tensor, ...]
"""x (B, S, size), and z (B, S, width) of a model with a workspace; with momentum behind them what
moved them last, (B, S, D) and (B, S, width).
"""


def step_spectrum(
    model,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    steps: Sequence[int],
    seed: int,
    conditions: Sequence[dict[str, Tensor]] = (),
) -> list[dict[str, Any]]:
    """For each number of steps the eigenvalues where so many steps end: means with intervals over
    samples, and which share of the rows (or groups) has changes that grow.

    batches: (sample ids (B,), observed); the first MAX_SAMPLES samples are read, fewer of states
    so large that they would not fit. conditions: of each batch, where the data has some.
    """
    sample_ids, observed = _first_samples(model, batches)
    own = {
        name: torch.cat([each[name] for each in conditions])[: len(sample_ids)]
        for name in (conditions[0] if conditions else {})
    }
    points = points_after(model, sample_ids, observed, steps=steps, seed=seed, conditions=own)
    rows = []
    for num_steps, (point, function) in points.items():
        landscape = model.landscapes(num_steps)[-1]
        where = (model, function, point, landscape, num_steps)
        eigenvalues = step_eigenvalues(*where)
        curvatures = step_eigenvalues(*where, of_curvature=True)
        rows.append(
            {
                "num_steps": num_steps,
                "num_samples": len(sample_ids),
                "step_eigenvalue": bootstrap_ci(eigenvalues.mean(1)),
                "alpha_curvature": bootstrap_ci(curvatures.mean(1)),
                "share_that_grows": bootstrap_ci((eigenvalues.abs() > 1).double().mean(1)),
            }
        )
    return rows


def points_after(
    model,
    sample_ids: Tensor,
    observed: Tensor,
    *,
    steps: Sequence[int],
    seed: int,
    conditions: dict[str, Tensor] | None = None,
) -> dict[int, tuple[Point, SequenceEnergy]]:
    """States and workspaces after each of some numbers of steps, with the contexts that the last
    step read.
    """
    found = {}
    for num_steps in sorted(set(steps)):
        noise = SequenceSampler(model, seed, sample_ids, observed.shape[1])
        embedded = model.embed_observed(observed, conditions)
        function = SequenceEnergy(model, embedded, model.first_visible(observed))
        frames = observed if model.config.state.kind == "embedding" else None
        z = noise.initial_workspace()
        x = noise.initial(frames)
        point: Point = (x,) if z is None else (x, z)
        if model.config.refinement.momentum:
            still = torch.zeros(*x.shape[:2], embedded.shape[-1]).to(x)
            point += (still,) if z is None else (still, torch.zeros_like(z))
        for i, landscape in enumerate(model.landscapes(num_steps)):
            _, *own = point[: num_positions(model)]
            w = model.workspace().embed(own[0]) if own else None
            embedded = model.state_space().embed(point[0].clone())
            function.begin_step(i, landscape, embedded.vectors, w)
            point = take_step(model, function, point, landscape, i)
        found[num_steps] = (point, function)
    return found


def take_step(
    model,
    function: SequenceEnergy,
    point: Point,
    landscape: int,
    index: int,
    *,
    needs_graph: bool = False,
) -> Point:
    """The point after step `index`, in the context that is there.

    A point without what moved it last takes a step from rest, and what comes after has none either.
    """
    config = model.config.refinement.replace(recompute="none", compile=False)
    state_space, workspace = model.state_space(), model.workspace()
    x = point[0] if needs_graph else point[0].clone()  # embedding may overwrite it
    plan = dataclasses.replace(INFERENCE_STEP, needs_graph=needs_graph, keep_graph=needs_graph)
    with torch.set_grad_enabled(needs_graph):
        embedded = state_space.embed(x)
        w = None if workspace is None else workspace.embed(point[1])
        _, gradient, of_w = inner_gradient(
            model.network,
            embedded.vectors,
            function.context(landscape),
            slice(0, x.shape[1]),
            landscape,
            needs_graph=needs_graph,
            config=config,
            workspace=w,
        )
        alpha = model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE)
        scale = step_scale(config, index)
        embedded = embedded.decayed(1 - config.decay * scale)
        num_parts = num_positions(model)
        motions = [carried_from(motion, config.momentum) for motion in point[num_parts:]]
        carried = motions[0] if motions else None
        state, *_ = state_space.update(embedded, gradient, alpha * scale, None, plan, carried)
        after: Point = (state,)
        moved: Point = (motion_of(gradient, alpha * scale, carried, state.dtype),)
        if workspace is not None and of_w is not None:
            change = workspace.change(of_w, state.dtype, scale)
            change = plus_carried(change, motions[1] if motions else None)
            after += (workspace.update(point[1], change, scale, config.decay),)
            moved += (change,)
        return after + moved if motions else after


def num_positions(model) -> int:
    """How many parts of a point say where it is, and not how it moves."""
    return 1 if model.workspace() is None else 2


def step_eigenvalues(
    model,
    function: SequenceEnergy,
    point: Point,
    landscape: int,
    index: int,
    *,
    of_curvature: bool = False,
) -> Tensor:
    """Of step `index` from there: (B, S) of each row, or (B, S / P) of each group, by power
    iteration; float64, on the CPU.

    of_curvature: of (1 - c) I - J in place of J, at rest.
    """
    if of_curvature:
        point = point[: num_positions(model)]
    group_size = model.network.group_size
    refinement = model.config.refinement
    kept = 1 - refinement.decay * step_scale(refinement, index)
    start = tuple(part.detach().clone().requires_grad_() for part in point)
    after = take_step(model, function, start, landscape, index, needs_graph=True)
    generator = torch.Generator().manual_seed(0)
    direction: Point = tuple(
        torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part) for part in start
    )
    rounds = []
    for _ in range(NUM_ITERATIONS):
        length = _inner(direction, direction, group_size).sqrt()
        direction = _divided(direction, length.clamp(min=1e-30), group_size)
        image = torch.autograd.grad(
            after, start, direction, retain_graph=True, materialize_grads=True
        )
        if of_curvature:
            image = tuple(kept * v - u for v, u in zip(direction, image))
        along = _inner(image, direction, group_size)
        rounds.append(along.sign() * _inner(image, image, group_size).sqrt())
        direction = image
    if len(point) > num_positions(model):
        return _mean_growth(torch.stack(rounds[NUM_ITERATIONS // 2 :])).double().cpu()
    return rounds[-1].double().cpu()


def _mean_growth(rounds: Tensor) -> Tensor:
    """Of the growths (R, ..) of several rounds: below 0 if all of them are."""
    turns = torch.where((rounds < 0).all(0), -1.0, 1.0)
    return turns * rounds.abs().clamp(min=1e-30).log().mean(0).exp()


def _inner(left: Point, right: Point, group_size: int) -> Tensor:
    """Inner products (B, S / P) over all numbers of a row or group."""
    products = torch.stack([(u * v).sum(-1) for u, v in zip(left, right)]).sum(0)
    return products.unflatten(1, (-1, group_size)).sum(-1)


def _divided(point: Point, by: Tensor, group_size: int) -> Point:
    """by: (B, S / P)."""
    of_rows = by.repeat_interleave(group_size, 1)[..., None]
    return tuple(part / of_rows for part in point)


def _first_samples(model, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, observed = batches[0]
    numbers = observed.shape[1] * model.state_size
    count = min(MAX_SAMPLES, max(1, MAX_NUMBERS // numbers))
    taken = [(ids, observed)]
    while sum(len(part) for part, _ in taken) < min(count, sum(len(b[0]) for b in batches)):
        taken.append(batches[len(taken)])
    sample_ids = torch.cat([part for part, _ in taken])[:count]
    return sample_ids, torch.cat([part for _, part in taken])[:count]
