"""Every shipped configuration of the Triton kernels compiles for the GPUs it is meant for: no
spills, shared memory that fits, tensor cores.

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


def compiled(*arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_90", pytest.param("sm_86", marks=pytest.mark.soak)]
)
def test_every_half_precision_kernel_fits_its_gpu_without_spills(architecture):
    rows = compiled(
        "--architecture",
        architecture,
        "--head-dimension",
        "16",
        "32",
        "64",
        "96",
        "128",
        "192",
        "256",
    )
    assert len(rows) == 7 * 12
    for row in rows:
        assert row["fits"], row
        assert row["spilled_bytes"] == 0, row
        assert row["kernel"] == "_second_own" or row["tensor_core_instructions"], row
        if (
            architecture == "sm_90"
            and row["head_dimension"] == 64
            and row["kernel"] != "_second_own"
        ):
            assert row["warpgroup_instructions"], row


@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_90", pytest.param("sm_86", marks=pytest.mark.soak)]
)
def test_every_float32_kernel_fits_its_gpu_and_spills_four_registers_at_most(architecture):
    rows = compiled(
        "--architecture",
        architecture,
        "--head-dimension",
        "16",
        "32",
        "64",
        "96",
        "128",
        "--dtype",
        "float32",
    )
    assert len(rows) == 5 * 12
    for row in rows:
        assert row["fits"], row
        assert row["kernel"] == "_second_own" or row["tensor_core_instructions"], row
        most = 0 if row["head_dimension"] <= 64 else 16 if architecture != "sm_86" else 40
        assert row["spilled_bytes"] <= most, row


def test_head_dimensions_that_are_padded_and_attention_without_a_mask_compile():
    rows = compiled("--architecture", "sm_90", "--head-dimension", "80", "--not-causal")
    assert len(rows) == 12 and all(row["fits"] and not row["causal"] for row in rows)


@pytest.mark.parametrize("mask", [(), ("--not-causal",)])
def test_sizes_of_one_compile(mask):
    """Triton turns integer arguments that are 1 into constants, so a single query is another
    program.
    """
    assert len(compiled("--architecture", "sm_90", "--head-dimension", "64", "--ones", *mask)) == 12


def test_a_tile_that_does_not_fit_is_reported():
    """The compiler itself accepts it: shared memory is held against the limit here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "--architecture",
            "sm_86",
            "--head-dimension",
            "256",
            "--kernel",
            "_tangent",
            "--tile",
            "64,64,8,2",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert process.returncode == 1 and not json.loads(process.stdout.splitlines()[0])["fits"]
