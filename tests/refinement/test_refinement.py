"""Every combination of the refinement's choices is the papers' algorithm, to second order, in
float64; evaluation is cheap and leaves no trace.

The reference below is written for reading: materialised softmax, plain autograd through the state
itself, detaching by hand; the network's fused operations are replaced by their definitions. (The
network's structure is held against the released code's numbers in test_parity.py.)
"""

import contextlib
import dataclasses
import itertools
import math
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from ebwm_kernels.attention.energy import energy_attention_definition
from ebwm_kernels.pointwise import rms_norm_reference, swiglu_reference
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.resolved import reencoded_blocks
from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model import blocks, states
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.refinement import block_recompute, deferred_backward
from ebwm_scale.refinement import loop as refinement_loop
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.refinement.step_plan import has_graph, last_encoding, plan_steps
from ebwm_scale.refinement.tiling import tiles_of
from ebwm_scale.world_model import WorldModel

V, B, S = 13, 3, 5
CONDITIONINGS = ("default", "time_embed", "adaln", "adaln_zero", "predicted_only")


def build(*, kind="vocabulary", model=None, state=None, refinement=None):
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
        }
    )
    torch.manual_seed(1)
    world_model = WorldModel(config).double()
    for (
        parameter
    ) in world_model.parameters():  # zero-initialised parts must not hide a missing path
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(2)
    if kind == "vocabulary":
        tokens = torch.randint(V, (B, S + 1), generator=generator)
        return world_model, tokens[:, :-1], tokens[:, 1:]
    frames = torch.randn(B, S + 1, 7, generator=generator, dtype=torch.float64)
    return world_model, frames[:, :-1], frames[:, 1:]


@contextlib.contextmanager
def plain_operations():
    with (
        mock.patch.object(
            blocks,
            "energy_attention",
            # the definition knows no backend
            lambda *a, backend, **o: energy_attention_definition(*a, **o),  # noqa: PLW0108
        ),
        mock.patch.object(blocks, "rms_norm", rms_norm_reference),
        mock.patch.object(blocks, "swiglu", swiglu_reference),
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
    shrunk = 1.0 if config.accept == "always" else torch.ones((), dtype=torch.float64)
    scored_from = max(0, num_steps - (config.backprop_steps or num_steps))
    for i, landscape in enumerate(model.landscapes(num_steps)):
        scale = shrunk / (i + 1) ** config.damping
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
        if config.graph == "truncate" and not last:
            losses[-1] = losses[-1].detach()
    penalty = config.spectral_penalty * sum(penalties) / max(1, len(penalties))
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

    x, z = after
    if model.config.state.kind == "embedding":
        e = F.linear(x, model.frame_projection.weight, model.frame_projection.bias)
    else:
        e = x.softmax(-1) @ (model.state_map * model.config.state.map_scale)
    w = None if z is None else z @ model.network.workspace_map.weight.T
    fall = whole(*before) - whole(x, z, energy_of(e, w))
    return (fall > 0).repeat_interleave(size, 1)[..., None]


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


@pytest.mark.parametrize(
    "graph, loss, update",
    itertools.product(
        ("detach", "truncate", "full"), ("every", "last"), ("probabilities", "logits", "mirror")
    ),
)
@pytest.mark.parametrize("predicted_input", ["state", "anchored"])
def test_every_combination_of_graph_loss_and_update_is_exact(graph, loss, update, predicted_input):
    for conditioning in CONDITIONINGS:
        compare(
            *build(
                model={"conditioning": conditioning, "predicted_input": predicted_input},
                refinement={"graph": graph, "loss": loss, "update": update},
            ),
            whole_gradient=2e-12,  # rounding: 1.04e-12 with mirror steps through the full graph
        )


@pytest.mark.parametrize(
    "graph, loss", itertools.product(("detach", "truncate", "full"), ("every", "last"))
)
@pytest.mark.parametrize(
    "name, options",
    {
        "grouped_heads": {"model": {"num_kv_heads": 2}},
        "one_key_head": {"model": {"num_kv_heads": 1}},
        "tied": {"state": {"tie_embedding": True}},
        "scaled_map": {"state": {"map_scale": 7.0}},
        "zeros": {"state": {"initial": "zeros"}},
        "wide": {"model": {"feed_forward_width": 24}},
        "randomised": {
            "refinement": {"step_size_random_factor": 2.0, "noise": 0.7, "num_steps": 3}
        },
        "three_steps_one_landscape": {
            "model": {"conditioning": "time_embed"},
            "refinement": {"num_steps": 3, "landscapes": "one"},
        },
        "tiles_of_one_sample": {"refinement": {"tile_rows": 5, "num_steps": 3}},
        "tiles_of_two_samples": {"refinement": {"tile_rows": 12}},
        "parts_of_samples": {
            "refinement": {"tile_rows": 2, "step_size_random_factor": 2.0, "noise": 0.7}
        },
        "parts_with_landscapes": {
            "model": {"conditioning": "time_embed", "predicted_input": "anchored"},
            "refinement": {"tile_rows": 3, "num_steps": 3},
        },
        "parts_of_frames": {
            "kind": "embedding",
            "model": {"conditioning": "adaln"},
            "refinement": {"tile_rows": 2},
        },
        "parts_scaled_and_tied": {
            "state": {"map_scale": 7.0, "tie_embedding": True},
            "refinement": {"tile_rows": 4, "update": "logits"},
        },
        "checkpoint_step": {"refinement": {"recompute": "step"}},
        "checkpoint_block": {"refinement": {"recompute": "block"}},
        "blocks_in_parts_of_samples": {
            "model": {"conditioning": "adaln", "num_kv_heads": 2},
            "refinement": {"recompute": "block", "tile_rows": 3},
        },
        "blocks_with_time_embed": {
            "model": {"conditioning": "time_embed", "predicted_input": "anchored"},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "blocks_of_frames": {
            "kind": "embedding",
            "model": {"conditioning": "predicted_only"},
            "refinement": {"recompute": "block"},
        },
        "clamped": {"refinement": {"change_clamp": 5.0, "state_clamp": 4.0, "num_steps": 3}},
        "change_clamped": {"refinement": {"change_clamp": 4.0, "tile_rows": 3}},
        "clamped_logits": {
            "refinement": {"update": "logits", "change_clamp": 0.3, "state_clamp": 0.8}
        },
        "clamped_mirror": {
            "refinement": {
                "update": "mirror",
                "change_clamp": 4.0,
                "state_clamp": 6.0,
                "step_size_random_factor": 2.0,
            }
        },
        "clamped_frames": {
            "kind": "embedding",
            "refinement": {"change_clamp": 0.8, "state_clamp": 1.2},
        },
        "frames": {"kind": "embedding"},
        "frames_from_the_last": {"kind": "embedding", "state": {"initial": "most_recent"}},
        "frames_randomised": {
            "kind": "embedding",
            "model": {"conditioning": "adaln"},
            "refinement": {"step_size_random_factor": 2.0, "noise": 0.1},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_is_exact(graph, loss, name, options):
    options = {
        **options,
        "refinement": {**options.get("refinement", {}), "graph": graph, "loss": loss},
    }
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


@pytest.mark.parametrize("kind", ["vocabulary", "embedding"])
@pytest.mark.parametrize("conditioning", ["default", "time_embed"])
@pytest.mark.parametrize("reencode", ["none", "all", 2])
def test_what_comes_later_changes_no_earlier_prediction(kind, conditioning, reencode):
    """The anchor in front of a later block, the context term and a context that predictions shaped
    have seen o_1 .. o_t only.
    """
    model, observed, targets = build(
        kind=kind,
        model={
            "conditioning": conditioning,
            "num_layers": 3,
            "predicted_layers": 2,
            "predicted_input": "anchored",
            "energy_head": ALL_TERMS,
        },
        state={"workspace": 4} if reencode == "all" else None,
        refinement={"reencode": reencode, "num_steps": 3},
    )
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }
    later = observed.clone()
    later[:, 3:] = later[:, :2]
    states = [model.eval()(x, targets, **options).state for x in (observed, later)]
    assert torch.equal(states[0][:, :3], states[1][:, :3])
    assert not torch.equal(states[0][:, 3], states[1][:, 3])


ALL_TERMS = ["linear", "quadratic", "bilinear", "context"]


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "quadratic": {"model": {"energy_head": ["quadratic"]}},
        "bilinear": {"model": {"energy_head": ["bilinear"]}, "state": {"map_scale": 7.0}},
        "context": {"model": {"energy_head": ["linear", "context"]}},
        "all_terms_of_adaln": {"model": {"energy_head": ALL_TERMS, "conditioning": "adaln"}},
        "shallow": {"model": {"predicted_layers": 1, "predicted_input": "anchored"}},
        "shallow_without_anchor": {"model": {"predicted_layers": 1}},
        "shallow_time_embed": {
            "model": {
                "predicted_layers": 2,
                "num_layers": 3,
                "predicted_input": "anchored",
                "conditioning": "time_embed",
                "energy_head": ["linear", "context"],
            },
        },
        "shallow_predicted_only_in_tiles": {
            "model": {
                "predicted_layers": 1,
                "predicted_input": "anchored",
                "conditioning": "predicted_only",
                "energy_head": ALL_TERMS,
                "num_kv_heads": 2,
            },
            "refinement": {"tile_rows": 3, "update": "mirror", "noise": 0.3},
        },
        "step_recomputed": {
            "model": {"predicted_layers": 1, "energy_head": ["linear", "bilinear", "context"]},
            "refinement": {"recompute": "step"},
        },
        "block_recomputed": {
            "model": {"energy_head": ALL_TERMS, "conditioning": "adaln"},
            "refinement": {"recompute": "block"},
        },
        "block_recomputed_shallow": {
            "model": {
                "num_layers": 4,
                "predicted_layers": 2,
                "predicted_input": "anchored",
                "energy_head": ["bilinear", "context"],
                "conditioning": "time_embed",
            },
            "refinement": {"recompute": "block", "tile_rows": 3},
        },
        "block_recomputed_with_context_alone": {
            "model": {"predicted_layers": 1, "energy_head": ["linear", "context"]},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "frames": {
            "kind": "embedding",
            "model": {
                "energy_head": ALL_TERMS,
                "predicted_layers": 1,
                "predicted_input": "anchored",
                "conditioning": "adaln_zero",
            },
            "state": {"initial": "zeros"},
        },
        "rising": {
            "refinement": {"loss_weights": "rising", "num_steps": 3},
            "model": {"energy_head": ["bilinear"], "predicted_layers": 1},
        },
        "given_weights": {"refinement": {"loss_weights": [3, 0, 1], "num_steps": 3}},
        "zeros_probabilities": {"state": {"initial": "zeros"}, "refinement": {"num_steps": 3}},
        "zeros_logits": {
            "state": {"initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "logits", "change_clamp": 0.3, "state_clamp": 0.8},
            "model": {"energy_head": ["bilinear", "context"]},
        },
        "zeros_mirror_tied": {
            "state": {"initial": "zeros", "tie_embedding": True},
            "refinement": {"update": "mirror", "tile_rows": 4},
            "model": {"energy_head": ["bilinear", "context"], "predicted_layers": 1},
        },
        "zeros_mirror_three_steps": {
            "state": {"initial": "zeros"},
            "refinement": {"update": "mirror", "num_steps": 3, "loss_weights": [2, 1, 1]},
        },
        "zeros_mirror_clamped": {
            "state": {"initial": "zeros"},
            "refinement": {"update": "mirror", "change_clamp": 1.0, "state_clamp": 1.5},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_shallow_streams_and_weights_are_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


CONTENT = ["linear", "bilinear", "context"]


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "all": {"refinement": {"reencode": "all"}},
        "all_last": {"refinement": {"reencode": "all", "loss": "last", "num_steps": 3}},
        "last_block": {
            "model": {"predicted_layers": 1, "predicted_input": "anchored", "energy_head": CONTENT},
            "refinement": {"reencode": 1, "num_steps": 3, "loss_weights": "rising"},
        },
        "fewer_than_predicted": {
            "model": {"num_layers": 3, "predicted_layers": 2, "predicted_input": "anchored"},
            "refinement": {"reencode": 1, "update": "mirror"},
            "state": {"initial": "zeros"},
        },
        "time_embed": {
            "model": {
                "conditioning": "time_embed",
                "predicted_input": "anchored",
                "predicted_layers": 1,
            },
            "refinement": {"reencode": "all", "num_steps": 3},
        },
        "adaln_last_block": {
            "model": {"conditioning": "adaln", "num_kv_heads": 2},
            "refinement": {"reencode": 1, "num_steps": 3, "loss_weights": [2, 0, 1]},
        },
        "every_other": {
            "model": {"energy_head": CONTENT},
            "refinement": {"reencode": "all", "reencode_every": 2, "num_steps": 4},
        },
        "every_other_last_block": {
            "model": {"num_layers": 3},
            "refinement": {"reencode": 2, "reencode_every": 2, "num_steps": 3, "update": "mirror"},
        },
        "every_other_weighted": {
            "refinement": {
                "reencode": "all",
                "reencode_every": 2,
                "num_steps": 3,
                "loss_weights": [1, 0, 3],
            },
        },
        "tiles_of_samples": {
            "state": {"map_scale": 7.0, "tie_embedding": True},
            "refinement": {"reencode": "all", "tile_rows": 5, "noise": 0.3, "update": "logits"},
        },
        "step_recomputed": {"refinement": {"reencode": "all", "recompute": "step"}},
        "block_recomputed": {
            "model": {
                "num_layers": 3,
                "predicted_layers": 2,
                "predicted_input": "anchored",
                "energy_head": CONTENT,
                "conditioning": "adaln",
            },
            "refinement": {"reencode": "all", "recompute": "block", "tile_rows": 6},
        },
        "last_block_recomputed": {
            "model": {"num_layers": 3, "predicted_layers": 2, "predicted_input": "anchored"},
            "refinement": {"reencode": 1, "recompute": "block", "num_steps": 3},
        },
        "last_blocks_recomputed_around_a_shallow_stream": {
            "model": {"num_layers": 3, "predicted_layers": 1, "predicted_input": "anchored"},
            "refinement": {"reencode": 2, "recompute": "block"},
        },
        "frames": {
            "kind": "embedding",
            "model": {"predicted_input": "anchored"},
            "refinement": {"reencode": "all", "num_steps": 3},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_observed_stream_that_is_encoded_again_is_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "plain": {"state": {"workspace": 6}, "refinement": {"num_steps": 3}},
        "bilinear": {
            "model": {"energy_head": CONTENT, "predicted_input": "anchored"},
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"num_steps": 3, "workspace_step_size": 0.5, "loss_weights": "rising"},
        },
        "last_mirror_in_tiles": {
            "model": {"energy_head": ["bilinear"], "predicted_layers": 1},
            "state": {"workspace": 20, "initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "mirror", "loss": "last", "tile_rows": 3},
        },
        "noise_and_logits": {
            "state": {"workspace": 4, "workspace_initial": "random_noise"},
            "refinement": {"update": "logits", "noise": 0.3, "step_size_random_factor": 2.0},
        },
        "step_recomputed": {
            "model": {"energy_head": CONTENT, "conditioning": "adaln"},
            "state": {"workspace": 6},
            "refinement": {"recompute": "step"},
        },
        "block_recomputed": {
            "model": {
                "energy_head": ALL_TERMS,
                "conditioning": "adaln",
                "predicted_layers": 1,
                "predicted_input": "anchored",
            },
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "encoded_again": {
            "model": {"energy_head": CONTENT},
            "state": {"workspace": 6},
            "refinement": {"reencode": "all", "num_steps": 3},
        },
        "encoded_again_by_block": {
            "model": {"energy_head": CONTENT, "conditioning": "time_embed"},
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"reencode": 1, "recompute": "block"},
        },
        "frames": {
            "kind": "embedding",
            "model": {"energy_head": ["bilinear"]},
            "state": {"workspace": 6},
            "refinement": {"num_steps": 3, "reencode": "all", "reencode_every": 2},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_workspace_is_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    model, observed, targets = build(**options)
    compare(model, observed, targets, num_steps=options["refinement"].get("num_steps", 2))
    if graph == "full":
        assert model.workspace_step_size.grad.abs() > 0


def test_a_parameter_that_no_step_reads_has_a_gradient_of_zeros():
    """Engines reduce all parameters' gradients: one step reads no U, detached steps no beta."""
    model, observed, targets = build(
        model={"energy_head": CONTENT}, state={"workspace": 6}, refinement={"reencode": "all"}
    )
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(5, 6)}
    found = gradients(model, model(observed, targets, num_steps=1, **options).loss)
    unread = ("network.feedback.weight", "network.workspace_feedback.weight", "workspace_step_size")
    assert all(found[name].abs().max() == 0 for name in unread)
    assert found["network.workspace_map.weight"] is not None


def test_a_large_embedding_gets_no_second_gradient_of_zeros(monkeypatch):
    """It has one through the observed stream; zeros beside it would be V x D numbers."""
    handed_out = []
    right = deferred_backward._SumsAsGradients.apply

    def noted(value, sums, dtypes, *sources):
        handed_out.extend(zip(sources, sums))
        return right(value, sums, dtypes, *sources)

    monkeypatch.setattr(deferred_backward._SumsAsGradients, "apply", noted)
    model, observed, targets = build()
    model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(5, 6))
    weight = model.token_embedding.weight
    assert [total for source, total in handed_out if source is weight] == [None]


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_comparison_notices_a_workspace_that_loses_a_gradient(monkeypatch, recompute):
    """Breaks it on purpose: its numbers stay right, dE/dw has no graph."""
    right = refinement_loop.inner_gradient

    def broken(*arguments, **options):
        energy, gradient, of_workspace = right(*arguments, **options)
        return energy, gradient, of_workspace.detach()

    monkeypatch.setattr(refinement_loop, "inner_gradient", broken)
    model, observed, targets = build(
        model={"energy_head": CONTENT},
        state={"workspace": 6},
        refinement={"graph": "full", "recompute": recompute},
    )
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


def test_the_comparison_notices_an_inner_gradient_that_runs_through_the_context(monkeypatch):
    """Breaks the candidate's own copy: energies of later rows would tell earlier ones the future.

    One layer, of which only keys and values are encoded: the observed stream's attention has no
    second order and would notice by itself.
    """
    model, observed, targets = build(model={"num_layers": 1}, refinement={"reencode": "all"})
    monkeypatch.setattr(torch.Tensor, "view_as", lambda self, other: self)
    sample_ids, source = torch.arange(B), NoiseSource(5, 6)
    broken = model(observed, targets, sample_ids=sample_ids, source=source).loss_per_step
    monkeypatch.undo()
    right = model(observed, targets, sample_ids=sample_ids, source=source).loss_per_step
    assert torch.equal(broken[0], right[0])
    assert not torch.allclose(broken[1], right[1], rtol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("lost", ["map", "predictions", "front"])
def test_the_comparison_notices_an_encoding_that_loses_a_gradient(monkeypatch, lost, recompute):
    """Breaks each way into a context that is encoded again: its numbers stay right."""
    model, observed, targets = build(refinement={"reencode": 1, "recompute": recompute})
    right = EnergyTransformer.add_predictions
    feedback = model.network.feedback

    def broken(self, stream, embedded, workspace):
        if lost == "front":
            stream = stream.map(torch.Tensor.detach)
        if lost == "predictions":
            embedded = embedded.detach()
        return right(self, stream, embedded, workspace)

    if lost == "map":
        monkeypatch.setattr(feedback, "forward", lambda e: F.linear(e, feedback.weight.detach()))
    monkeypatch.setattr(EnergyTransformer, "add_predictions", broken)
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


def test_a_fresh_model_has_one_context_for_all_steps():
    """U starts at zero: a further step first reads what the first one did."""
    states = []
    for reencode in ("none", "all"):
        model, observed, targets = build(refinement={"reencode": reencode})
        if reencode == "all":
            torch.nn.init.zeros_(model.network.feedback.weight)
            fresh = WorldModel(model.config)
            assert fresh.network.feedback.weight.abs().max() == 0
        plain, _, _ = build()
        model.load_state_dict(plain.state_dict(), strict=False)
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        states.append(model.eval()(observed, targets, keep_state=torch.float64, **options).state)
    assert torch.equal(states[0], states[1])


def test_a_tile_below_a_sample_is_refused_where_contexts_are_encoded_again():
    model, observed, targets = build(refinement={"reencode": "all", "tile_rows": S - 1})
    with pytest.raises(ValueError, match=f"tile_rows is {S - 1}.*give at least {S}"):
        model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2))


def test_every_other_step_reads_the_context_of_the_one_before():
    for every, expected in ((1, [0, 1, 2, 3, 4]), (2, [0, 1, 1, 3, 3])):
        config = RefinementConfig(reencode="all", reencode_every=every)
        plan = plan_steps(config, [0] * 5, training=True)
        assert [step.encoded_before for step in plan] == expected
        assert [step.index for step in plan if step.encodes_again] == sorted(set(expected) - {0})


@pytest.mark.parametrize(
    "kind, update, change, state",
    [
        ("vocabulary", "probabilities", 4.0, 4.0),
        ("vocabulary", "logits", 0.3, 0.8),
        ("vocabulary", "mirror", 4.0, 6.0),
        ("embedding", "probabilities", 0.8, 1.2),
    ],
)
def test_each_clamp_binds_somewhere_and_not_everywhere(kind, update, change, state):
    """So that the comparisons above mean something; and no state is beyond its bound, nor moved
    further than a step may.
    """
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }

    def final(**clamps):
        model, observed, targets = build(
            kind=kind, refinement={"update": update, "num_steps": 1, **clamps}
        )
        return model.eval()(observed, targets, **options).state

    free, changed, bounded = final(), final(change_clamp=change), final(state_clamp=state)
    for clamped in (changed, bounded):
        same = torch.isclose(clamped, free, rtol=1e-12, atol=1e-13)
        assert same.any() and not same.all()
    assert bounded.abs().max() <= state
    start = final(change_clamp=1e-300)
    assert (changed - start).abs().max() <= change * (1 + 1e-12)


def test_the_comparison_notices_a_clamp_that_lets_gradients_through(monkeypatch):
    from ebwm_kernels.vocabulary import autograd as vocabulary

    right = vocabulary._step
    monkeypatch.setattr(vocabulary, "_step", lambda *a: (right(*a)[0], None))
    with pytest.raises(AssertionError):
        compare(*build(refinement={"change_clamp": 4.0}))


def test_tiles_cover_a_batch_once_and_are_of_about_the_same_size():
    for num_samples, num_positions, rows in itertools.product(
        (1, 2, 5), (1, 4, 7), (1, 2, 3, 7, 9, 14, 100)
    ):
        seen = torch.zeros(num_samples, num_positions, dtype=torch.int64)
        sizes = []
        for samples, positions in tiles_of(num_samples, num_positions, rows):
            for part in positions:
                seen[samples, part] += 1
                sizes.append(seen[samples, part].numel())
        assert seen.eq(1).all() and max(sizes) <= rows and max(sizes) <= 2 * min(sizes), (
            num_samples,
            num_positions,
            rows,
            sizes,
        )


@pytest.mark.parametrize("tile_rows", [5, 2])
def test_a_tile_changes_neither_the_final_state_nor_the_energies(tile_rows):
    options = {
        "sample_ids": torch.arange(B),
        "source": NoiseSource(1, 2),
        "keep_state": torch.float64,
    }
    outputs = [
        model.eval()(observed, targets, **options)
        for rows in (100, tile_rows)
        for model, observed, targets in [build(refinement={"tile_rows": rows})]
    ]
    torch.testing.assert_close(outputs[1].state, outputs[0].state, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        outputs[1].energy_per_step, outputs[0].energy_per_step, rtol=1e-12, atol=1e-13
    )
    assert outputs[0].state.shape == (B, S, V)


def test_the_choices_differ_so_the_comparison_means_something():
    losses = {
        graph: gradients(
            model,
            model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0)).loss,
        )["network.head.weight"]
        for graph in ("detach", "truncate", "full")
        for model, observed, targets in [build(refinement={"graph": graph, "loss": "every"})]
    }
    assert not torch.allclose(losses["detach"], losses["full"]) and not torch.allclose(
        losses["detach"], losses["truncate"]
    )


@pytest.mark.parametrize("checkpoint", ["none", "step", "block"])
def test_the_comparison_notices_an_inner_gradient_without_graph(monkeypatch, checkpoint):
    """Breaks the mechanism on purpose: the loss stays right, the parameter gradients do not."""
    right = refinement_loop.inner_gradient

    def broken(*arguments, **options):
        energy, gradient, of_workspace = right(*arguments, **options)
        return energy, gradient.detach() + 0 * energy.sum(), of_workspace

    monkeypatch.setattr(refinement_loop, "inner_gradient", broken)
    with pytest.raises(AssertionError):
        compare(*build(refinement={"recompute": checkpoint}))


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("term", ["quadratic", "bilinear", "context"])
def test_the_comparison_notices_a_term_whose_parameter_has_no_gradient(
    monkeypatch, term, recompute
):
    """Breaks a head on purpose: its energies stay right."""
    model, observed, targets = build(
        model={"energy_head": ["linear", term], "predicted_layers": 1},
        refinement={"recompute": recompute},
    )
    linear = getattr(model.network.content, term)
    monkeypatch.setattr(linear, "forward", lambda x: F.linear(x, linear.weight.detach()))
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


@pytest.mark.parametrize("lost", ["anchor", "readout"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_comparison_notices_a_context_that_loses_a_gradient(monkeypatch, lost, recompute):
    model, observed, targets = build(
        model={
            "energy_head": ["linear", "context"],
            "predicted_layers": 1,
            "predicted_input": "anchored",
        },
        refinement={"recompute": recompute},
    )
    right = model.network.context_of

    def broken(stream):
        context = right(stream)
        return dataclasses.replace(context, **{lost: getattr(context, lost).detach()})

    monkeypatch.setattr(model.network, "context_of", broken)
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


def test_the_comparison_notices_a_uniform_start_that_forgets_the_map(monkeypatch):
    right = states.VocabularyState.embed_zeros

    def broken(self, shape):
        vectors = right(self, shape).vectors
        return right(self, shape)._replace(vectors=vectors.detach() + 0 * vectors)

    monkeypatch.setattr(states.VocabularyState, "embed_zeros", broken)
    with pytest.raises(AssertionError):
        compare(*build(state={"initial": "zeros", "map_scale": 7.0}))


def test_the_first_step_from_zeros_has_no_product_over_the_vocabulary(monkeypatch):
    """N 1, mirror: one product into the loss and two back, as many as a Transformer++ has."""
    model, observed, targets = build(
        state={"initial": "zeros"}, refinement={"update": "mirror", "num_steps": 1}
    )
    embed = mock.Mock(side_effect=AssertionError("the whole state was embedded"))
    monkeypatch.setattr(states, "vocabulary_embed", embed)
    monkeypatch.setattr(states.VocabularyState, "embed", embed)
    model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2)).loss.backward()
    assert model.state_map.grad is not None


def test_a_fresh_step_is_what_a_fresh_transformer_does():
    """The context term's first step gives logits of a Transformer++'s size, whatever alpha and
    the map's factor are.
    """
    sizes = {"num_layers": 1, "width": 64, "vocabulary_size": 200}
    deviations = []
    for kind, step_size, scale in (("baseline", 1.0, 1.0), ("energy", 2.0, 10.0)) * 2:
        model, *_ = build(
            model=sizes | {"kind": kind, "energy_head": ["linear", "context"]},
            state={"map_scale": scale, "initial": "zeros"},
            refinement={"step_size": step_size * 50, "update": "mirror", "num_steps": 1},
        )
        tokens = torch.arange(B * S).view(B, S)
        if kind == "baseline":
            logits = model.output(model.network(model.embed_observed(tokens)))
        else:
            context = model.network.encode_context(model.embed_observed(tokens))
            weight = model.state_space().weight
            logits = model.step_size * model.network.content.scale * context.readout @ weight.T
        deviations.append(logits.std())
    assert 0.8 < deviations[1] / deviations[0] < 1.25


@pytest.mark.parametrize(
    "weights, num_steps, expected",
    [
        ("rising", 2, [0.2, 0.8]),
        ("rising", 1, [1.0]),
        ((1.0, 2.0, 5.0), 3, [0.125, 0.25, 0.625]),
        ((1.0, 3.0, 5.0), 2, [0.375, 0.625]),
        ((1.0, 3.0), 3, [0.0, 0.25, 0.75]),
    ],
)
def test_loss_weights_sum_to_one_and_count_from_the_last_step(weights, num_steps, expected):
    config = RefinementConfig(loss_weights=weights, num_steps=num_steps)
    plan = plan_steps(config, range(num_steps), training=True)
    assert [step.loss_weight for step in plan] == pytest.approx(expected)
    assert [step.needs_graph for step in plan] == [weight > 0 for weight in expected]
    losses = [torch.tensor(float(i)) for i in range(num_steps)]
    total = sum(weight * i for i, weight in enumerate(expected))
    assert refinement_loop.total_loss(losses, config).item() == pytest.approx(total)


def test_the_comparison_notices_a_block_that_does_not_bend(monkeypatch):
    """Breaks a sweep on purpose: the last block is taken for linear on the way up."""
    right = block_recompute._BlockwiseStep.backward
    monkeypatch.setattr(
        block_recompute._BlockwiseStep,
        "backward",
        lambda self, streams, gradients, *rest: right(
            self, streams, [*gradients[:-1], torch.zeros_like(gradients[-1])], *rest
        ),
    )
    with pytest.raises(AssertionError):
        compare(*build(refinement={"recompute": "block"}))


@pytest.mark.parametrize("kind", ["vocabulary", "embedding"])
def test_evaluation_builds_no_second_order_graph_and_touches_no_random_state(kind):
    model, observed, targets = build(
        kind=kind, refinement={"step_size_random_factor": 2.0, "noise": 0.5, "num_steps": 3}
    )
    plain, _, _ = build(kind=kind, refinement={"num_steps": 3})
    state = torch.get_rng_state()
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    with mock.patch("torch.autograd.grad", side_effect=torch.autograd.grad) as inner:
        evaluated = model.eval()(observed, targets, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        all(not call.kwargs.get("create_graph") for call in inner.call_args_list)
        and inner.call_count == 3
    )
    assert not evaluated.loss.requires_grad and evaluated.initial_loss is not None
    trained = plain.train()(observed, targets, **options)
    torch.testing.assert_close(
        evaluated.loss_per_step, trained.loss_per_step
    )  # the same draws, without the randomness of training
    torch.testing.assert_close(
        model.eval()(observed, targets, **options).loss_per_step,
        evaluated.loss_per_step,
        rtol=0,
        atol=0,
    )


def test_the_observed_stream_is_encoded_once_where_landscapes_share_it():
    for conditioning, landscapes, expected in (
        ("default", "per_step", 1),
        ("predicted_only", "per_step", 1),
        ("time_embed", "per_step", 3),
        ("time_embed", "one", 1),
    ):
        model, observed, targets = build(
            model={"conditioning": conditioning},
            refinement={"num_steps": 3, "landscapes": landscapes},
        )
        with mock.patch.object(
            model.network, "context_of", side_effect=model.network.context_of
        ) as encode:
            model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0))
        assert encode.call_count == expected, conditioning


def test_results_do_not_depend_on_how_a_batch_is_cut():
    model, observed, targets = build(refinement={"step_size_random_factor": 2.0, "noise": 0.5})
    options = {"source": NoiseSource(1, 2)}
    whole = model(observed, targets, sample_ids=torch.tensor([7, 8, 9]), **options).loss
    parts = [
        model(
            observed[i : i + 1], targets[i : i + 1], sample_ids=torch.tensor([7 + i]), **options
        ).loss
        for i in range(B)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_the_baseline_is_an_ordinary_decoder():
    for kind in ("vocabulary", "embedding"):
        model, observed, targets = build(kind=kind, model={"kind": "baseline"})
        loss = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(0, 0)).loss
        with plain_operations():
            prediction = model.output(model.network(model.embed_observed(observed)))
            plain = (
                F.cross_entropy(prediction.flatten(0, 1), targets.flatten())
                if kind == "vocabulary"
                else F.smooth_l1_loss(prediction, targets)
            )
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        later = observed.clone()
        later[:, -1] = later[:, 0]
        hidden = [model.network(model.embed_observed(x))[:, :-1] for x in (observed, later)]
        torch.testing.assert_close(*hidden)  # causal: the last token changes nothing before it


def test_the_comparison_notices_a_step_that_is_not_back_propagated(monkeypatch):
    """Breaks the gradients taken step by step: the loss stays right, a term is missing."""
    right, calls = refinement_loop.back_propagate, []
    monkeypatch.setattr(
        refinement_loop,
        "back_propagate",
        lambda pending, contexts: (
            calls.append(1) or (right(pending, contexts) if len(calls) != 1 else pending.clear())
        ),
    )
    with pytest.raises(AssertionError):
        compare(*build())


def test_gradients_taken_step_by_step_can_be_used_once_and_not_differentiated():
    model, observed, targets = build()
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(0, 0)}
    loss = model(observed, targets, **options).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        loss.backward()
    with pytest.raises(RuntimeError, match="call backward without create_graph=True"):
        torch.autograd.grad(
            model(observed, targets, **options).loss,
            list(model.parameters()),
            create_graph=True,
            allow_unused=True,
        )


def test_a_scaled_loss_scales_every_gradient():
    model, observed, targets = build(model={"conditioning": "time_embed"})
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(0, 0)}
    once = gradients(model, model(observed, targets, **options).loss)
    thrice = gradients(model, 3 * model(observed, targets, **options).loss)
    for name in once:
        assert once[name] is None or torch.allclose(
            3 * once[name], thrice[name], rtol=1e-12, atol=1e-300
        ), name
