"""Runs of train.py, and of other scripts and modules, whose libraries are imported already: more
than half of what a tiny run costs.

One process per test session imports torch, DeepSpeed and matplotlib, nothing of ebwm_scale, and
forks for each run. The run is a process like any other: its own session, folder, environment and
output, signals and an exit code; the script runs in it from its first line. What a fork shares with
its siblings is Python's hash seed; so what runs are compared with is started afresh.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

LIBRARIES = (
    "deepspeed",
    "jinja2",
    "matplotlib.pyplot",
    "pydantic",
    "sentencepiece",
    "torch._dynamo",
    "torch.distributed",
)


class PreloadedRun:
    """What the tests use of subprocess.Popen, for a process that another one has forked."""

    def __init__(self, command: list[str], folder: Path, variables: dict[str, str]):
        reading, writing = os.pipe()
        self._answers, answering = os.pipe()
        request = {"command": command, "folder": str(folder), "variables": variables}
        _the_parent().send(request, [writing, answering])
        os.close(writing)
        os.close(answering)
        self.stdout = os.fdopen(reading, encoding="utf-8")
        self.returncode: int | None = None
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All of the output that has not been read, and None in place of another stream."""
        start, output = time.monotonic(), []
        reader = threading.Thread(target=lambda: output.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        left = None if timeout is None else max(0.0, start + timeout - time.monotonic())
        self.wait(left)
        return output[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _end(self) -> None:
        self.returncode = int(self._answer())
        os.close(self._answers)

    def _answer(self) -> bytes:
        """One line of the process that waits for the run."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._answers, 1)
            assert byte, "the process that waits for the run is gone"
            line += byte
        return line


class _Parent:
    """The process that has imported the libraries; it ends with the one that started it."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "DS_ACCELERATOR": "cpu",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        environment.pop("TRITON_INTERPRET", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.process.wait()

    def send(self, request: dict, descriptors: list[int]) -> None:
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)


@functools.cache
def _the_parent() -> _Parent:
    return _Parent()


def serve(descriptor: int) -> list[str]:
    """Fork for every request. Returns in the children, with the command that each is to run."""
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a process with threads cannot be forked"
    requests = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            _reap()
            os._exit(0)
        _reap()
        if os.fork() == 0:
            requests.close()
            return _fork_and_wait(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _reap() -> None:
    """No process that has waited for its run stays behind."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _fork_and_wait(request: dict, output: int, answers: int) -> list[str]:
    """The run's process returns the command; this one tells its id and its exit code, and ends."""
    run = os.fork()
    if run == 0:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.close(answers)
        os.chdir(request["folder"])
        os.environ.update(request["variables"])
        return request["command"]
    os.close(output)
    os.write(answers, b"%d\n" % run)
    _, status = os.waitpid(run, 0)
    os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


if __name__ == "__main__":
    import runpy

    command = serve(int(sys.argv[1]))
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
