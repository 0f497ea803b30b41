"""OpenMP's threads sleep while they wait: the variable is set before torch is loaded, and what the
user has set is kept.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "OMP_WAIT_POLICY"
# Other commands are modules of ebwm_scale, which is imported before them.
SCRIPTS = sorted([*(ROOT / "tools").rglob("*.py"), ROOT / "ebwm_scale" / "train.py"])


@pytest.mark.parametrize("user, policy", [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_what_openmp_reads_is_passive_where_the_user_has_set_nothing(user, policy):
    """OpenMP says itself what it has read."""
    environment = {key: value for key, value in os.environ.items() if key != NAME}
    environment |= {"OMP_DISPLAY_ENV": "true", "PYTHONPATH": str(ROOT)}
    if user is not None:
        environment[NAME] = user
    done = subprocess.run(
        [sys.executable, "-c", "import ebwm_scale, torch"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"{NAME} = '{policy}'" in done.stderr, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_command_and_no_tool_loads_torch_before_it_is_set(script):
    for statement in ast.parse(script.read_text(encoding="utf-8")).body:
        text = ast.unparse(statement)
        if text.startswith(("import ebwm_scale", "from ebwm_scale")) or NAME in text:
            return
        assert not text.startswith(("import torch", "from torch", "from ebwm_kernels")), text
