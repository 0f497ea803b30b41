"""Samples cut over processes (parallel.sequence): losses and gradients are those of one process."""

import json
import os
import subprocess
import sys

import pytest
from preloaded import PreloadedRun
from sequence_ranks import CASES, OTHER_SAMPLES
from training_runs import ROOT, end, free_port

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.sequence_checks import num_readers, sequence_problems
from ebwm_scale.core.errors import ConfigError

RANKS = ROOT / "tests" / "training" / "sequence_ranks.py"
EXACT, SINGLE = 1e-10, 1e-6
MISTAKES = ("position", "factor", "derivative")


def found(processes: int, *arguments: str, timeout: int = 300) -> list[dict]:
    """The rows that so many processes of sequence_ranks.py find."""
    everyone = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    try:
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, **everyone}
            variables = {name: str(value) for name, value in place.items()}
            ranks.append(PreloadedRun([str(RANKS), *arguments], RANKS.parent, variables))
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            end(rank)
    assert [rank.returncode for rank in ranks] == [0] * processes, outputs
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def test_two_processes_have_the_losses_and_gradients_of_one_and_a_mistake_is_seen():
    """In float64: stepwise with a landscape's token, the full graph in tiles, documents by block,
    Transformer++.
    """
    cases = ["stepwise", "tiles", "documents_by_block", "baseline"]
    mistakes = [f"stepwise:{mistake}" for mistake in MISTAKES]
    *rows, refused = found(2, *cases, *mistakes, OTHER_SAMPLES)
    assert len(rows) == len(cases) + len(MISTAKES)
    for row in rows:
        if row["mistake"]:
            assert row["gradients"] > 0.1, row
        else:
            assert max(row["values"], row["gradients"]) < EXACT, row
    for message in refused["refusals"]:  # each process has samples of its own
        assert "were given different tokens" in message


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_form_has_the_losses_and_gradients_of_one_process_in_float64(processes):
    rows = found(processes, *CASES)
    assert len(rows) == len(CASES)
    for row in rows:
        assert max(row["values"], row["gradients"]) < EXACT, row


@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 4])
def test_in_float32_losses_and_gradients_are_those_of_one_process_to_the_last_digits(processes):
    for row in found(processes, "--float32", "stepwise", "full_graph", "random", "baseline"):
        assert max(row["values"], row["gradients"]) < SINGLE, row


@pytest.mark.soak
@pytest.mark.parametrize("case", ["full_graph", "by_step", "baseline"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen_in_every_kind_of_backward(case, mistake):
    (row,) = found(2, f"{case}:{mistake}")
    assert row["gradients"] > 0.1, row


@pytest.mark.soak
@pytest.mark.parametrize("processes, accumulation", [(2, 1), (4, 2)])
def test_engines_of_every_zero_stage_train_the_reference(processes, accumulation):
    """After five steps of AdamW, in float32; of four processes two and two share samples."""
    tool = str(ROOT / "tools" / "check_zero.py")
    options = ["--processes", str(processes), "--accumulation", str(accumulation)]
    options += ["--sequence", "2", "--precision", "fp32", "--checkpoint", "none", "block"]
    outside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    finished = subprocess.run(
        [sys.executable, tool, *options, "--recipe", "S1", "algorithm_1", "baseline"],
        capture_output=True,
        text=True,
        timeout=900,
        env={name: value for name, value in os.environ.items() if name not in outside},
    )
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert finished.returncode == 0 and len(rows) == 20, rows
    assert all(row["sequence"] == 2 for row in rows)


def test_memory_of_a_process_falls_with_the_number_that_share_a_sample():
    """As measured: activations are what a process has a share of, weights it has whole."""
    rows = json.loads((ROOT / "results" / "sequence_parallel.json").read_text())["rows"]
    by_recipe: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], {})[row["processes"]] = row
    assert set(by_recipe) == {"stepwise", "full_graph", "by_block", "baseline"}
    for of_recipe in by_recipe.values():
        whole = of_recipe[1]["activations_mib"]
        assert of_recipe[2]["activations_mib"] < 0.55 * whole
        assert of_recipe[4]["activations_mib"] < 0.31 * whole
        for row in of_recipe.values():
            assert row["estimated_mib"] == pytest.approx(row["live_mib"], rel=0.15), row


@pytest.mark.soak
def test_the_memory_is_measured_again_on_a_smaller_model():
    tool = [sys.executable, str(ROOT / "tools" / "bench_sequence.py"), "--processes", "1", "2"]
    outside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    finished = subprocess.run(
        [*tool, "--positions", "512", "--recipe", "full_graph"],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name not in outside},
    )
    one, two = (json.loads(line) for line in finished.stdout.splitlines())
    assert two["activations_mib"] < 0.6 * one["activations_mib"]


def test_what_cannot_be_cut_is_refused_with_one_line_each():
    def problems(**sections):
        values = {
            "model": {"num_heads": 4, "width": 32, **sections.pop("model", {})},
            "parallel": {"sequence": 4},
            **sections,
        }
        with pytest.raises(ConfigError) as refusal:
            config_from_dict(values)
        return str(refusal.value)

    text = problems(model={"num_heads": 8, "num_kv_heads": 2})
    assert "parallel.sequence is 4 with model.num_kv_heads 2" in text and "[1, 2]" in text
    assert "data.context_length 18: each process has as many" in problems(
        data={"context_length": 18}
    )
    assert "only text is cut over processes; use 1" in problems(
        state={"kind": "embedding", "dimension": 8}
    )
    assert "predicted in groups" in problems(data={"group_size": 4, "context_length": 16})
    assert "data.stream" in problems(data={"stream": ["a.tar"], "manifest": "m.json"})
    assert "the buffer holds whole samples" in problems(refinement={"replay": True})
    assert "exchanges nothing" in problems(refinement={"compile": True})
    config = config_from_dict({"model": {"num_heads": 4, "width": 32}, "parallel": {"sequence": 2}})
    assert sequence_problems(config) == [] and num_readers(config, 6) == 3
    with pytest.raises(ConfigError, match="a multiple of 2, for example 4"):
        num_readers(config, 3)
