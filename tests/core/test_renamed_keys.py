"""Result files of before are read under today's names."""

import json
from pathlib import Path

import pytest

from ebwm_scale.core.arguments import ArgumentParser, OldOption
from ebwm_scale.core.renamed_keys import RENAMED, with_new_names
from ebwm_scale.reporting.evaluation_page import render

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_every_old_key_is_read_under_its_new_name_at_any_depth():
    old = {"rows": [{key: index for index, key in enumerate(RENAMED)}], "loss": 1.0}
    new = {"rows": [{key: index for index, key in enumerate(RENAMED.values())}], "loss": 1.0}
    assert with_new_names(old) == new
    assert with_new_names(new) == new


def test_a_new_key_wins_over_the_old_one_whatever_their_order():
    for row in (
        {"copy_last_loss": 1, "persistence_loss": 2},
        {"persistence_loss": 2, "copy_last_loss": 1},
    ):
        assert with_new_names(row) == {"persistence_loss": 2}


def test_no_name_is_both_old_and_new():
    assert not RENAMED.keys() & set(RENAMED.values())
    assert len(set(RENAMED.values())) == len(RENAMED)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_baseline", "long_noise"])
def test_an_evaluation_of_before_is_shown(name):
    result = json.loads((RESULTS / "evaluation" / name / "evaluation.json").read_text())
    assert "foreign_texts" in result, "a file of before"
    page = render(result)
    (first, *_) = result["foreign_texts"]
    share = first["share_of_pairs_in_which_real_has_lower_loss"]
    assert "AUROC by loss" in page
    assert f"{share['mean']:.4g} [{share['low']:.4g}, {share['high']:.4g}]" in page
    if result["kind"] == "energy":
        shuffled = result["foreign"]["share_of_pairs_in_which_real_is_lower"]
        assert f"an AUROC of {shuffled['mean']:.4g}" in page
        assert "Error by decile of final energy" in page
    assert render(with_new_names(result)) == page


def test_an_option_under_its_old_name_is_taken_and_said_to_be_old(capsys):
    parser = ArgumentParser()
    parser.add_argument("--new", nargs="+", type=int, default=[])
    parser.add_argument("--old", action=OldOption, const="--new", dest="new", nargs="+", type=int)
    assert parser.parse_args([]).new == []
    assert parser.parse_args(["--new", "1"]).new == [1] and not capsys.readouterr().err
    assert parser.parse_args(["--old", "1", "2"]).new == [1, 2]
    assert capsys.readouterr().err == "--old is the old name of --new\n"
    assert "--old" not in parser.format_help()
