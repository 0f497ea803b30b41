"""What the Triton kernels launch compiles for the GPUs it is meant for: half precisions spill no
register, memory fits, tensor cores are used. The common configurations always; every shipped one
with the mark soak.

In a process of its own: Triton's interpreter, which the other tests use, and its compiler exclude
each other.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
# The test extra installs Triton on Linux x86-64, the only place it has wheels for.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
HALF_DIMENSIONS = ("16", "32", "64", "96", "128", "192", "256")
MASKS = ([], ["--groups"], ["--first-visible"], ["--groups", "--first-visible"], ["--sharing"])
PROGRAMS = {"energy": 8, "causal": 7}  # of one head dimension, without groups
GROUPED = {"energy": 9, "causal": 7}  # own keys have programs of their own


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        env=environment,
    )


def compiled(*arguments: str) -> list[dict]:
    process = run_tool(*arguments)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(rows: list[dict], allowed_spills: int = 0) -> None:
    for row in rows:
        assert row["fits"], row
        assert row["spilled_bytes"] <= allowed_spills, row
        assert row["kernel"] == "_second_own" or row["tensor_core_instructions"], row
        is_hopper = row["architecture"] == "sm_90" and row["dtype"] == "bfloat16"
        if is_hopper and row["head_dimension"] == 64 and row["kernel"] != "_second_own":
            assert row["warpgroup_instructions"], row


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_common_half_precision_programs_fit_without_spills(architecture):
    rows = compiled("--architecture", architecture, "--head-dimension", "64")
    assert len(rows) == PROGRAMS["energy"] + PROGRAMS["causal"]
    check(rows)


@pytest.mark.parametrize("architecture", ["sm_100", "sm_120"])
def test_common_programs_fit_blackwell(architecture):
    """Tensor memory on 10.x, 99 KiB of shared memory on 12.x."""
    kernels = ("--kernel", "_forward", "_gradient_query", "_second_query", "_second_key")
    check(
        compiled(
            "--architecture", architecture, "--head-dimension", "64", "--use", "energy", *kernels
        )
    )


def test_common_programs_with_groups_and_first_visible_keys_fit_without_spills():
    rows = compiled(
        *("--architecture", "sm_90", "--head-dimension", "64", "--use", "energy"),
        *("--groups", "--first-visible"),
    )
    assert len(rows) == GROUPED["energy"]
    check(rows)


def test_the_common_float32_programs_fit_without_spills():
    check(
        compiled(
            *("--architecture", "sm_90", "--head-dimension", "64", "--dtype", "float32"),
            *("--use", "energy", "--kernel", "_gradient_query", "_second_query", "_second_key"),
        )
    )


def test_one_program_serves_all_sizes_and_scales():
    """Triton makes sizes that are 1, or multiples of 16, part of a program unless it is told not
    to: what is tested here would not be what runs.
    """
    arguments = ("--architecture", "sm_80", "--head-dimension", "16", "--kernel", "_forward")
    programs = [
        {row["program"] for row in compiled(*arguments, "--positions", positions, "--scale", scale)}
        for positions, scale in (("6", "0.25"), ("1", "1"), ("16", "0.125"))
    ]
    assert programs[0] == programs[1] == programs[2] and len(programs[0]) == 2


def test_a_tile_that_does_not_fit_is_reported():
    """The compiler itself accepts it: memory is held against the limits here."""
    process = run_tool(
        *("--architecture", "sm_86", "--head-dimension", "256", "--use", "energy"),
        *("--kernel", "_tangent", "--tile", "64,64,8,2"),
    )
    assert process.returncode == 1 and not json.loads(process.stdout.splitlines()[0])["fits"]


@pytest.mark.soak
@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "".join(masks) or "plain")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_half_precision_program_fits_its_gpu_without_spills(architecture, masks):
    rows = compiled("--architecture", architecture, "--head-dimension", *HALF_DIMENSIONS, *masks)
    programs = GROUPED if "--groups" in masks else PROGRAMS
    assert len(rows) == len(HALF_DIMENSIONS) * (programs["energy"] + programs["causal"])
    check(rows)


@pytest.mark.soak
@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "".join(masks) or "plain")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_float32_program_fits_its_gpu_and_spills_few_registers_if_any(architecture, masks):
    rows = compiled(
        *("--architecture", architecture, "--dtype", "float32", *masks),
        *("--head-dimension", "16", "32", "64", "96", "128"),
    )
    check([row for row in rows if row["head_dimension"] <= 64])
    allowed = 40 if architecture in ("sm_86", "sm_120") else 16  # bytes: 99 KiB of shared memory
    check([row for row in rows if row["head_dimension"] > 64], allowed_spills=allowed)


@pytest.mark.soak
def test_head_dimensions_that_are_padded_and_attention_without_a_mask_compile():
    rows = compiled("--architecture", "sm_90", "--head-dimension", "80", "--not-causal")
    assert len(rows) == PROGRAMS["energy"] + PROGRAMS["causal"]
    assert all(row["fits"] and not row["causal"] for row in rows)
