"""What the Triton kernels launch compiles for the GPUs it is meant for: half precisions are never
short of registers, memory fits, tensor cores are used. The common configurations always; every
shipped one with the mark soak.

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
MOST_REGISTERS = 255  # of a thread
# Bytes that float32 may spill at the limit of registers: three TF32 passes hold everything three
# times. And what the best tile that was found spills, by kernel and head dimension: at the smallest
# tile that tensor cores take, the rows of a program alone fill its registers.
SINGLE_SPILLS = {16: 16, 32: 0, 64: 16, 96: 16, 128: 16}
SINGLE_SPILLS_MORE = {("_second_query", 96): 24, ("_second_query", 128): 72, ("_tangent", 128): 32}
# Without masks on the first three architectures: nothing to 64, and beyond it four registers, ten
# on 8.6.
PLAIN_ARCHITECTURES = ("sm_80", "sm_86", "sm_90")
PLAIN_SPILLS = {"sm_80": 16, "sm_86": 40, "sm_90": 16}
HALF_DIMENSIONS = ("16", "32", "64", "96", "128", "192", "256")
PLAIN, GROUPS, FIRST_VISIBLE, SHARING = [], ["--groups"], ["--first-visible"], ["--sharing"]
ALL_MASKS = GROUPS + FIRST_VISIBLE
# Each mask alone where most models run; elsewhere none, all of them, and shared keys.
COMBINATIONS = [
    (architecture, masks)
    for architecture in ARCHITECTURES
    for masks in (PLAIN, GROUPS, FIRST_VISIBLE, ALL_MASKS, SHARING)
    if architecture in ("sm_80", "sm_90") or masks not in (GROUPS, FIRST_VISIBLE)
]
# Programs of one head dimension, without groups; with them own keys have programs of their own.
PROGRAMS = {"energy": 8, "causal": 7}
GROUPED = {"energy": 9, "causal": 7}
JOINT = 3  # with the ordinary backward: half precision, without groups, to 128 columns


def name_of(value) -> str:
    return value if isinstance(value, str) else "".join(value) or "plain"


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        env=environment,
    )


def num_programs(dimensions: tuple[str, ...], masks: list[str]) -> int:
    """Of both uses in half precision."""
    if "--groups" in masks:
        return len(dimensions) * sum(GROUPED.values())
    joint = sum(JOINT for dimension in dimensions if int(dimension) <= 128)
    return len(dimensions) * sum(PROGRAMS.values()) + joint


def compiled(*arguments: str) -> list[dict]:
    process = run_tool(*arguments)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(rows: list[dict], allowed_spills: int = 0) -> None:
    """Nothing is spilled for want of registers. Where a program has some left, ptxas may have moved
    a few out of its loops so that more programs fit a multiprocessor: at most eight, by no
    more than twenty instructions.
    """
    for row in rows:
        assert row["fits"], row
        if row["registers"] == MOST_REGISTERS:
            assert row["spilled_bytes"] <= allowed_spills, row
        else:
            assert row["spilled_bytes"] <= 32 and row["spill_instructions"] <= 20, row
        assert row["kernel"] == "_second_own" or row["tensor_core_instructions"], row
        is_hopper = row["architecture"] == "sm_90" and row["dtype"] == "bfloat16"
        if is_hopper and row["head_dimension"] == 64 and row["kernel"] != "_second_own":
            assert row["warpgroup_instructions"], row


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.soak), "sm_90"])
def test_common_half_precision_programs_fit_without_spills(architecture):
    rows = compiled("--architecture", architecture, "--head-dimension", "64")
    assert len(rows) == num_programs(("64",), PLAIN)
    check(rows)


@pytest.mark.parametrize("architecture", ["sm_100", pytest.param("sm_120", marks=pytest.mark.soak)])
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
        *("--architecture", "sm_86", "--head-dimension", "256", "--use", "causal"),
        *("--kernel", "_forward", "--tile", "64,64,4,3"),
    )
    assert process.returncode == 1 and not json.loads(process.stdout.splitlines()[0])["fits"]


@pytest.mark.soak
@pytest.mark.parametrize("architecture, masks", COMBINATIONS, ids=name_of)
def test_every_bfloat16_program_fits_its_gpu_and_has_registers_enough(architecture, masks):
    rows = compiled("--architecture", architecture, "--head-dimension", *HALF_DIMENSIONS, *masks)
    assert len(rows) == num_programs(HALF_DIMENSIONS, masks)
    check(rows)


@pytest.mark.soak
@pytest.mark.parametrize("masks", [PLAIN, ALL_MASKS], ids=name_of)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_float16_programs_fit_as_bfloat16_ones_do(architecture, masks):
    """They differ in conversions alone."""
    rows = compiled(
        *("--architecture", architecture, "--dtype", "float16", *masks),
        *("--head-dimension", *HALF_DIMENSIONS),
    )
    check(rows)


def plain_spills(row: dict) -> int:
    """What a float32 program without masks may spill, in bytes, at any number of registers."""
    return 0 if row["head_dimension"] <= 64 else PLAIN_SPILLS[row["architecture"]]


def test_the_recorded_float32_programs_without_masks_spill_no_more_than_is_allowed():
    """Of the last time each was compiled; the sweep compiles them again (make soak)."""
    path = Path(__file__).parents[2] / "results" / "compiled_kernels.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    masks = ("groups", "first_visible", "sharing")
    plain = [
        row
        for row in rows
        if row["dtype"] == "float32"
        and row["architecture"] in PLAIN_ARCHITECTURES
        and not any(row[mask] for mask in masks)
    ]
    assert len(plain) == 225
    for row in plain:
        assert row["spilled_bytes"] <= plain_spills(row), row


def test_the_programs_that_were_compiled_again_are_short_of_no_registers():
    """Parts that the header names, whose rows are of the kernels as they are."""
    path = Path(__file__).parents[2] / "results" / "compiled_kernels.jsonl"
    header, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    again = {
        (part, int(dimension))
        for of_dimensions in header["compiled_again"]["parts"].values()
        for dimension, parts in of_dimensions.items()
        for part in parts
    }
    found = [row for row in rows if (part_of(row), row["head_dimension"]) in again]
    assert {row["head_dimension"] for row in found} >= {64, 128}
    assert {(part_of(row), row["head_dimension"]) for row in found} == again
    for row in found:
        check([row], allowed_spills=single_spills(row) if row["dtype"] == "float32" else 0)


def part_of(row: dict) -> str:
    masks = [mask for mask in ("groups", "first_visible", "sharing") if row[mask]]
    return f"{row['architecture']} {row['dtype']} {'+'.join(masks) or 'plain'}"


def single_spills(row: dict) -> int:
    """What a float32 program may spill at its limit of registers, in bytes."""
    place = (row["kernel"], row["head_dimension"])
    return SINGLE_SPILLS_MORE.get(place, SINGLE_SPILLS[row["head_dimension"]])


@pytest.mark.soak
@pytest.mark.parametrize("masks", [PLAIN, ALL_MASKS], ids=name_of)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_float32_program_fits_its_gpu_and_spills_few_registers_if_any(architecture, masks):
    rows = compiled(
        *("--architecture", architecture, "--dtype", "float32", *masks),
        *("--head-dimension", "16", "32", "64", "96", "128"),
    )
    for row in rows:
        check([row], allowed_spills=single_spills(row))
        if masks == PLAIN and architecture in PLAIN_ARCHITECTURES:
            assert row["spilled_bytes"] <= plain_spills(row), row


@pytest.mark.soak
def test_head_dimensions_that_are_padded_and_attention_without_a_mask_compile():
    rows = compiled("--architecture", "sm_90", "--head-dimension", "80", "--not-causal")
    assert len(rows) == num_programs(("80",), PLAIN)
    assert all(row["fits"] and not row["causal"] for row in rows)
