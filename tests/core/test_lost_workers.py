"""A worker that dies takes one test along, and nothing waits for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")
TESTS = Path(__file__).resolve().parents[1]

CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from lost_workers import Scheduling

def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)
"""
PASSES = "import time\n\ndef test_passes():\n    time.sleep(0.05)\n"
DIES = "import os, time\n\ndef test_dies():\n    time.sleep(0.3)\n    os._exit(3)\n"


@pytest.mark.parametrize("behind", [0, 1, 5], ids="{} modules of one test come behind".format)
def test_a_worker_that_dies_takes_one_test_along(tmp_path, behind):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_a.py").write_text(
        "".join(PASSES.replace("es()", f"es_{i}()") for i in "abcdefgh")
    )
    (tmp_path / "test_b.py").write_text(PASSES + DIES)
    for i in range(behind):
        (tmp_path / f"test_c{i}.py").write_text(PASSES)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    words = [
        "-n",
        "2",
        "--dist",
        "loadscope",
        "--no-loadscope-reorder",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert f"1 failed, {9 + behind} passed" in process.stdout
    assert "crashed while running 'test_b.py::test_dies'" in process.stdout
