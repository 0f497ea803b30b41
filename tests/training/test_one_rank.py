"""Whatever one process of several finds before training ends all of them, soon and with one line:
nobody waits for one that has left.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
from gates import Gate
from training_runs import end


def start_ranks(runs, name, options_of_rank, *, variables=None):
    """Two processes as two machines would start them: each with its own options."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = runs.command(name)
    processes = []
    for rank, changes in enumerate(options_of_rank):
        words = list(command)
        for option, value in changes.items():
            words[words.index(option) + 1] = str(value)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            **{key: str(value) for key, value in place.items()},
            **(variables or {}),
        }
        environment.pop("TRITON_INTERPRET", None)
        processes.append(
            subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
                cwd=runs.folder,
            )
        )
    return processes


def ended(processes, timeout=150):
    """(exit code, lines of both)."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
    finally:
        for process in processes:
            end(process)
    return [process.returncode for process in processes], [text.splitlines() for text in outputs]


@pytest.mark.parametrize("kind", ["no file", "unwritable", "another configuration"])
def test_what_one_rank_is_refused_for_refuses_all(runs, tmp_path, kind):
    """A file the second machine lacks, a disk it cannot write to, an older copy of the file."""
    runs.command("single")
    mine = {"--config": runs.folder / "single.yaml", "--run-dir": tmp_path / "run"}
    (tmp_path / "file").write_text("")
    older = tmp_path / "older.yaml"
    shutil.copyfile(mine["--config"], older)
    older.write_text(older.read_text().replace("max_steps: 8", "max_steps: 9"))
    its, expected = {
        "no file": ({"--config": tmp_path / "absent.yaml"}, "rank 1: .*absent.yaml"),
        "unwritable": ({"--run-dir": tmp_path / "file" / "run"}, "rank 1: .*is a file"),
        "another configuration": ({"--config": older}, "rank 1 has read another configuration"),
    }[kind]
    codes, lines = ended(start_ranks(runs, "single", [mine, {**mine, **its}]))
    assert codes == [2, 2], lines
    said = [line for of_rank in lines for line in of_rank]
    assert len(said) == 1 and re.search(expected, said[0]), lines
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_rank_before_training_stops_all(runs, tmp_path):
    mine = {"--run-dir": tmp_path / "run"}
    gate = Gate(runs.folder / "early.gate", "start=1,rank=1")
    processes = start_ranks(runs, "early", [mine, mine], variables={"EBWM_FAULTS": gate.fault})
    gate.wait_until_reached(processes[1])
    processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.5)  # to be heard
    gate.open()
    codes, lines = ended(processes)
    assert codes == [75, 75], lines
    assert "stopped before the model was built" in "\n".join(lines[0])
    assert not (tmp_path / "run").exists()
