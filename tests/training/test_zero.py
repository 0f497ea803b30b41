"""Every ZeRO stage trains what one process in float64 would; a stage that is wrong is seen.

The whole table: docs/distributed.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_zero.py"


def checked(*arguments: str) -> tuple[int, list[dict]]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    process = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    return process.returncode, [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("S1", marks=pytest.mark.soak),
        "S2",
        pytest.param("algorithm_1", marks=pytest.mark.soak),
        pytest.param("baseline", marks=pytest.mark.soak),
    ],
)
def test_two_processes_train_the_reference_at_every_stage(recipe):
    precisions = (
        ["fp32", "bf16"] if recipe in ("S1", "baseline") else ["fp32"]
    )  # the others in bf16: results/zero_exactness.json
    code, rows = checked("--processes", "2", "--recipe", recipe, "--precision", *precisions)
    assert code == 0, [row for row in rows if not row["ok"]]
    assert len(rows) == 4 * len(precisions) * (1 if recipe == "baseline" else 3)
    assert all((row["numbers_resident_between_steps"] == 0) == (row["stage"] == 3) for row in rows)


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["algorithm_1", "baseline"])
def test_fused_operations_train_the_reference_where_gradients_are_partitioned(recipe):
    """In Triton's interpreter; attention is PyTorch's."""
    code, rows = checked(
        "--processes", "2", "--recipe", recipe, "--precision", "fp32", "--stages", "2",
        "--checkpoint", "none", "--fused",
    )  # fmt: skip
    assert code == 0, rows
    assert [row["fused"] for row in rows] == [True]


def test_heads_shallow_streams_workspaces_candidates_and_exits_train_the_reference():
    """workspace: with energies that know their level. exits: learned, with momentum and the penalty
    on steps that do not shrink.
    """
    code, rows = checked(
        "--processes",
        "2",
        "--recipe",
        "shallow",
        "workspace",
        "candidates",
        "exits",
        "--precision",
        "fp32",
        "--stages",
        "1",
        "2",
        "3",
        "--checkpoint",
        "block",
    )
    assert code == 0 and len(rows) == 12, rows


@pytest.mark.soak
def test_normed_heads_a_soft_cap_and_a_z_loss_train_the_reference():
    options = ["--recipe", "stable", "--precision", "fp32", "--checkpoint", "none", "block"]
    code, rows = checked("--processes", "2", *options)
    assert code == 0 and len(rows) == 8, rows


def test_looped_blocks_train_the_reference_without_and_with_partitioned_parameters():
    """Of Transformer++, and of an energy model that reads twice."""
    options = ["--recipe", "looped", "read_twice", "--precision", "fp32", "--stages", "0", "3"]
    code, rows = checked("--processes", "2", *options, "--checkpoint", "none")
    assert code == 0 and len(rows) == 4, rows


def test_groups_and_worlds_train_the_reference_without_and_with_partitioned_parameters():
    """A world: frames of patches, with an action of numbers and one of buttons behind each. Within
    reach: cells of a grid that see themselves alone, read again before the second step.
    """
    options = ["--recipe", "groups", "world", "reach", "--precision", "fp32", "--stages", "1", "3"]
    code, rows = checked("--processes", "2", *options, "--checkpoint", "block")
    assert code == 0 and len(rows) == 6, rows


@pytest.mark.soak
def test_accumulated_micro_batches_train_the_same_at_every_stage():
    code, rows = checked(
        "--processes",
        "2",
        "--recipe",
        "S1",
        "--precision",
        "fp32",
        "--checkpoint",
        "block",
        "--accumulation",
        "2",
    )
    assert code == 0 and len(rows) == 4, rows


@pytest.mark.soak
def test_four_processes_and_parameters_on_the_host():
    code, rows = checked(
        "--processes",
        "4",
        "--recipe",
        "S1",
        "--stages",
        "3",
        "--checkpoint",
        "block",
        "--offload",
        "parameters",
    )
    assert code == 0 and len(rows) == 2, rows


def test_the_check_sees_a_stage_3_that_works_on_parts_of_parameters():
    code, rows = checked(
        "--processes",
        "2",
        "--recipe",
        "S1",
        "--precision",
        "fp32",
        "--stages",
        "3",
        "--checkpoint",
        "block",
        "--break",
        "partition",
    )
    assert code == 1 and rows[0]["gradients"] > 0.1
