"""The refinement and its gradients by definition, in plain autograd, for tests to compare with.

Written for reading: materialised softmax, plain autograd through the state itself, detaching by
hand; the network's fused operations are replaced by their definitions. (The network's structure
is held against the released code's numbers in test_parity.py.)
"""

import contextlib
import math
from unittest import mock

import torch
from torch.nn import functional as F

from ebwm_kernels.attention.causal import causal_attention_definition
from ebwm_kernels.attention.energy import energy_attention_definition
from ebwm_kernels.pointwise import rms_norm_reference, swiglu_reference
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.resolved import reencoded_blocks
from ebwm_scale.model import attention, blocks, norm
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.refinement.step_plan import graph_spans_steps, has_graph, last_encoding
from ebwm_scale.world_model import WorldModel

V, B, S = 13, 3, 5


CONDITIONINGS = ("default", "time_embed", "adaln", "adaln_zero", "predicted_only")


def build(*, kind="vocabulary", model=None, state=None, refinement=None, z_loss=0.0):
    state = {"kind": kind, **({"dimension": 7} if kind == "embedding" else {}), **(state or {})}
    config = config_from_dict(
        {
            "model": {
                "num_layers": 2,
                "width": 16,
                "num_heads": 4,
                **({"vocabulary_size": V} if kind == "vocabulary" else {}),
                **(model or {}),
            },
            "state": state,
            "refinement": {"num_steps": 2, "step_size": 3.0, **(refinement or {})},
            "train": {"z_loss": z_loss},
        }
    )
    torch.manual_seed(1)
    world_model = WorldModel(config).double()
    for (
        parameter
    ) in world_model.parameters():  # zero-initialised parts must not hide a missing path
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, parameter in world_model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # nor may a weight of one
            parameter.data += 0.2 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(2)
    if kind == "vocabulary":
        tokens = torch.randint(V, (B, S + 1), generator=generator)
        return world_model, tokens[:, :-1], tokens[:, 1:]
    frames = torch.randn(B, S + 1, 7, generator=generator, dtype=torch.float64)
    return world_model, frames[:, :-1], frames[:, 1:]


def without_backend(definition):
    def operation(*tensors, backend, shift=None):
        assert shift is None, "plain modulation is applied behind the norm"
        return definition(*tensors)

    return operation


def add_rms_norm_reference(x, added, weight, epsilon, *, shift, backend):
    assert shift is None, "plain modulation is applied behind the norm"
    total = x + added
    return total, rms_norm_reference(total, weight, epsilon)


@contextlib.contextmanager
def plain_operations():
    with (
        mock.patch.object(
            attention,
            "energy_attention",
            # the definition knows no backend
            lambda *a, backend, **o: energy_attention_definition(*a, **o),  # noqa: PLW0108
        ),
        mock.patch.object(
            attention,
            "causal_attention",
            lambda *a, backend, **o: causal_attention_definition(*a, **o),  # noqa: PLW0108
        ),
        mock.patch.object(norm, "rms_norm", without_backend(rms_norm_reference)),
        mock.patch.object(norm, "add_rms_norm", add_rms_norm_reference),
        mock.patch.object(blocks, "swiglu", without_backend(swiglu_reference)),
    ):
        yield


def reference_energy(model, candidate, observed, landscape, fed=None, workspace=None):
    """Both streams block by block, and the head's terms written out.

    fed (B, S, D) each: predictions, and mapped workspaces or None, that the observed stream is
    encoded again with. workspace (B, S, D): mapped, of the candidates.
    """
    network, settings = model.network, model.config.model
    refinement, state = model.config.refinement, model.config.state
    o, offset = network.prepend_landscape(observed, landscape)
    of_observed, _ = network.modulations_of(landscape, predicted=False)
    of_predicted, final = network.modulations_of(landscape, predicted=True)
    rotary = network.rotary(o.shape[1] + 1, o)
    at_observed = rotary.slice(0, o.shape[1])
    at_predicted = rotary.slice(offset + 1, S)
    first = settings.num_layers - settings.predicted_layers
    p = candidate if workspace is None else candidate + workspace
    entered = o
    for _ in range(settings.loops - 1):
        for layer, modulation in zip(network.layers, of_observed):
            pair = layer.keys_values(o, at_observed, modulation)
            o = layer.forward_observed(o, *pair, at_observed, modulation)
        o = o + entered
    for index, layer in enumerate(network.layers):
        if fed is not None and index == settings.num_layers - reencoded_blocks(model.config):
            change = fed[0] @ network.feedback.weight.T
            if fed[1] is not None:
                change = change + fed[1] @ network.workspace_feedback.weight.T
            o = torch.cat([o[:, :offset], o[:, offset:] + change], 1)
        if index == first and settings.predicted_input == "anchored":
            p = p + o[:, offset:]
        pair = layer.keys_values(o, at_observed, of_observed[index])
        if index >= first:
            p = layer.forward_predicted(p, pair, at_predicted, offset, of_predicted[index - first])
        o = layer.forward_observed(o, *pair, at_observed, of_observed[index])
    n = network.norm(p)
    if final is not None:
        shift, scale = final
        n = n * (1 + scale) + shift
    energy = torch.zeros(n.shape[:2], dtype=n.dtype)
    if "linear" in settings.energy_head:
        energy = energy + n @ network.head.weight[0]
    if "quadratic" in settings.energy_head:
        quadratic = network.content.quadratic.weight
        energy = energy - torch.einsum("bsi,ij,bsj->bs", n, quadratic, n) / 2
    units = 1 / (refinement.step_size * state.map_scale)
    if "bilinear" in settings.energy_head:
        bilinear = network.content.bilinear.weight
        energy = energy - units * torch.einsum("bsi,ij,bsj->bs", candidate, bilinear, n)
        if workspace is not None:
            own = network.content.workspace.weight / refinement.workspace_step_size
            energy = energy - torch.einsum("bsi,ij,bsj->bs", workspace, own, n)
    if "direct" in settings.energy_head:
        energy = energy - units * torch.einsum("bsi,bsi->bs", candidate, n)
    if "context" in settings.energy_head:
        context = network.content.context.weight
        h = network.content.context_norm(o[:, offset:])
        energy = energy - units * torch.einsum("bsi,ij,bsj->bs", candidate, context, h)
    return energy


def reference_loss(model, observed, targets, *, num_steps, source, sample_ids):
    """The papers' algorithm by hand; all draws from the same addresses."""
    config, kind = model.config.refinement, model.config.state.kind
    size = V if kind == "vocabulary" else 7
    draws = TrainingNoise(
        source,
        config,
        sample_ids,
        (B, S, size),
        kind=model.config.state.initial,
        dtype=torch.float64,
        last_observed=observed if kind == "embedding" else None,
        workspace=model.config.state.workspace,
        workspace_kind=model.config.state.workspace_initial,
    )
    has_workspace = model.config.state.workspace is not None
    z = draws.initial_workspace() if has_workspace else torch.zeros(())
    alpha = model.step_size.squeeze(0).clamp(min=1e-4) * draws.step_size_factor()
    embedded_observed = model.embed_observed(observed)
    x, losses, fed = draws.initial_state(), [], None
    velocity = z_velocity = torch.zeros(())
    moved = added = torch.zeros(())  # of the penalty: in front of the map
    lengths, penalties = None, []
    level_terms = []
    shrunk = 1.0 if config.accept == "always" else torch.ones((), dtype=torch.float64)
    scored_from = max(0, num_steps - (config.backprop_steps or num_steps))
    for i, landscape in enumerate(model.landscapes(num_steps)):
        beyond = max(1.0, (i + 1) / config.damping_after)
        scale = shrunk / beyond**config.damping
        last = i == num_steps - 1
        if config.graph != "full" or i <= scored_from:
            x = x.detach()
            velocity, z_velocity = velocity.detach(), z_velocity.detach()
            moved, added = moved.detach(), added.detach()
        noise = draws.langevin(i)
        x = x if noise is None else x + noise
        if not x.requires_grad:
            x = x.requires_grad_()
        if kind == "vocabulary":
            weight = (
                model.token_embedding.weight
                if model.config.state.tie_embedding
                else model.state_map
            ) * model.config.state.map_scale
            shared = x.softmax(-1) @ weight
            x = x.view_as(x)  # the candidate's own: the inner gradient stays within the row
            moving = p = x.softmax(-1)
            candidate = p @ weight
        else:
            shared = F.linear(x, model.frame_projection.weight, model.frame_projection.bias)
            moving = x = x.view_as(x)
            candidate = F.linear(x, model.frame_projection.weight, model.frame_projection.bias)
        shared_workspace = workspace = None
        if config.graph != "full" or i <= scored_from:
            z = z.detach()
        if has_workspace:
            shared_workspace = z @ model.network.workspace_map.weight.T
            z = z.view_as(z) if z.requires_grad else z.requires_grad_()
            workspace = z @ model.network.workspace_map.weight.T
        if last_encoding(config, i) == i > 0:
            fed = [shared, shared_workspace]
            if not has_graph(config, i, num_steps):
                fed = [None if u is None else u.detach() for u in fed]
        energy = reference_energy(model, candidate, embedded_observed, landscape, fed, workspace)
        if config.level_weight and i > 0 and has_graph(config, i, num_steps):
            level_terms.append(level_term(model, x.detach(), energy, targets))
        by = x if kind == "vocabulary" and config.update == "logits" else moving
        if has_workspace:
            gradient, z_gradient = torch.autograd.grad(energy.sum(), (by, z), create_graph=True)
            beta = scale * model.workspace_step_size.squeeze(0)
            z_velocity = config.momentum * z_velocity - beta * z_gradient
            z_before, z = z, (1 - config.decay * scale) * z + z_velocity
        else:
            (gradient,) = torch.autograd.grad(energy.sum(), by, create_graph=True)
        # Momentum is kept in front of the map. Where the map is linear and the graph goes through
        # all steps, that is the state's own.
        through_all = config.graph == "full" and config.backprop_steps is None
        in_front = config.momentum > 0 and not (through_all and config.update != "logits")
        if in_front:
            (gradient,) = torch.autograd.grad(energy.sum(), candidate, create_graph=True)
        if config.graph == "truncate" and not last:
            gradient = gradient.detach()
        start = moving if config.update == "probabilities" else x
        if config.graph != "full":
            start = start.detach()
        step = alpha.detach() if config.graph == "truncate" and not last else alpha
        if config.spectral_penalty:
            (of_e,) = torch.autograd.grad(energy.sum(), candidate, create_graph=True)
            moved = config.momentum * moved - step * scale * of_e
            move = moved - config.decay * scale * draws.step_size_factor() * added
            added = added + move
            moves = [move] + ([z - z_before] if has_workspace else [])
            before, lengths = lengths, [length_of_group(model, u) for u in moves]
            if before is not None and has_graph(config, i, num_steps):
                ratios = [a / b.detach() for a, b in zip(lengths, before)]
                bound = config.spectral_bound
                penalties.append(sum(F.relu(r - bound).square().mean() for r in ratios))
        stays = start
        start = (1 - config.decay * scale * draws.step_size_factor()) * start
        change = velocity = config.momentum * velocity - step * scale * gradient
        if in_front and kind == "embedding":
            change = velocity @ model.frame_projection.weight
        elif in_front:
            change = velocity @ weight.T
            if config.update == "logits":
                change = p * (change - (p * change).sum(-1, keepdim=True))
        if config.change_clamp is not None:
            change = torch.clamp(change, -config.change_clamp, config.change_clamp)
        x = start + change
        if config.state_clamp is not None:
            x = torch.clamp(x, -config.state_clamp, config.state_clamp)
        if model.config.model.logit_softcap is not None:
            cap = model.config.model.logit_softcap
            x = cap * torch.tanh(x / cap)
        if config.accept == "lower":
            taken = lowers(
                model,
                (stays, z_before if has_workspace else None, energy),
                (x, z if has_workspace else None),
                lambda e, w: reference_energy(model, e, embedded_observed, landscape, fed, w),
            )
            x = torch.where(taken, x, stays)
            velocity = torch.where(taken, velocity, 0)
            shrunk = torch.where(taken, shrunk, shrunk / 2)
            if has_workspace:
                z = torch.where(taken, z, z_before)
                z_velocity = torch.where(taken, z_velocity, 0)
        losses.append(
            F.cross_entropy(x.flatten(0, 1), targets.flatten())
            if kind == "vocabulary"
            else F.smooth_l1_loss(x, targets)
        )
        if kind == "vocabulary" and model.config.train.z_loss:
            losses[-1] = losses[-1] + model.config.train.z_loss * x.logsumexp(-1).square().mean()
        if config.graph == "truncate" and not last:
            losses[-1] = losses[-1].detach()
    if config.level_weight:
        if not graph_spans_steps(config, num_steps):
            x, z = x.detach(), z.detach()
        e, w = embedded(model, x, z if has_workspace else None)
        energy = reference_energy(model, e, embedded_observed, landscape, fed, w)
        level_terms.append(level_term(model, x.detach(), energy, targets))
    penalty = config.spectral_penalty * sum(penalties) / max(1, len(penalties))
    penalty = penalty + config.level_weight * sum(level_terms) / max(1, len(level_terms))
    if config.loss == "last":
        return losses[-1] + penalty
    if config.loss_weights == "exits":
        q = model.exit_logits[scored_from:num_steps].softmax(-1)
        divergence = (q * (q * len(q)).log()).sum()
        expected = (q * torch.stack(losses[scored_from:])).sum()
        return expected + config.exit_entropy * divergence + penalty
    weights = torch.ones(num_steps, dtype=torch.float64)
    if config.loss_weights == "rising":
        weights = torch.arange(1, num_steps + 1, dtype=torch.float64).square()
    elif config.loss_weights is not None:
        weights = torch.tensor(config.loss_weights[-num_steps:], dtype=torch.float64)
    weights[:scored_from] = 0
    return (weights / weights.sum() * torch.stack(losses)).sum() + penalty


def level_term(model, x, energy, targets):
    """Mean over scored rows of (energy - loss)^2; of groups, of their means."""
    size = model.network.group_size
    if model.config.state.kind == "embedding":
        costs = F.smooth_l1_loss(x, targets, reduction="none").mean(-1)
        scored = torch.ones_like(costs)
    else:
        flat = F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none")
        costs, scored = flat.view(targets.shape), (targets != -100).to(x.dtype)
    total = 0
    for sample in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            rows = (sample, slice(start, start + size))
            count = scored[rows].sum()
            if count > 0:
                cost = costs[rows].sum() / count
                total = total + count * (energy[rows].mean() - cost) ** 2
    return total / scored.sum()


@torch.no_grad()
def lowers(model, before, after, energy_of):
    """(B, S, 1): rows whose energy, with what decay adds, is lower after a step; a group together.

    before: (x, z, energy), after: (x, z).
    """
    config, size = model.config.refinement, model.network.group_size

    def whole(x, z, energy):
        decay = config.decay * (1 - config.momentum)
        if config.update == "mirror":
            log_p = x.log_softmax(-1)
            of_x = (log_p.exp() * (log_p + math.log(x.shape[-1]))).sum(-1)
        else:
            of_x = x.square().sum(-1) / 2
        energy = energy + decay / model.step_size * of_x
        if z is not None:
            energy = energy + decay / model.workspace_step_size * z.square().sum(-1) / 2
        return energy.unflatten(1, (-1, size)).sum(-1)

    fall = whole(*before) - whole(*after, energy_of(*embedded(model, *after)))
    return (fall > 0).repeat_interleave(size, 1)[..., None]


def embedded(model, x, z):
    """What enters the predicted stream: e of states x (B, S, size), w of workspaces z or None."""
    if model.config.state.kind == "embedding":
        e = F.linear(x, model.frame_projection.weight, model.frame_projection.bias)
    else:
        tied = model.config.state.tie_embedding
        weight = model.token_embedding.weight if tied else model.state_map
        e = x.softmax(-1) @ (weight * model.config.state.map_scale)
    w = None if z is None else z @ model.network.workspace_map.weight.T
    return e, w


def length_of_group(model, move):
    """(B, S / P) of a move (B, S, ..): over all numbers of the rows that see each other."""
    return move.unflatten(1, (-1, model.network.group_size)).square().sum((2, 3)).sqrt()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def compare(model, observed, targets, *, num_steps=2, whole_gradient=1e-10):
    """Loss to 1e-13; each parameter's gradient to rounding, and all of them together to
    `whole_gradient`, relative to their norm.
    """
    sample_ids, source = torch.tensor([4, 9, 2]), NoiseSource(5, 6)
    model.train()
    ours = model(observed, targets, sample_ids=sample_ids, source=source, num_steps=num_steps).loss
    ours_gradients = gradients(model, ours)
    with plain_operations():
        reference = reference_loss(
            model, observed, targets, num_steps=num_steps, source=source, sample_ids=sample_ids
        )
        reference_gradients = gradients(model, reference)
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)
    pairs = [
        (ours_gradients[name], expected)
        for name, expected in reference_gradients.items()
        if expected is not None and ours_gradients[name] is not None
    ]
    error, norm = (
        sum(u.square().sum() for u in parts).sqrt()
        for parts in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    assert error <= whole_gradient * norm, float(error / norm)
    largest = max(g.abs().max() for g in reference_gradients.values() if g is not None)
    for name, expected in reference_gradients.items():
        actual = ours_gradients[name]
        if expected is None or actual is None:  # autograd says None or zeros for what cannot matter
            assert all(g is None or g.abs().max() <= 1e-14 * largest for g in (expected, actual)), (
                name
            )
            continue
        torch.testing.assert_close(
            actual, expected, rtol=1e-10, atol=float(1e-12 * largest), msg=lambda m: f"{name}: {m}"
        )
    return ours.item()


ALL_TERMS = ["linear", "quadratic", "bilinear", "context"]


CONTENT = ["linear", "bilinear", "context"]
