"""Groups with conditions, such as frames of patches and an action behind each: exact in float64.

The definition knows neither kernels nor blocks: rows with a time and a place each, both streams in
one attention, its mask written out by pairs. Conditions are rows of the observed stream alone.
"""

import itertools
from unittest import mock

import plain_autograd as plain
import pytest
import test_grouped_refinement as grouped
import torch
from torch.nn import functional as F

from ebwm_scale.core.errors import DataError
from ebwm_scale.model.conditions import example_conditions
from ebwm_scale.model.rotary import RotaryTable
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

B, V, T = 3, 13, 2
ACTION = {"name": "action", "kind": "continuous", "width": 2}
BUTTON = {"name": "observation.button", "kind": "discrete", "width": 2, "num_values": 5}
FRAME = {"conditions": [ACTION]}  # one vector per frame, and an action
GRID = {"group_size": 4, "grid": [2, 2], "conditions": [ACTION, BUTTON]}
LINE = {"group_size": 3, "conditions": [BUTTON]}


def build(*, kind="embedding", data, num_groups=T, **options):
    """(model, observed, targets, conditions) in float64; nothing is zero."""
    model = grouped.build_model(kind=kind, data=data, **options)
    generator = torch.Generator().manual_seed(2)
    groups = grouped.draw_groups(kind, data.get("group_size", 1), num_groups, generator)
    conditions = example_conditions(model.config.data.conditions, B, num_groups, generator)
    return model, *groups, conditions


def place(cell, group, grid):
    """Where a group's row stands: its cells, then its conditions."""
    if grid is None:
        return [cell]
    if cell >= group:
        return [grid[0], cell - group]
    return list(divmod(cell, grid[1]))


def rows_of(model, num_groups):
    """(time, place, is observed) of each row: the observed stream's, then the predicted one's."""
    data = model.config.data
    group = data.group_size or 1
    whole = group + len(data.conditions)
    observed = itertools.product(range(num_groups), range(whole))
    predicted = itertools.product(range(num_groups), range(group))
    rows = [(time, place(cell, group, data.grid), True) for time, cell in observed]
    return rows + [(time + 1, place(cell, group, data.grid), False) for time, cell in predicted]


def is_far(row, column, data, reach):
    """Whether two cells of a grid lie further apart than the reach; a condition is near to all."""
    if reach is None or row[1][0] == data.grid[0] or column[1][0] == data.grid[0]:
        return False
    return max(abs(a - b) for a, b in zip(row[1], column[1])) > reach


def sees(row, column, model):
    if is_far(row, column, model.config.data, model.config.model.reach):
        return False
    of_row, of_column = row[0] - (not row[2]), column[0] - (not column[2])
    if column[2]:
        return of_column <= of_row
    return not row[2] and of_row == of_column


def rotated(x, coordinates):
    """x (B, H, S, d): each pair rotated by its coordinate."""
    pairs, axes = x.shape[-1] // 2, len(coordinates[0])
    of_each = pairs // axes
    of_first = pairs - of_each * (axes - 1)
    columns = []
    for index in range(pairs):
        axis, count, number = 0, of_first, index
        if index >= of_first:
            axis, count = 1 + (index - of_first) // of_each, of_each
            number = (index - of_first) % of_each
        values = torch.tensor([c[axis] for c in coordinates], dtype=torch.float64)
        angle = values * 1e4 ** (-number / count)
        a, b = x[..., 2 * index], x[..., 2 * index + 1]
        columns += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(columns, -1)


def both_streams(layer, o, p, model, modulations):
    """(o, p) behind a block; o holds the rows of conditions too."""
    attention = layer.attention
    group = model.config.data.group_size or 1
    rows = rows_of(model, p.shape[1] // group)
    x = torch.cat([layer._attention_input(u, m) for u, m in zip((o, p), modulations)], 1)

    def heads(linear):
        return linear(x).unflatten(-1, (-1, attention.head_dimension)).transpose(1, 2)

    coordinates = [[time, *where] for time, where, _ in rows]
    shared = attention.num_heads // attention.num_kv_heads
    q = rotated(heads(attention.wq), coordinates)
    k = rotated(heads(attention.wk), coordinates).repeat_interleave(shared, 1)
    v = heads(attention.wv).repeat_interleave(shared, 1)
    mask = torch.tensor([[sees(row, column, model) for column in rows] for row in rows])
    scores = (q @ k.mT) * attention.head_dimension**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    attended = attention.wo((weights @ v).transpose(1, 2).flatten(2)).split(
        [o.shape[1], p.shape[1]], 1
    )
    return [
        layer._add_residuals(u, change, modulation)
        for u, change, modulation in zip((o, p), attended, modulations)
    ]


def is_state(model, num_rows):
    data = model.config.data
    group = data.group_size or 1
    whole = group + len(data.conditions)
    return torch.tensor([row % whole < group for row in range(num_rows)])


def defined_stream(model, states, conditions):
    """The observed stream, row by row."""
    group = model.config.data.group_size or 1
    maps = model.condition_embeddings.maps
    rows = []
    for time in range(states.shape[1] // group):
        for cell in range(group):
            state = states[:, time * group + cell]
            if model.config.state.kind == "vocabulary":
                rows.append(model.token_embedding.weight[state])
            else:
                projection = model.frame_projection
                rows.append(state @ projection.weight.T + projection.bias)
        for condition, own in zip(model.config.data.conditions, maps):
            value = conditions[condition.name][:, time]
            if condition.kind == "discrete":
                value = F.one_hot(value, condition.num_values).double().flatten(1)
                rows.append(value @ own.weight)
            else:
                rows.append(value.double() @ own.weight.T + own.bias)
    return torch.stack(rows, 1)


def defined_energy(model, candidate, observed, landscape, fed=None, workspace=None):
    """As test_grouped_refinement's, with rows of conditions in the observed stream."""
    of_state = is_state(model, observed.shape[1])

    def among_conditions(change):
        wide = torch.zeros_like(observed)
        wide[:, of_state] = change
        return wide

    network, settings = model.network, model.config.model
    of_observed, _ = network.modulations_of(landscape, predicted=False)
    of_predicted, final = network.modulations_of(landscape, predicted=True)
    first = settings.num_layers - settings.predicted_layers
    again = settings.num_layers - grouped.reencoded_blocks(model.config)
    o, p = observed, candidate
    if workspace is not None:
        p = p + workspace
    for _ in range(settings.loops - 1):
        for index, layer in enumerate(network.layers):
            o, _ = both_streams(layer, o, p, model, (of_observed[index], None))
        o = o + observed
    for index, layer in enumerate(network.layers):
        if fed is not None and index == again:
            o = o + among_conditions(fed[0] @ network.feedback.weight.T)
            if fed[1] is not None:
                o = o + among_conditions(fed[1] @ network.workspace_feedback.weight.T)
        if index == first and settings.predicted_input == "anchored":
            p = p + o[:, of_state]
        of_p = of_predicted[index - first] if index >= first else None
        o, behind = both_streams(layer, o, p, model, (of_observed[index], of_p))
        p = behind if index >= first else p
    n = network.norm(p)
    if final is not None:
        n = n * (1 + final[1]) + final[0]
    return grouped.energy_of_terms(model, n, candidate, o[:, of_state], workspace)


def compare(model, observed, targets, conditions):
    """The loss and every gradient against the definition, see plain_autograd.compare."""
    defined = plain.reference_loss
    forward = model.forward

    def reference_loss(model, observed, targets, **options):
        stream = defined_stream(model, observed, conditions)
        with mock.patch.object(model, "embed_observed", lambda _: stream):
            return defined(model, observed, targets, **options)

    with (
        mock.patch.object(plain, "S", observed.shape[1]),
        mock.patch.object(plain, "reference_energy", defined_energy),
        mock.patch.object(plain, "reference_loss", reference_loss),
        mock.patch.object(
            model, "forward", lambda *a, **o: forward(*a, conditions=conditions, **o)
        ),
    ):
        plain.compare(model, observed, targets)


CASES = {
    "frames": {"data": FRAME, "state": {"initial": "most_recent"}},
    "grid": {"data": GRID, "model": {"predicted_input": "anchored", "num_kv_heads": 1}},
    "line_tiles": {"data": LINE, "refinement": {"recompute": "step", "tile_rows": 3}},
    "block": {
        "data": GRID,
        "model": {"conditioning": "adaln", "predicted_input": "anchored"},
        "refinement": {"recompute": "block", "tile_rows": 4, "noise": 0.3},
    },
    "heads": {
        "data": GRID,
        "model": {"energy_head": ["linear", "bilinear", "context"], "predicted_layers": 1},
    },
    "workspace": {
        "data": GRID,
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5, "workspace_initial": "random_noise"},
        "refinement": {"tile_rows": 4},
    },
    "encoded_again": {
        "data": LINE,
        "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
        "state": {"workspace": 5},
        "refinement": {"reencode": "all", "recompute": "block"},
    },
    "within_reach": {
        "data": GRID,
        "model": {"reach": 0, "num_kv_heads": 1, "predicted_input": "anchored"},
        "refinement": {"recompute": "block", "tile_rows": 4},
    },
    "looped": {"data": LINE, "model": {"loops": 3, "predicted_layers": 1}},
    "tokens": {"data": LINE, "kind": "vocabulary", "refinement": {"update": "mirror"}},
}


@pytest.mark.parametrize("graph, loss", grouped.LOOPS)
@pytest.mark.parametrize("name", CASES)
def test_groups_with_conditions_are_exact_to_second_order(graph, loss, name):
    options = CASES[name]
    refinement = {**options.get("refinement", {}), "graph": graph, "loss": loss}
    compare(*build(**{**options, "refinement": refinement}))


@pytest.mark.parametrize("predicts", ["state", "change"])
@pytest.mark.parametrize("output", ["one_linear", "two_linear"])
def test_a_baseline_with_conditions_is_the_definition(predicts, output):
    options = {"kind": "baseline", "predicts": predicts, "output": output}
    model, observed, targets, conditions = build(data=GRID, model=options)
    o = defined_stream(model, observed, conditions)
    of_state = is_state(model, o.shape[1])
    for layer in model.network.layers:
        o, _ = both_streams(layer, o, o[:, of_state], model, (None, None))
    hidden = model.network.norm(o[:, of_state])
    prediction = model.output(hidden) + (observed if predicts == "change" else 0)
    expected = F.smooth_l1_loss(prediction, targets)
    noise = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    loss = model(observed, targets, conditions=conditions, **noise).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    ours, defined = plain.gradients(model, loss), plain.gradients(model, expected)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, defined[name], rtol=1e-9, atol=1e-12)


def test_a_baseline_of_changes_starts_as_a_copy_of_the_last_frame():
    config = build(data=GRID, model={"kind": "baseline", "predicts": "change"})[0].config
    _, observed, _, conditions = build(data=GRID)
    for output in ("one_linear", "two_linear"):
        model = WorldModel(config.replace(model=config.model.replace(output=output)))
        assert torch.equal(model.predict_directly(observed, conditions), observed.float())


@pytest.mark.parametrize(
    "name, wrong",
    [("energy_attention", {"context_group": 4}), ("observed_attention", {"group_size": 3})],
)
def test_the_comparison_notices_a_condition_of_another_group(name, wrong):
    """Breaks a stream's mask on purpose: the candidates, or the patches, see a shifted context."""
    case = build(data=GRID, num_groups=3)
    with pytest.raises(AssertionError), grouped.broken_attention(name, **wrong):
        compare(*case)


def test_the_comparison_notices_a_condition_in_a_patchs_place():
    case = build(data=GRID)
    right = RotaryTable.coordinates

    def wrong(self, positions):
        time, row, column = right(self, positions)
        return [time, row.clamp(max=1), column]

    with pytest.raises(AssertionError), mock.patch.object(RotaryTable, "coordinates", wrong):
        compare(*case)


def final_state(model, observed, targets, conditions):
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    if model.config.model.kind == "baseline":
        return model.predict_directly(observed, conditions).detach()
    with torch.no_grad():
        output = model.eval()(
            observed, targets, conditions=conditions, keep_state=torch.float64, **options
        )
    return output.state


@pytest.mark.parametrize("data", [FRAME, GRID, LINE], ids=["frame", "grid", "line"])
@pytest.mark.parametrize("kind", ["energy", "baseline", "encoded_again"])
def test_no_prediction_knows_later_frames_or_actions(data, kind):
    """Changing o_(t+1) or a_(t+1), and what follows, changes no prediction up to t; changing a_t
    changes every state of the prediction made at t.
    """
    options = {"model": {"kind": "baseline"}} if kind == "baseline" else {}
    if kind == "encoded_again":
        options = {"refinement": {"reencode": "all"}}
    model, observed, targets, conditions = build(data=data, num_groups=4, **options)
    group = data.get("group_size", 1)
    before = final_state(model, observed, targets, conditions)
    later = observed.clone()
    later[:, 2 * group :] += 1
    changed = {}
    for name, value in conditions.items():
        changed[name] = value.clone()
        changed[name][:, 2] = (value[:, 2] + 1) % 5
        assert not torch.equal(changed[name], value)
    of_frame = (final_state(model, later, targets, conditions) - before).abs().amax(-1)
    of_action = (final_state(model, observed, targets, changed) - before).abs().amax(-1)
    for moved in (of_frame, of_action):
        assert (moved[:, : 2 * group] < 1e-12).all()
        assert (moved[:, 2 * group : 3 * group] > 1e-6).all()


def test_the_energy_is_differentiable_in_the_conditions():
    """Against finite differences of the action, and of a discrete condition's probabilities."""
    model, observed, _, conditions = build(data=GRID)
    action = conditions["action"].double().requires_grad_()
    button = F.one_hot(conditions["observation.button"], 5).double().requires_grad_()
    candidate = torch.randn(B, 8, 16, generator=torch.Generator().manual_seed(3)).double()

    def energy(action, button):
        given = {"action": action, "observation.button": button}
        context = model.network.encode_context(model.embed_observed(observed, given))
        return model.network.energy(candidate, context).sum()

    assert torch.autograd.gradcheck(energy, (action, button))
    with torch.no_grad():
        of_ids = model.embed_observed(observed, conditions)
        of_one_hot = model.embed_observed(
            observed, {"action": action, "observation.button": button}
        )
    torch.testing.assert_close(of_ids, of_one_hot)


def test_conditions_that_do_not_fit_are_one_sentence():
    model, observed, _, conditions = build(data=GRID)
    action = conditions["action"]
    cases = [
        (None, "conditions are none; this model is conditioned on action, observation.button"),
        ({"action": action}, "conditions are action; this model"),
        ({**conditions, "reward": action}, "action, observation.button, reward; this model"),
        ({**conditions, "action": action[:, :1]}, r"condition action has shape \(3, 1, 2\)"),
        ({**conditions, "action": action[..., :1]}, r"expected numbers .* \(3, 2, 2\)"),
        ({**conditions, "observation.button": action}, r"expected probabilities .* \(3, 2, 2, 5\)"),
        (
            {**conditions, "observation.button": conditions["observation.button"][..., :1]},
            r"button has shape \(3, 2, 1\): expected ids",
        ),
    ]
    for given, message in cases:
        with pytest.raises(DataError, match=message):
            model.embed_observed(observed, given)
    plain_model = grouped.build(kind="embedding")[0]
    with pytest.raises(DataError, match="conditions are action; this model was trained without"):
        plain_model.embed_observed(observed[:, :6], {"action": action})
