"""Sequences of groups: every choice of the refinement is exact, in float64, against a definition.

It knows neither kernels nor blocks: both streams in one attention, its mask written out by pairs.

P positions form a group. Row t is one cell of the candidate for the next group.
"""

import contextlib
import itertools
from unittest import mock

import plain_autograd as plain
import pytest
import torch
from torch.nn import functional as F

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.resolved import reencoded_blocks
from ebwm_scale.model import attention
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.reach import Reach
from ebwm_scale.model.rotary import RotaryTable
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.tiling import tile_rows, tiles_of
from ebwm_scale.world_model import WorldModel

B, V = 3, 13
GRID = {"group_size": 4, "grid": [2, 2]}
WIDE = {"group_size": 6, "grid": [2, 3]}  # with reach 1 its first and last columns are apart


def build_model(*, kind, data, model=None, state=None, refinement=None):
    """A small model in float64; nothing is zero."""
    size = {"dimension": 7} if kind == "embedding" else {}
    tokens = {"vocabulary_size": V} if kind == "vocabulary" else {}
    config = config_from_dict(
        {
            "model": {"num_layers": 2, "width": 16, "num_heads": 2, **tokens, **(model or {})},
            "state": {"kind": kind, **size, **(state or {})},
            "refinement": {"num_steps": 2, "step_size": 3.0, **(refinement or {})},
            "data": data,
        }
    )
    torch.manual_seed(1)
    world_model = WorldModel(config).double()
    for parameter in world_model.parameters():
        if parameter.abs().max() == 0:  # must not hide a missing path
            torch.nn.init.normal_(parameter, std=0.3)
    return world_model


def draw_groups(kind, size, num_groups, generator):
    """(observed, targets): groups of `size` tokens or vectors, one after the other."""
    length = (num_groups + 1) * size
    if kind == "vocabulary":
        block = torch.randint(V, (B, length), generator=generator)
    else:
        block = torch.randn(B, length, 7, generator=generator, dtype=torch.float64)
    return block[:, :-size], block[:, size:]


def build(*, kind="vocabulary", data=None, num_groups=2, **options):
    """(model, observed, targets)."""
    data = {"group_size": 3, **(data or {})}
    generator = torch.Generator().manual_seed(2)
    groups = draw_groups(kind, data["group_size"], num_groups, generator)
    return build_model(kind=kind, data=data, **options), *groups


def coordinates(position, group_size, grid):
    time, cell = divmod(position, group_size)
    if grid is None:
        return [time, cell]
    return [time, *divmod(cell, grid[1])]


def rotated(x, positions, network):
    """x (B, H, S, d): each pair rotated by its coordinate, pair by pair."""
    table = network.rotary
    pairs = x.shape[-1] // 2
    columns = []
    for index in range(pairs):
        axes = len(coordinates(0, table.group_size, table.grid))
        of_each = pairs // axes
        of_first = pairs - of_each * (axes - 1)
        axis, place, count = 0, index, of_first
        if index >= of_first:
            axis = 1 + (index - of_first) // of_each
            place = (index - of_first) % of_each
            count = of_each
        values = [coordinates(p, table.group_size, table.grid)[axis] for p in positions]
        angle = torch.tensor(values, dtype=torch.float64) * 1e4 ** (-place / count)
        a, b = x[..., 2 * index], x[..., 2 * index + 1]
        columns += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(columns, -1)


def sees(row, column, num_positions, group_size, *, own_keys=True, reach=None, grid=None):
    """Rows and columns: observed positions 0 .. S - 1, then candidates S .. 2 S - 1."""
    if column >= num_positions and not own_keys:
        return False
    if reach is not None:
        a, b = (coordinates(x % num_positions, group_size, grid)[1:] for x in (row, column))
        if max(abs(i - j) for i, j in zip(a, b)) > reach:
            return False
    of_column = column % num_positions // group_size
    of_row = row % num_positions // group_size
    if column < num_positions:  # an observed key
        return of_column <= of_row
    return row >= num_positions and of_row == of_column  # candidates are seen by their group alone


def both_streams(layer, o, p, network, modulations):
    """(o, p) behind a block."""
    attention = layer.attention
    S, size = o.shape[1], network.group_size
    normed = [layer._attention_input(x, m) for x, m in zip((o, p), modulations)]
    x = torch.cat(normed, 1)

    def heads(linear):
        return linear(x).unflatten(-1, (-1, attention.head_dimension)).transpose(1, 2)

    positions = [*range(S), *range(size, S + size)]
    shared = attention.num_heads // attention.num_kv_heads
    q = rotated(heads(attention.wq), positions, network)
    k = rotated(heads(attention.wk), positions, network).repeat_interleave(shared, 1)
    v = heads(attention.wv).repeat_interleave(shared, 1)
    mask = torch.tensor(
        [
            [
                sees(
                    *(row, column, S, size),
                    own_keys=attention.own_keys,
                    reach=None if attention.reach is None else attention.reach.cells,
                    grid=network.rotary.grid,
                )
                for column in range(2 * S)
            ]
            for row in range(2 * S)
        ]
    )
    scores = (q @ k.mT) * attention.head_dimension**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    attended = attention.wo((weights @ v).transpose(1, 2).flatten(2))
    return [
        layer._add_residuals(x, change, modulation)
        for x, change, modulation in zip((o, p), attended.split(S, 1), modulations)
    ]


def defined_energy(model, candidate, observed, landscape, fed=None, workspace=None):
    """Both streams through every block, and the head's terms written out.

    fed, workspace: as in plain_autograd.reference_energy.
    """
    network, settings = model.network, model.config.model
    of_observed, _ = network.modulations_of(landscape, predicted=False)
    of_predicted, final = network.modulations_of(landscape, predicted=True)
    first = settings.num_layers - settings.predicted_layers
    o, p = observed, candidate
    if workspace is not None:
        p = p + workspace
    again = settings.num_layers - reencoded_blocks(model.config)
    for _ in range(settings.loops - 1):
        for index, layer in enumerate(network.layers):
            o, _ = both_streams(layer, o, p, network, (of_observed[index], None))
        o = o + observed
    for index, layer in enumerate(network.layers):
        if fed is not None and index == again:
            o = o + fed[0] @ network.feedback.weight.T
            if fed[1] is not None:
                o = o + fed[1] @ network.workspace_feedback.weight.T
        if index == first and settings.predicted_input == "anchored":
            p = p + o
        of_p = of_predicted[index - first] if index >= first else None
        o, behind = both_streams(layer, o, p, network, (of_observed[index], of_p))
        p = behind if index >= first else p
    n = network.norm(p)
    if final is not None:
        n = n * (1 + final[1]) + final[0]
    return energy_of_terms(model, n, candidate, o, workspace)


def energy_of_terms(model, n, candidate, o, workspace):
    """The head's terms; o: the observed stream behind the last block, at the candidates' places."""
    network, settings, refinement = model.network, model.config.model, model.config.refinement
    energy = torch.zeros(n.shape[:2], dtype=n.dtype)
    units = 1 / (refinement.step_size * model.config.state.map_scale)
    if "linear" in settings.energy_head:
        energy = energy + n @ network.head.weight[0]
    if "bilinear" in settings.energy_head:
        bilinear = network.content.bilinear.weight
        energy = energy - units * torch.einsum("bsi,ij,bsj->bs", candidate, bilinear, n)
        if workspace is not None:
            own = network.content.workspace.weight / refinement.workspace_step_size
            energy = energy - torch.einsum("bsi,ij,bsj->bs", workspace, own, n)
    if "direct" in settings.energy_head:
        energy = energy - units * torch.einsum("bsi,bsi->bs", candidate, n)
    if "context" in settings.energy_head:
        h = network.content.context_norm(o)
        context = network.content.context.weight
        energy = energy - units * torch.einsum("bsi,ij,bsj->bs", candidate, context, h)
    return energy


def compare(model, observed, targets, **options):
    with (
        mock.patch.object(plain, "S", observed.shape[1]),
        mock.patch.object(plain, "reference_energy", defined_energy),
    ):
        plain.compare(model, observed, targets, **options)


LOOPS = list(itertools.product(("detach", "truncate", "full"), ("every", "last")))


@pytest.mark.parametrize("graph, loss", LOOPS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": GRID, "model": {"predicted_input": "anchored", "num_kv_heads": 1}},
        {"refinement": {"recompute": "step", "update": "mirror", "tile_rows": 3}},
        {"refinement": {"recompute": "block", "tile_rows": 7}, "model": {"num_kv_heads": 1}},
        {
            "data": GRID,
            "model": {"energy_head": ["linear", "bilinear", "context"], "predicted_layers": 1},
            "refinement": {"update": "logits", "tile_rows": 4},
        },
        {
            "model": {"conditioning": "adaln", "predicted_input": "anchored"},
            "refinement": {"recompute": "block", "noise": 0.3, "step_size_random_factor": 2.0},
        },
        {"kind": "embedding", "state": {"initial": "most_recent"}, "data": GRID},
        {
            "data": GRID,
            "model": {"own_keys": False, "num_kv_heads": 1, "energy_head": ["linear", "direct"]},
        },
        {
            "data": GRID,
            "model": {"energy_head": ["linear", "bilinear"]},
            "state": {"workspace": 5, "workspace_initial": "random_noise"},
            "refinement": {"tile_rows": 4},
        },
        {
            "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
            "state": {"workspace": 5},
            "refinement": {"reencode": "all", "recompute": "block"},
        },
        {
            "data": GRID,
            "model": {"loops": 2, "predicted_input": "anchored", "predicted_layers": 1},
            "refinement": {"recompute": "block", "tile_rows": 4},
        },
        {
            "data": GRID,
            "model": {"energy_head": ["linear", "bilinear"]},
            "state": {"workspace": 5, "initial": "zeros"},
            "refinement": {"momentum": 0.6, "tile_rows": 4, "update": "mirror"},
        },
        {
            "data": WIDE,
            "model": {"reach": 1, "num_kv_heads": 1, "energy_head": ["linear", "bilinear"]},
            "state": {"workspace": 5},
            "refinement": {"reencode": "all", "recompute": "block"},
        },
        {
            "data": WIDE,
            "model": {"reach": 1, "own_keys": False, "predicted_input": "anchored"},
            "refinement": {"recompute": "step", "tile_rows": 6},
        },
    ],
    ids=[
        "plain",
        "grid",
        "step_tiles",
        "block_tiles",
        "heads",
        "adaln",
        "frames",
        "context_alone",
        "workspace",
        "encoded_again",
        "looped",
        "momentum",
        "reach",
        "reach_context_alone",
    ],
)
def test_groups_are_exact_to_second_order(graph, loss, options):
    refinement = {**options.get("refinement", {}), "graph": graph, "loss": loss}
    compare(*build(**{**options, "refinement": refinement}))


@pytest.mark.parametrize("reach", [None, 0, 1])
def test_a_baseline_of_groups_is_the_definition(reach):
    model, observed, targets = build(model={"kind": "baseline", "reach": reach}, data=WIDE)
    network = model.network
    o = model.embed_observed(observed)
    for layer in network.layers:
        o, _ = both_streams(layer, o, o, network, (None, None))
    expected = F.cross_entropy(model.output(network.norm(o)).flatten(0, 1), targets.flatten())
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    loss = model(observed, targets, **options).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    ours = plain.gradients(model, loss)
    defined = plain.gradients(model, expected)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, defined[name], rtol=1e-9, atol=1e-12)


@contextlib.contextmanager
def broken_attention(name, **wrong):
    """One of the two streams' attentions with another group size."""
    right = getattr(attention, name)
    with mock.patch.object(
        attention, name, lambda *a, **options: right(*a, **{**options, **wrong})
    ):
        yield


@pytest.mark.parametrize("name", ["energy_attention", "observed_attention"])
def test_the_comparison_notices_rows_that_see_too_little(name):
    """Breaks a stream's mask on purpose."""
    model, observed, targets = build()
    with pytest.raises(AssertionError), broken_attention(name, group_size=1):
        compare(model, observed, targets)


@pytest.mark.parametrize("lost", ["near_own", "near_context"])
def test_the_comparison_notices_rows_that_see_too_far(lost):
    """Breaks what is within reach on purpose, of candidates and of the context."""
    model, observed, targets = build(model={"reach": 1}, data=WIDE)
    right = getattr(Reach, lost)
    compare(model, observed, targets)
    with (
        pytest.raises(AssertionError),
        mock.patch.object(Reach, lost, lambda self, *a: torch.ones_like(right(self, *a))),
    ):
        compare(model, observed, targets)


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_a_reach_over_the_whole_grid_is_none(kind):
    losses, gradients = [], []
    for reach in (None, 2):
        model, observed, targets = build(model={"reach": reach, "kind": kind}, data=WIDE)
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        loss = model(observed, targets, **options).loss
        losses.append(loss.detach())
        gradients.append(plain.gradients(model, loss))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-13)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_what_a_cell_becomes_does_not_depend_on_the_size_of_the_grid():
    """A task in the corner of a larger grid: cells that are out of reach of all that is new. With
    relative positions and a reach the network says the same of them.
    """
    model, _, _ = build(model={"reach": 1, "num_layers": 1}, data=WIDE, num_groups=1)
    generator = torch.Generator().manual_seed(4)
    large = torch.randint(V, (B, 5, 7), generator=generator)
    states = []
    for rows, columns in ((4, 5), (5, 7)):
        model.regroup(rows * columns, (rows, columns))
        observed = large[:, :rows, :columns].flatten(1)
        embedded = model.embed_observed(observed)
        candidates = 0.3 * embedded.sin()
        energy = model.network.energy(candidates, model.network.encode_context(embedded, 0), 0)
        states.append(energy.unflatten(1, (rows, columns))[:, :3, :4])
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


def test_the_comparison_notices_positions_of_another_kind():
    model, observed, targets = build(data=GRID)
    model.network.rotary.grid = (4, 1)
    compare(model, observed, targets)  # the definition reads the same grid
    model.network.rotary._tables.clear()
    right = RotaryTable._angles
    with (
        pytest.raises(AssertionError),
        mock.patch.object(RotaryTable, "_angles", lambda self, p: right(self, p.flip(0))),
    ):
        compare(model, observed, targets)


def final(model, observed, targets, **options):
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)} | options
    with torch.no_grad():
        return model.eval()(observed, targets, keep_state=torch.float64, **options)


def test_a_groups_cells_see_each_other_and_no_later_group():
    """Changing one observed cell of the last group changes the candidates of that group's successor
    alone: all of them, and none before.
    """
    model, observed, targets = build()
    changed = observed.clone()
    changed[:, 3] = (changed[:, 3] + 1) % V
    before, after = (final(model, o, targets).state for o in (observed, changed))
    moved = (before - after).abs().amax(-1) > 0
    assert moved[:, 3:].all() and not moved[:, :3].any()


@pytest.mark.parametrize("rows, whole", [(3, 2), (7, 1), (12, 1)])
def test_tiles_hold_whole_groups(rows, whole):
    for samples, parts in tiles_of(B, 6, rows, 3):
        assert len(parts) == whole
        assert [part.start for part in parts] == [0, 3][:whole]
        assert parts[-1].stop == 6
        assert (samples.stop - samples.start) * (parts[0].stop - parts[0].start) <= max(rows, 3)


def test_tiles_change_neither_states_nor_energies():
    outputs = []
    for rows in (100, 4):
        model, observed, targets = build(refinement={"tile_rows": rows})
        outputs.append(final(model, observed, targets))
    torch.testing.assert_close(outputs[0].state, outputs[1].state, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        outputs[0].energy_per_step, outputs[1].energy_per_step, rtol=1e-12, atol=1e-13
    )


def test_what_does_not_fit_is_one_sentence():
    model, _, _ = build()
    config = model.config
    with pytest.raises(ValueError, match="tile_rows is 2, the groups have 3 positions"):
        tile_rows(config.refinement.replace(tile_rows=2), V, 6, torch.device("cpu"), 3)
    with pytest.raises(ValueError, match="5 positions in groups of 3"):
        next(tiles_of(B, 5, 3, 3))
    with pytest.raises(ValueError, match="time_embed with groups of 3"):
        EnergyTransformer(config.model.replace(conditioning="time_embed"), 2, group_size=3)
    with pytest.raises(ValueError, match="at least 6"):
        RotaryTable(4, 1e4, 4, (2, 2))
    with pytest.raises(ValueError, match="grid is \\[2, 3\\] with group_size 4"):
        RotaryTable(8, 1e4, 4, (2, 3))
