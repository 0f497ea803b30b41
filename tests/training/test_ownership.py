"""One process writes to a run folder: a newcomer is refused while the owner lives, and goes on by
itself once it does not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from gates import Gate
from training_runs import end, same

from ebwm_scale.checkpoint import load as loading
from ebwm_scale.checkpoint import reader as checkpoint
from ebwm_scale.checkpoint.reader import find_latest
from ebwm_scale.core import ownership
from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.ownership import Ownership, machine, started
from ebwm_scale.training.resuming import load_newest


@pytest.fixture(scope="module")
def whole(runs):
    runs.run("whole", afresh=True)


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("HEARTBEAT_S", 0.1), ("LEASE_S", 1.0), ("SETTLE_S", 0.2)):
        monkeypatch.setattr(ownership, name, value)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def owned_by(folder, **changes):
    """An owner file of a process that is this one in everything but the changes."""
    record = {
        "host": "node7",
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "machine": machine(),
        "job": "",
        "restart": 0,
        "since": "2026-01-31T12:00:00+00:00",
        "token": "another",
    }
    # Whole or not at all, as an owner writes it: a heartbeat may read in between.
    replace_text(folder / "owner", json.dumps({**record, **changes}))


def newcomer(folder):
    return Ownership(folder, Faults(None, 0))


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_an_owner_that_lives_is_named_and_keeps_the_folder(tmp_path, quick, other_process):
    pid = other_process.pid
    owned_by(tmp_path, pid=pid, started=started(pid))
    for number in (signal.SIGCONT, signal.SIGSTOP):  # also one that is suspended
        other_process.send_signal(number)
        before = (tmp_path / "owner").read_text()
        for attempt in (newcomer(tmp_path).refuse_if_in_use, newcomer(tmp_path).take):
            with pytest.raises(
                CheckpointError, match=f"is in use by node7 {pid}, since 2026-01-31"
            ):
                attempt()
        assert (tmp_path / "owner").read_text() == before


@pytest.mark.parametrize("how", ["dead", "not waited for", "another with its number", "never"])
def test_an_owner_that_is_over_is_followed_at_once(
    tmp_path, quick, monkeypatch, other_process, how
):
    pid, since = other_process.pid, started(other_process.pid)
    if how in ("dead", "not waited for"):
        other_process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its exit code stays to be fetched
    if how == "dead":
        other_process.wait()
    if how == "another with its number":
        since = "12"
    owned_by(tmp_path, pid=None if how == "never" else pid, started=since)
    monkeypatch.setattr(ownership, "LEASE_S", 60.0)  # for so long one that may live is watched
    begin = time.monotonic()
    mine = newcomer(tmp_path)
    mine.take()
    assert time.monotonic() - begin < 30
    assert json.loads((tmp_path / "owner").read_text())["token"] == mine.token
    mine.release(unsaved=False)
    assert not (tmp_path / "owner").exists()


def test_an_owner_elsewhere_is_followed_only_after_it_was_seen_to_be_silent(
    tmp_path, quick, capsys
):
    owned_by(tmp_path, machine="elsewhere")
    os.utime(tmp_path / "owner", (0, 0))  # the age of its last sign says nothing: clocks differ
    stop = threading.Event()

    def heartbeat():
        while not stop.wait(0.05):
            os.utime(tmp_path / "owner")

    thread = threading.Thread(target=heartbeat)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="is in use by node7"):
            newcomer(tmp_path).take()
    finally:
        stop.set()
        thread.join()
    capsys.readouterr()
    begin = time.monotonic()
    mine = newcomer(tmp_path)
    mine.refuse_if_in_use()
    assert time.monotonic() - begin > 0.9
    mine.take()
    # what was watched is not watched again
    assert capsys.readouterr().out.count("for a sign of life") == 1
    mine.release(unsaved=False)


def test_an_owner_of_another_release_is_watched_too(tmp_path, quick):
    (tmp_path / "owner").write_text("node7 4242 0123456789abcdef")
    mine = newcomer(tmp_path)
    mine.take()
    mine.release(unsaved=False)


@pytest.mark.parametrize("restart, refused", [(0, True), (1, False)])
def test_a_requeued_job_follows_its_own_earlier_start_at_once(
    tmp_path, quick, monkeypatch, other_process, restart, refused
):
    """Slurm has ended it, or has given up its node: it may still seem to live."""
    pid = other_process.pid
    owned_by(tmp_path, pid=pid, started=started(pid), job="1234")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    mine = newcomer(tmp_path)
    if refused:
        with pytest.raises(CheckpointError, match=rf"in use by node7 {pid} \(job 1234\)"):
            mine.take()
    else:
        mine.take()
        mine.release(unsaved=False)


def test_of_newcomers_that_come_together_one_gets_the_folder(tmp_path, quick):
    code = (
        "import sys, pathlib\n"
        "from ebwm_scale.core.errors import UserError\n"
        "from ebwm_scale.core.faults import Faults\n"
        "from ebwm_scale.core.ownership import Ownership\n"
        "mine = Ownership(pathlib.Path(sys.argv[1]), Faults(None, 0))\n"
        "input()\n"
        "try:\n    mine.take()\n"
        "except UserError as error:\n    sys.exit(str(error))\n"
        "print('mine', flush=True)\ninput()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    time.sleep(2)
    try:
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        time.sleep(2)
        codes = [process.poll() for process in processes]
        assert sorted(map(str, codes)) == ["1", "1", "None"]
        owner = json.loads((tmp_path / "owner").read_text())["pid"]
        assert owner == processes[codes.index(None)].pid
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_beat_is_seen_and_a_process_that_lost_the_folder_leaves_with_77(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from ebwm_scale.core import ownership\n"
        "from ebwm_scale.core.faults import Faults\n"
        "ownership.HEARTBEAT_S = 0.1\n"
        "mine = ownership.Ownership(pathlib.Path(sys.argv[1]), Faults(None, 0))\n"
        "mine.take()\nprint('mine', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "mine\n"
        times = set()
        for _ in range(10):
            times.add((tmp_path / "owner").stat().st_mtime_ns)
            time.sleep(0.1)
        assert len(times) > 2
        owned_by(tmp_path)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 77 and f"taken over by the process node7 {os.getpid()}" in errors


def test_a_second_start_is_refused_and_the_first_goes_on(runs, whole):
    gate = Gate(runs.folder / "busy.gate", "step=4")
    first = runs.start("busy", variables={"EBWM_FAULTS": gate.fault})
    try:
        gate.wait_until_reached(first)
        for flags in (("--resume",), ()):
            output = runs.run("busy", flags=flags, expect=2)
            assert f"is in use by {socket.gethostname()} {first.pid}" in output
            assert len(output.strip().splitlines()) == 1, output
        assert first.poll() is None
        gate.open()
        output, _ = first.communicate(timeout=120)
    finally:
        end(first)
    assert first.returncode == 0 and "taken over" not in output
    assert runs.rows("busy") == runs.rows("whole")
    assert same(runs.state("busy"), runs.state("whole")) == []


def test_a_checkpoint_rotated_away_while_it_is_loaded_is_followed_by_the_newer_one(runs):
    """Between reading and loading it, another one takes its place.

    Nobody owns the folder so far.
    """
    runs.run("rotated", overrides={"evaluation.every_steps": 0})
    checkpoints = runs.folder / "rotated" / "checkpoints"
    newer = checkpoints.parent / "newer"
    (checkpoints / "step_000008").rename(newer)
    gate = Gate(runs.folder / "rotated.gate", "start=1")
    process = runs.start(
        "rotated",
        flags=("--resume", "--accept-new-rate"),
        overrides={"evaluation.every_steps": 0, "train.max_steps": 10},
        variables={"EBWM_FAULTS": gate.fault},
    )
    try:
        gate.wait_until_reached(process)
        assert not (checkpoints.parent / "owner").exists()
        newer.rename(checkpoints / "step_000008")
        shutil.rmtree(checkpoints / "step_000006")
        gate.open()
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, output[-3000:]
    assert "step_000006 was removed while it was read" in output
    assert "resumed at step 8 of 10" in output


class FakeWorld:
    is_main = True
    broadcast_object = staticmethod(lambda value: value)
    all_gather_object = staticmethod(lambda value: [value])
    any = staticmethod(bool)


class FakeTrainer:
    """Loading fails as it does where a checkpoint is removed, or damaged, meanwhile."""

    def __init__(self, folder, removed):
        self.run_folder = type("Run", (), {"path": folder, "checkpoints": folder})
        self.removed, self.loaded = removed, None

    def load(self, saved):
        if saved.folder.name in self.removed:
            shutil.rmtree(saved.folder)
            raise FileNotFoundError(saved.folder / "state-00000-of-00001.safetensors")
        if not saved.folder.exists():
            raise AssertionError("looked for without being there")
        self.loaded = saved


class FakeSaved:
    def __init__(self, folder):
        self.folder = folder


def newest_in(folder):
    names = sorted(path.name for path in folder.glob("step_*"))
    return FakeSaved(folder / names[-1]) if names else None


@pytest.mark.parametrize(
    "removed, loaded",
    [([], "step_000003"), ([3], "step_000002"), ([3, 2], "step_000001"), ([3, 2, 1], None)],
)
def test_what_is_removed_while_it_is_loaded_is_looked_for_again(tmp_path, removed, loaded):
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:06d}").mkdir()
    trainer = FakeTrainer(tmp_path, {f"step_{step:06d}" for step in removed})
    said = []
    newest = lambda: newest_in(tmp_path)
    result = load_newest(trainer, newest(), newest, FakeWorld(), said.append)
    assert (None if result is None else result.folder.name) == loaded
    assert len(said) == len(removed)


def test_what_cannot_be_loaded_although_it_is_there_is_said_and_not_tried_again(tmp_path):
    (tmp_path / "step_000003").mkdir()
    trainer = FakeTrainer(tmp_path, set())
    trainer.load = lambda saved: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    with pytest.raises(
        CheckpointError, match="step_000003 could not be loaded.*Input/output error"
    ):
        load_newest(trainer, newest_in(tmp_path), lambda: None, FakeWorld(), print)


def test_a_reader_of_a_run_that_goes_on_takes_the_checkpoint_that_is_newer_by_then(
    runs, whole, tmp_path, monkeypatch
):
    """find_latest, as think and evaluate use it, while step 6 is rotated away under its hands."""
    root = tmp_path / "checkpoints"
    shutil.copytree(runs.folder / "whole" / "checkpoints", root)
    later = tmp_path / "step_000008"
    (root / "step_000008").rename(later)
    verify = checkpoint.verify

    def verify_late(folder):
        if later.exists():
            later.rename(root / "step_000008")
            shutil.rmtree(root / "step_000006")
        return verify(folder)

    monkeypatch.setattr(checkpoint, "verify", verify_late)
    warnings = []
    assert find_latest(root, warnings.append).step == 8 and warnings == []


def test_a_model_is_read_from_the_newer_checkpoint_where_its_own_is_rotated_away(
    runs, whole, tmp_path, monkeypatch
):
    """The same after its hashes were compared, before its tensors are read."""
    root = tmp_path / "checkpoints"
    shutil.copytree(runs.folder / "whole" / "checkpoints", root)
    later = tmp_path / "later"
    (root / "step_000008").rename(later)
    saved_config = loading.saved_config

    def saved_config_late(folder):
        if later.exists():
            later.rename(root / "step_000008")
            shutil.rmtree(root / "step_000006")
        return saved_config(folder)

    expected, _ = loading.load_checkpoint(runs.folder / "whole")
    monkeypatch.setattr(loading, "saved_config", saved_config_late)
    model, _ = loading.load_checkpoint(tmp_path)
    assert same(dict(model.state_dict()), dict(expected.state_dict())) == []
