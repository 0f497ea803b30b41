"""The model reproduces the released code's numbers; a file that is no golden case is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebwm_scale.core.errors import DataError
from ebwm_scale.evaluation.parity import check_case

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_every_golden_case_agrees_to_1e_10(case):
    errors = check_case(case)
    assert {"loss", "predictions", "gradients"} <= set(errors)
    assert max(errors.values()) <= 1e-10, errors


def test_all_kinds_of_cases_are_there():
    assert (
        len(CASES) == 9
        and sum(
            "train_weights" in check_case(c)
            for c in CASES
            if "base" in c.stem or "default_a5" in c.stem
        )
        == 2
    )


@pytest.mark.parametrize(
    "part", ["state_dict/vocab_to_embed.weight", "grads/alpha", "predictions/1", "noise"]
)
def test_a_change_of_one_part_in_a_million_is_seen(part, tmp_path):
    from safetensors import safe_open

    source = ROOT / "tests" / "golden" / "nlp_default_a5.safetensors"
    tensors = load_file(source)
    tensors[part] = tensors[part] * (1 + 1e-6)
    with safe_open(str(source), "pt") as file:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            tmp_path / "changed.safetensors",
            metadata=file.metadata(),
        )
    assert max(check_case(tmp_path / "changed.safetensors").values()) > 1e-10


@pytest.mark.soak
def test_the_tool_prints_a_line_per_case_and_says_no(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "check_parity.py")]
    result = subprocess.run(
        [*tool, str(CASES[0]), str(CASES[1])], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and [
        json.loads(line)["passed"] for line in result.stdout.splitlines()
    ] == [True, True]
    assert (
        subprocess.run(
            [*tool, str(CASES[0]), "--tolerance", "0"], capture_output=True, timeout=120
        ).returncode
        == 1
    )
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    result = subprocess.run([*tool, str(foreign)], capture_output=True, text=True, timeout=120)
    assert (
        result.returncode == 2
        and "not a golden case" in result.stderr
        and "Traceback" not in result.stderr
    )
    with pytest.raises(DataError):
        check_case(tmp_path / "missing.safetensors")
