"""The study of optimizers: rates are tuned between worse ones, no run is made twice, seeds are
paired.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import study_optimizers
from study_optimizers import EnoughRuns, Study, summary

BEST = {"adamw": 0.006, "muon": 0.048}
BEST_PART = 0.024  # of what AdamW keeps beside Muon
TWO = "muon, two rates"


@pytest.fixture
def trained(monkeypatch):
    """Runs as they were asked for; each has a loss that grows with the distance from BEST."""
    asked = []

    def train(self, key):
        asked.append(key)
        best = BEST[key["optimizer"]] if key["muon_learning_rate"] is None else BEST_PART
        distance = abs(math.log2(key["learning_rate"] / best))
        loss = (
            4
            - 0.05 * (best == BEST_PART)
            + 0.1 * distance
            + 0.01 * key["seed"]
            - 0.3 * (key["optimizer"] == "muon")
        )
        return {"validation_loss": loss + 0.02 * (key["seed"] == 2)}

    monkeypatch.setattr(Study, "_train", train)
    return asked


def arguments(tmp_path, *more: str) -> list[str]:
    output = ["--output", str(tmp_path / "r.jsonl"), "--steps", "10", "--timed-steps", "1"]
    return ["study_optimizers.py", "manifest.json", *output, *more]


def test_a_rate_at_the_edge_is_followed_and_nothing_is_trained_twice(tmp_path, trained):
    study = Study(tmp_path / "r.jsonl", Path("m.json"), tmp_path)
    assert study.tune("energy", "adamw", 5) == 0.006 and len(trained) == 4
    assert study.tune("energy", "muon", 5) == 0.048 and len(trained) == 4 + 6
    assert max(key["learning_rate"] for key in trained) == 0.096
    assert study.tune_parts("energy", 0.048, 5) == 0.024
    parts = [key for key in trained if key["phase"] == "parts"]
    assert [key["learning_rate"] for key in parts] == [0.024, 0.096, 0.012]
    assert {key["muon_learning_rate"] for key in parts} == {0.048} and len(trained) == 13
    again = Study(tmp_path / "r.jsonl", Path("m.json"), tmp_path, most_runs=0)
    assert again.tune("energy", "muon", 5) == 0.048 and len(trained) == 13
    assert again.tune_parts("energy", 0.048, 5) == 0.024 and len(trained) == 13
    with pytest.raises(EnoughRuns):
        again.run("seeds", "energy", "muon", 0.048, 0, 10)
    for row in again.rows:
        assert row["command"] and row["machine"] and row["versions"]["torch"] and row["commit"]


def test_the_difference_of_optimizers_is_paired_by_seed(tmp_path, trained, monkeypatch, capsys):
    cost = {"per_step": {name: {"cpu_s": 1.0} for name in BEST}, "cpu_ratio": 1.0}
    monkeypatch.setattr(Study, "time_steps", lambda self, kind, count: None)
    monkeypatch.setattr(sys, "argv", arguments(tmp_path, "--kinds", "energy", "--most-runs", "3"))
    assert study_optimizers.main() == 75
    monkeypatch.setattr(sys, "argv", arguments(tmp_path, "--kinds", "energy"))
    assert study_optimizers.main() == 0
    found = json.loads((tmp_path / "r.json").read_text())["energy"]
    assert [found[name]["learning_rate"] for name in BEST] == list(BEST.values())
    assert list(found["muon"]["seeds"]) == ["0", "1", "2"]
    rows = [*Study(tmp_path / "r.jsonl", Path("m"), tmp_path).rows]
    assert found[TWO]["learning_rate"] == 0.024 and found[TWO]["muon_learning_rate"] == 0.048
    (worse,) = [row for row in rows if _is_of_seed_2(row)]
    worse["validation_loss"] += 0.3
    result = summary([*rows, {"phase": "cost", "kind": "energy", **cost}])["energy"]
    gain = result["muon"]["minus_adamw"]
    differences = torch.tensor([-0.3, -0.3, 0.0], dtype=torch.float64)
    half = 4.303 * differences.std() / 3**0.5  # of Student's t with two degrees of freedom
    assert gain["mean"] == pytest.approx(-0.2)
    assert gain["high"] - gain["mean"] == pytest.approx(float(half))
    assert result["cost"] == cost and "baseline" not in summary(rows)
    lines = study_optimizers.table({"energy": result})
    assert "| energy model, AdamW | 0.006 | 4.000 / 4.010 / 4.040 | 4.017 |  | 1000 |" in lines
    low, high = gain["low"], gain["high"]
    row = "| energy model, Muon | 0.048 | 3.700 / 3.710 / 4.040 | 3.817 | -0.200"
    assert lines[-2] == f"{row} [{low:+.3f}, {high:+.3f}] | 1000 |"
    two = "| energy model, Muon, two rates | 0.048, 0.024 | 3.650 / 3.660 / 3.690 | 3.667 | -0.350"
    assert lines[-1] == f"{two} [-0.350, -0.350] |  |"


def _is_of_seed_2(row):
    of_muon = row["optimizer"] == "muon" and row.get("muon_learning_rate") is None
    return of_muon and row["phase"] == "seeds" and row["seed"] == 2


def test_what_has_no_interval_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", arguments(tmp_path, "--seeds", "0"))
    assert study_optimizers.main() == 2
    assert "an interval is made of 2 to 5" in capsys.readouterr().err


def test_steps_of_both_optimizers_are_timed_on_the_model_of_the_quick_start(tmp_path, monkeypatch):
    flush = torch.tensor(1e-40).mul(1).item() == 0
    monkeypatch.setattr(study_optimizers.Stepper, "CONTEXT", 8)
    monkeypatch.setattr(study_optimizers.Stepper, "VOCABULARY", 64)
    try:
        row = Study(tmp_path / "r.jsonl", Path("m.json"), tmp_path).time_steps("baseline", 1)
    finally:
        torch.set_flush_denormal(flush)
    assert set(row["per_step"]) == {"adamw", "muon"} and row["cpu_ratio"] > 0
