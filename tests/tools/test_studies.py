"""The worlds of the studies are what they say, their truth is the truth, and the studies run."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import study_candidates
import study_hops
import study_reasoning
import study_stability
import study_uncertainty

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.load import load_config
from ebwm_scale.core.errors import UserError


def test_the_stated_entropy_of_the_chain_is_that_of_its_frequencies():
    tokens, entropy = study_uncertainty.chain(20_000, seed=5)
    before, after, stated = tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), entropy.flatten()
    for token in (0, 7, 29, 95):
        counts = torch.bincount(after[before == token], minlength=study_uncertainty.TOKENS).double()
        share = counts[counts > 0] / counts.sum()
        assert abs(float(-(share * share.log()).sum()) - float(stated[before == token][0])) < 0.02
        assert len(share) == 2 ** (token % study_uncertainty.BRANCHES)


def test_the_stated_deviation_of_the_circle_is_that_of_its_steps():
    states, deviation = study_uncertainty.circle(5000, seed=5)
    angle = torch.atan2(states[..., 1], states[..., 0])
    step = (angle[:, 1:] - angle[:, :-1] - study_uncertainty.TURN + math.pi).remainder(
        2 * math.pi
    ) - math.pi
    for level in (0.0, 0.3):  # the larger ones wrap around the circle
        assert abs(float(step[deviation == level].std()) - level) < 0.01
    assert abs(float(step[deviation == 1.0].std()) - 1) < 0.05


def test_chains_of_look_ups_are_answered_by_looking_up():
    for hops in ((1,), (3,), (1, 2, 4)):
        observed, targets, asked_hops = study_hops.sequences(4, hops, seed=1)
        n = study_hops.NODES
        assert int(observed.max()) < study_hops.vocabulary_of(hops) and set(
            asked_hops.flatten().tolist()
        ) == set(hops)
        for row, answers, numbers in zip(observed.tolist(), targets.tolist(), asked_hops.tolist()):
            points_to = {row[2 * i]: row[2 * i + 1] - n for i in range(n)}
            asked = [i for i, answer in enumerate(answers) if answer != IGNORE]
            assert len(asked) == n
            for i, number in zip(asked, numbers):
                kind, node = divmod(row[i] - 2 * n, n)
                assert hops[kind] == number
                for _ in range(number):
                    node = points_to[node]
                assert answers[i] == n + node


def test_cells_of_strips_are_reached_from_their_neighbours():
    observed, targets = study_stability.strips(50, seed=1)
    for cells, answers in zip(observed.tolist(), targets.tolist()):
        reached = {cells.index(study_stability.START)}
        for _ in cells:
            near = {i + step for i in reached for step in (-1, 1)} & set(range(len(cells)))
            reached |= {i for i in near if cells[i] != study_stability.WALL}
        for i, (cell, answer) in enumerate(zip(cells, answers)):
            expected = IGNORE if cell == study_stability.WALL else int(i in reached)
            assert answer == expected


@pytest.mark.parametrize(
    "tool, arguments, rows",
    [
        pytest.param(
            study_stability,
            ["--steps", "2", "--seeds", "1"],
            len(study_stability.FORMS),
            marks=pytest.mark.soak,
        ),
        (
            study_hops,
            [
                "--hops",
                "1",
                "1,2",
                "--forms",
                "transformer++, 2 layers",
                "2 steps, every",
                "--steps",
                "2",
            ],
            4,
        ),
        (study_uncertainty, ["--steps", "2", "--starts", "2", "--samples", "4"], 4),
    ],
)
def test_a_study_runs_and_writes_its_rows(tmp_path, monkeypatch, capsys, tool, arguments, rows):
    output = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", [tool.__name__ + ".py", *arguments, "--output", str(output)])
    flush = torch.tensor(1e-40).mul(1).item() == 0
    try:
        assert tool.main() == 0
        result = json.loads(output.read_text())
        assert len(result["rows"]) == rows and result["command"]
        if tool is study_hops:  # said again, nothing is trained twice
            capsys.readouterr()
            assert tool.main() == 0 and not capsys.readouterr().out
    finally:
        torch.set_flush_denormal(flush)


def test_the_study_of_candidates_trains_every_form_on_the_same_batches(tmp_path, monkeypatch):
    output = tmp_path / "r.json"
    arguments = ["--vocabulary", "50", "--candidates", "4", "50", "--context-length", "6"]
    arguments += ["--steps", "2", "--batch-size", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["study_candidates.py", *arguments])
    flush = torch.tensor(1e-40).mul(1).item() == 0
    threads = torch.get_num_threads()
    try:
        assert study_candidates.main() == 0
    finally:
        torch.set_flush_denormal(flush)
        torch.set_num_threads(threads)
    rows = {row["form"]: row for row in json.loads(output.read_text())["forms"]}
    assert len(rows) == 5 and rows["transformer++"]["cpu_ratio"] == 1
    dense, few, all_tokens = (
        rows[f"two steps, {which}"] for which in ("all tokens", "4 candidates", "50 candidates")
    )
    assert dense["training_loss_per_step"] == all_tokens["training_loss_per_step"]
    assert dense["training_loss_per_step"][1] != few["training_loss_per_step"][1]
    assert dense["flops_ratio"] == all_tokens["flops_ratio"] > few["flops_ratio"]


def test_a_study_of_candidates_needs_data_or_the_size_of_a_vocabulary(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study_candidates.py", "--output", "r.json"])
    with pytest.raises(SystemExit) as stopped:
        study_candidates.main()
    assert stopped.value.code == 2 and "give a manifest" in capsys.readouterr().err


def test_a_study_damps_the_steps_that_training_did_not_see_and_no_other():
    config = load_config("quickstart_reasoning")
    damped = study_reasoning.with_damping(config, 1.0)
    assert damped.refinement.damping == 1 != config.refinement.damping
    assert study_reasoning.with_damping(config, None) is config
    baseline = load_config("quickstart_reasoning_baseline")
    assert study_reasoning.with_damping(baseline, 2.0) is baseline
    for seen in ("refinement.damping_after=2", "refinement.damping_after=1"):
        with pytest.raises(UserError, match="training saw the damping of these runs"):
            study_reasoning.with_damping(load_config("quickstart_reasoning", [seen]), 2.0)
