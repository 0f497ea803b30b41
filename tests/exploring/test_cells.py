"""Cells of a task have energies of their own, whose mean is the group's; and where an answer has
changed is listed.
"""

import dataclasses

import pytest
import torch

from ebwm_scale.evaluation.answers import answers, cell_energies
from ebwm_scale.evaluation.solving_examples import some_of
from ebwm_scale.exploring.task_page import MAX_CHANGES, changes_of_mind
from ebwm_scale.reporting.numbers import show


@pytest.mark.parametrize("name", ["mazes", "mazes_with_workspace", "hops"])
def test_the_energy_of_a_group_is_the_mean_of_its_cells(name, opened, runs):
    explorer = opened(name, "--instances", "4").explorer
    model, _ = runs[name]
    batch = some_of(explorer.batches, [0, 1])
    size = model.network.group_size
    for answer in answers(model, batch, [1, 3], cells=True):
        groups = answer.cells.unflatten(1, (-1, size))
        torch.testing.assert_close(
            groups.mean(-1), answer.energy.unflatten(1, (-1, size))[..., 0].float()
        )
        if size > 1:
            assert float(groups.std(-1).min()) > 0
    assert all(answer.cells is None for answer in answers(model, batch, [1]))


def test_cells_have_none_where_a_thought_does_not_hold_what_they_depend_on(runs):
    model, config = runs["mazes"]
    few = config.model_copy(
        update={"refinement": config.refinement.model_copy(update={"candidates": 2})}
    )
    stand_in = dataclasses.make_dataclass("Model", ["config"])(few)
    assert cell_energies(stand_in, None, None, 1) is None


def test_the_page_shades_cells_by_their_energies(opened, runs):
    pages = opened("mazes", "--instances", "4")
    page = pages.page({"instance": "2", "most_steps": "3"})
    batch = some_of(pages.explorer.batches, [1])
    *_, answer = answers(runs["mazes"][0], batch, [1, 2, 3], cells=True)
    scored = (batch.targets[0] >= 0).nonzero().flatten().tolist()
    rows = pages.explorer.split.manifest.content.grid[1]
    for place in scored:
        energy = show(float(f"{float(answer.cells[0, place]):.5g}"))
        hint = f"row {place // rows + 1} column {place % rows + 1}: energy {energy}"
        assert f"<title>{hint}</title>" in page
    assert 'id="shade-energy"' in page and 'href="#panel1"' in page
    assert "Where it changed its mind" in page
    plain = opened("plain_mazes").page()
    assert 'id="shade-energy"' not in plain


def test_changes_of_mind_are_listed_with_what_became_right():
    after = [
        {"num_steps": 1, "predicted": ["a", "b", "c", None]},
        {"num_steps": 2, "predicted": ["a", "c", "d", None]},
    ]
    found = changes_of_mind({"answer": ["a", "c", "c", None], "after": after}, (2, 2))
    assert found["heads"] == ["where", "after 1", "after 2", "right answer"]
    assert found["rows"] == [
        ["row 1 column 2", "b ✗", "c", "c"],
        ["row 2 column 1", "c", "d ✗", "c"],
    ]
    assert found["sentence"] == (
        "2 of 3 answers changed. From 1 to 2 steps 1 became right and 1 wrong."
    )
    text = changes_of_mind({"answer": ["a"], "after": after[:1]}, None)
    assert text["rows"] == [] and text["sentence"] == ""
    many = 2 * MAX_CHANGES
    after = [{"num_steps": n, "predicted": [word] * many} for n, word in ((1, "a"), (2, "b"))]
    found = changes_of_mind({"answer": ["b"] * many, "after": after}, None)
    assert len(found["rows"]) == MAX_CHANGES and found["rows"][0][0] == "position 1"
    assert f"The first {MAX_CHANGES} are shown." in found["sentence"]
