"""The inner gradient: the energy of a candidate and its derivative with respect to it.

    E (B, s)     energies of candidates (B, s, D); rows do not see each other's candidates,
    g (B, s, D)  so g = d(sum E) / d candidates holds every row's own gradient
                 (with groups: every group's own gradient, rows of a group see each other's)

With a workspace, whose mapped rows w (B, s, D) enter beside the candidates, dE/dw comes with it.
Under needs_graph all are differentiable once more with respect to everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.context import Context
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.refinement import block_recompute


def inner_gradient(
    network: EnergyTransformer,
    candidates: Tensor,
    context: Context,
    positions: slice,
    landscape: int,
    *,
    needs_graph: bool,
    config: RefinementConfig,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(E (B, s), g (B, s, D), dE/dw (B, s, D) or None) for some positions of the context.

    candidates e and workspace w: (B, s, D).

    config.recompute: "step" computes the step again in the backward, "block" one block at a time.
    config.compile: TorchInductor generates the code of a differentiated step, once for each shape
    and for each landscape that the blocks are conditioned on.
    """
    if needs_graph:
        # The context may be made of the candidates too (`refinement.reencode`). The inner gradient
        # is that of the row alone: of a tensor which only the predicted stream sees.
        own = [u.view_as(u) for u in (candidates, workspace) if u is not None]
    else:
        own = [u.detach().requires_grad_() for u in (candidates, workspace) if u is not None]
    if needs_graph and config.compile:
        return *_run_compiled(network, own[0], context, positions, landscape), None
    if config.recompute == "block":
        energy, *gradients = block_recompute.energy_and_gradients(
            network,
            own,
            context.visible_to(positions),
            landscape,
            needs_graph=needs_graph,
        )
        return energy, gradients[0], gradients[1] if workspace is not None else None

    def compute(own: list[Tensor], context: Context) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            energy = network.energy(own[0], context.visible_to(positions), landscape, *own[1:])
            gradients = torch.autograd.grad(energy.sum(), own, create_graph=needs_graph)
        return energy, *gradients

    if needs_graph and config.recompute == "step":
        found = checkpoint(compute, own, context, use_reentrant=False)
    else:
        found = compute(own, context)
    return found[0], found[1], found[2] if workspace is not None else None


def energy_of(
    network: EnergyTransformer,
    candidates: Tensor,
    context: Context,
    positions: slice,
    landscape: int,
    *,
    config: RefinementConfig,
    workspace: Tensor | None = None,
    needs_graph: bool = False,
) -> Tensor:
    """E (B, s) alone; arguments as those of inner_gradient.

    Without a graph, or under needs_graph differentiable once.
    """
    with torch.set_grad_enabled(needs_graph):
        if config.recompute != "block":
            return network.energy(candidates, context.visible_to(positions), landscape, workspace)
        # It gathers a block when its turn comes.
        energy, *_ = inner_gradient(
            network,
            candidates,
            context,
            positions,
            landscape,
            needs_graph=needs_graph,
            config=config,
            workspace=workspace,
        )
        return energy


def _run_compiled(
    network: EnergyTransformer,
    candidates: Tensor,
    context: Context,
    positions: slice,
    landscape: int,
) -> tuple[Tensor, Tensor]:
    if network.modulations is None:
        landscape = 0  # the blocks are the same in all landscapes: one compilation serves them
    keys_values = []
    for keys, values in context.keys_values:
        keys_values += [keys, values]
    # The function is given tensors: what is compiled has to see each of them as an input.
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
        return _compiled()(
            network,
            candidates,
            positions.start,
            positions.stop,
            landscape,
            context.offset,
            context.anchor,
            context.readout,
            context.first_visible,
            *keys_values,
        )


@functools.cache
def _compiled() -> Callable:
    """Made when it is first needed: asking for a compiler imports one, 90 MiB and a second."""
    return torch.compile(_gradient_inside, fullgraph=True, dynamic=False)


def _gradient_inside(
    network: EnergyTransformer,
    candidates: Tensor,
    start: int,
    stop: int,
    landscape: int,
    offset: int,
    anchor: Tensor | None,
    readout: Tensor | None,
    first_visible: Tensor | None,
    *keys_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """The inner gradient is taken inside the compiled function.

    So what is compiled is differentiated once, which is all that torch.compile supports.
    """
    pairs = list(zip(keys_values[::2], keys_values[1::2]))
    context = network.context(pairs, offset, anchor, readout, first_visible)
    energy = network.energy(candidates, context.visible_to(slice(start, stop)), landscape)
    (gradient,) = torch.autograd.grad(energy.sum(), candidates, create_graph=True)
    return energy, gradient
