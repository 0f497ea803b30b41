"""The benchmark tools print what they promise: one JSON line per measurement, and refuse what they
cannot measure.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LEVELS = ("forward", "inner_gradient", "backward", "double_backward", "both_backwards")
TOOLS = Path(__file__).parents[2] / "tools"
SMALL = (
    "--size",
    "4xs",
    "--sequence",
    "16",
    "--batch",
    "1",
    "--vocabulary",
    "300",
    "--steps",
    "1",
    "--threads",
    "1",
)


def run(tool, *arguments, expect=0):
    process = subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments], capture_output=True, text=True, timeout=240
    )
    assert process.returncode == expect, process.stderr[-2000:]
    return (
        [json.loads(line) for line in process.stdout.splitlines()]
        if expect == 0
        else process.stderr
    )


def test_a_step_is_measured_beside_the_baseline_and_profiled():
    (row,) = run("bench_step.py", *SMALL, "--compare", "baseline", "--profile")
    assert (
        row["vocabulary"] == 300
        and row["num_refinement_steps"] == 2
        and row["cpu_ratio"] > 1
        and row["peak_memory_gib"] > 0
    )
    assert sum(row["profile"].values()) == pytest.approx(1, abs=1e-3) and any(
        "attention" in name for name in row["profile"]
    )
    assert sum(row["flops"].values()) == row["flops_total"]


def test_a_form_that_reads_twice_is_compared_with_blocks_that_are_passed_once():
    compared = []
    for loops in (1, 2):
        options = ("--compare", "baseline", "--set", f"model.loops={loops}")
        (row,) = run("bench_step.py", *SMALL, *options)
        compared.append((row["flops_total"], row["compared_flops"]))
    (once, plain), (twice, beside) = compared
    assert twice > once and beside == plain


@pytest.mark.soak
def test_a_sweep_is_one_process_per_value_and_a_plot(tmp_path):
    rows = run(
        "bench_step.py",
        *SMALL,
        "--sweep",
        "num-refinement-steps=1,3",
        "--plot",
        str(tmp_path / "sweep.png"),
    )
    assert [row["num_refinement_steps"] for row in rows] == [1, 3] and rows[1][
        "flops_total"
    ] > rows[0]["flops_total"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "expected one of vocabulary" in run("bench_step.py", "--sweep", "size=1,2", expect=2)


@pytest.mark.soak
def test_kernels_are_measured_against_pytorch_math_and_float64(tmp_path):
    rows = run(
        "bench_kernels.py",
        "--device",
        "cpu",
        "--sizes",
        "40",
        "--head-dimension",
        "16",
        "--dtype",
        "float32",
        "--hidden",
        "32",
        "--tokens",
        "80",
        "--repeats",
        "2",
        "--output",
        str(tmp_path / "kernels.json"),
    )
    assert {(row["implementation"], row["level"]) for row in rows} == {
        (name, level) for name in ("energy", "causal", "math") for level in LEVELS
    }
    assert all(row["error"] < 1e-5 for row in rows if row["implementation"] != "causal")
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["rows"] == rows and {"command", "device", "torch", "commit"} <= set(written)
    assert "needs a GPU" in run("bench_kernels.py", "--device", "cpu", "--tune", expect=2)
    assert "multiple of the head dimensions" in run(
        "bench_kernels.py", "--device", "cpu", "--hidden", "100", expect=2
    )


@pytest.mark.multiprocess
@pytest.mark.soak
def test_reading_is_measured_against_plain_webdataset_on_the_same_shards(tmp_path, monkeypatch):
    sys.path.insert(0, str(TOOLS))
    import bench_data

    monkeypatch.setattr(
        bench_data, "rate", lambda read, seconds: [read() for _ in range(3)] and 3.0
    )
    rows = [bench_data.measure(path, 0.01, 1) for path in bench_data.synthetic(tmp_path)]
    assert [row["dataset"] for row in rows] == ["text", "jpeg", "embedding"]
    assert all(
        row["indexed"]["samples_per_s"] == row["webdataset"]["samples_per_s"] == 3.0
        and row["bytes_per_sample"] > 1000
        and row["loader"]["2 workers"]["samples_per_s"] == 48
        for row in rows
    )


@pytest.mark.soak
@pytest.mark.multiprocess
def test_raw_text_is_measured_beside_the_same_text_as_prepared_shards(tmp_path):
    sys.path.insert(0, str(TOOLS))
    from bench.raw_text import measure_raw_text

    row = measure_raw_text(tmp_path, megabytes=1.0, seconds=0.02, repeats=1)
    loaders = [name for name in row if isinstance(row[name], dict)]
    assert len(loaders) == 5 and row["preparing_s"] > 0
    for name in loaders:
        assert row[name]["blocks_per_s"] > 0
        assert row[name]["tokens_per_s"] == pytest.approx(256 * row[name]["blocks_per_s"], rel=0.01)
