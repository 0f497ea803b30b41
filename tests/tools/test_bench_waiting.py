"""The benchmark of waiting threads: runs in turns, others only beside, losses that are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_waiting


@pytest.fixture
def others(monkeypatch):
    """The processes that were started beside runs."""
    started = []
    start = subprocess.Popen

    def popen(words, **options):
        process = start(words, **options)
        started.append(process)
        return process

    monkeypatch.setattr(bench_waiting.subprocess, "Popen", popen)
    return started


def main(monkeypatch, output, train) -> int:
    words = ["bench_waiting.py", "manifest.json", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(bench_waiting, "train", train)
    monkeypatch.setattr(sys, "argv", words)
    return bench_waiting.main()


def test_runs_take_turns_alone_and_beside_others(tmp_path, monkeypatch, others, capsys):
    asked = []

    def train(options, policy):
        asked.append((policy, sum(process.poll() is None for process in others)))
        seconds = 2.0 if policy == "passive" else 6.0 + len(asked)
        return {"wall_s": seconds, "cpu_s": seconds / 2}, [3.0, 2.0]

    assert main(monkeypatch, tmp_path / "r.json", train) == 0
    turns = ["passive", "sleeping", "active"] * 2
    assert asked == [(policy, 0) for policy in turns] + [(policy, 2) for policy in turns]
    assert all(process.poll() is not None for process in others)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["alone"]["passive"] == {"wall_s": 2.0, "cpu_s": 1.0}
    assert result["alone"]["active_over_passive"]["wall_s"] == (9 / 2 + 12 / 2) / 2
    assert result["beside"]["sleeping_over_passive"]["cpu_s"] == (14 / 2 + 17 / 2) / 2
    assert result["commit"] and result["machine"]


def test_runs_whose_losses_differ_are_no_result(tmp_path, monkeypatch, capsys):
    def train(options, policy):
        return {"wall_s": 1.0, "cpu_s": 1.0}, [3.0, 2.0 if policy == "passive" else 2.5]

    assert main(monkeypatch, tmp_path / "r.json", train) == 2
    assert "losses of these runs differ" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
