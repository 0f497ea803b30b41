"""What the fused pointwise operations launch compiles for the GPUs it is meant for, and spills no
register: the widest in registers always, every program with the mark soak.

In a process of its own: Triton's interpreter, which the other tests use, and its compiler exclude
each other.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebwm_kernels.fused.launches import TRITON_INSTALLED

TOOL = Path(__file__).parents[2] / "tools" / "compile_fused.py"
pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
PROGRAMS = 18  # of an architecture, width and dtype, and as many of the vocabulary without a width
SPILLS = 8  # bytes that the compiler may move out of a loop, so that more programs fit
RESULTS = Path(__file__).parents[2] / "results" / "compiled_fused.jsonl"


def compiled(*arguments: str, expected: int = 0) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        env=environment,
    )
    assert process.returncode == expected, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_the_largest_fused_programs_spill_no_register():
    rows = compiled("--architecture", "sm_90", "--width", "1024", "--kernel", "_norm_second")
    assert {tuple(row["flags"]) for row in rows} == {(), ("WITH_WEIGHT",)}
    assert all(row["spilled_bytes"] == 0 and row["registers"] <= 128 for row in rows)


def test_the_result_file_holds_every_architecture_and_spills_next_to_nothing():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()][1:]
    vocabulary = {(row["architecture"], row["dtype"]) for row in rows if row["width"] is None}
    assert vocabulary >= {("sm_80", "bfloat16"), ("sm_90", "bfloat16"), ("sm_90", "float32")}
    of_sizes = {row["width"] for row in rows if row["architecture"] == "sm_90"}
    assert of_sizes >= {384, 768, 1024, 1536}
    assert all(row["spilled_bytes"] <= SPILLS for row in rows)
    # what is spilled is not for want of registers
    assert all(row["registers"] <= 176 for row in rows if row["spilled_bytes"])


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_no_fused_program_spills_registers(architecture):
    widths = ("384", "768", "1024", "2048", "4096", "16384")
    dtypes = ("bfloat16", "float16", "float32")
    rows = compiled("--architecture", architecture, "--width", *widths, "--dtype", *dtypes)
    assert len(rows) >= (1 + len(widths)) * len(dtypes) * (PROGRAMS - 2)
    assert all(row["spilled_bytes"] <= SPILLS for row in rows)
