"""OpenMP's threads spin for a moment and then sleep: the variables are set before torch is loaded,
and what the user has set is kept.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ebwm_scale

ROOT = Path(__file__).resolve().parents[2]
NAME, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# Other commands are modules of ebwm_scale, which is imported before them.
SCRIPTS = sorted([*(ROOT / "tools").rglob("*.py"), ROOT / "ebwm_scale" / "train.py"])


@pytest.mark.parametrize(
    "user, policy, spins",
    [
        ({}, "PASSIVE", ebwm_scale.SPINS),
        ({NAME: "active"}, "ACTIVE", "30000000000"),
        ({SPINS: "0"}, "PASSIVE", "0"),
    ],
)
def test_what_openmp_reads_is_ours_where_the_user_has_set_nothing(user, policy, spins):
    """OpenMP says itself what it has read."""
    environment = {key: value for key, value in os.environ.items() if key not in (NAME, SPINS)}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)} | user
    done = subprocess.run(
        [sys.executable, "-c", "import ebwm_scale, torch"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"{NAME} = '{policy}'" in done.stderr, done.stderr
    if SPINS in done.stderr:  # GNU's OpenMP, which PyTorch's wheels for Linux bring
        assert f"{SPINS} = '{spins}'" in done.stderr, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_command_and_no_tool_loads_torch_before_it_is_set(script):
    for statement in ast.parse(script.read_text(encoding="utf-8")).body:
        text = ast.unparse(statement)
        # on its own it would shorten the spinning that a user asked for
        assert f"setdefault('{SPINS}'" not in text, text
        if text.startswith(("import ebwm_scale", "from ebwm_scale")) or NAME in text:
            return
        assert not text.startswith(("import torch", "from torch", "from ebwm_kernels")), text
