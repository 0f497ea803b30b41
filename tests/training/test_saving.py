"""A checkpoint that is published stays so, whatever fails after its rename; what cannot be removed
is in no later save's way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from gates import Gate
from training_runs import end

from ebwm_scale.checkpoint.parameter_shard import ParameterShard
from ebwm_scale.checkpoint.reader import find_latest, published
from ebwm_scale.checkpoint.writer import CheckpointWriter, put_back_replaced
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.world import World


class State:
    """What CheckpointWriter.save asks of an engine's state."""

    def __init__(self):
        self.module = torch.nn.Linear(3, 2)

    def shards(self):
        for name, p in self.module.named_parameters():
            yield ParameterShard(name, 0, {"weight": p.detach().view(-1)})

    def step_count(self):
        return 1.0


class Saves:
    def __init__(self, root, *, faults=None, **rules):
        config = config_from_dict({"data": {"manifest": "none"}, "checkpoint": rules})
        world = World(0, 1, 0, torch.device("cpu"))
        self.root, self.checks = root, 0
        self.writer = CheckpointWriter(root, world, config, Faults(faults, 0), self.check)
        self.notes: list[str] = []

    def check(self):
        self.checks += 1

    def save(self, step, loss=None):
        """The problem of a save that was waited for."""
        self.writer.save(State(), {"step": step, "validation_loss": loss}, None)
        outcome = self.writer.wait()
        self.notes += outcome.notes
        assert outcome.problem is not None or find_latest(self.root, print).step == step
        return outcome.problem

    @property
    def steps(self):
        return sorted(int(path.name.removeprefix("step_")) for path in published(self.root))


def refuse(monkeypatch, name, is_meant, number=1):
    """os.<name> fails for paths of which is_meant says so, wherever it is called from."""
    allowed = getattr(os, name)

    def refused(path, *arguments, **options):
        described = str(path)
        if options.get("dir_fd") is not None:
            described = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
        if is_meant(described):
            raise OSError(number, os.strerror(number), described)
        return allowed(path, *arguments, **options)

    monkeypatch.setattr(os, name, refused)


@pytest.mark.parametrize(
    "call, is_meant",
    [
        ("unlink", lambda path: path.endswith("trainer.json")),
        ("unlink", lambda path: True),
        ("rmdir", lambda path: True),
        ("replace", lambda path: path.endswith(("step_000001", "step_000002"))),
    ],
    ids=["one file", "every file", "folders", "renaming a folder"],
)
@pytest.mark.parametrize("number", [1, 13, 16, 39, 116], ids=lambda n: os.strerror(n)[:20])
def test_what_cannot_be_removed_stops_no_save_and_is_said_once(
    tmp_path, monkeypatch, call, is_meant, number
):
    saves = Saves(tmp_path / "checkpoints", keep_last=1)
    assert saves.save(1) is None
    refuse(monkeypatch, call, is_meant, number)
    for step in (2, 3, 4, 5):
        assert saves.save(step) is None and 5 not in saves.steps[:-1]
        assert (saves.root / "latest").read_text() == f"step_{step:06d}\n"
    (note,) = [note for note in saves.notes if "could not be removed" in note]
    assert os.strerror(number) in note and len(saves.notes) == 1
    monkeypatch.undo()
    assert saves.save(6) is None and saves.steps == [6]
    assert sorted(path.name for path in saves.root.iterdir()) == ["latest", "step_000006"]


@pytest.mark.parametrize("name", ["latest", "best"])
def test_names_that_cannot_be_written_hide_no_checkpoint(tmp_path, name):
    saves = Saves(tmp_path, keep_last=2, keep_best=True)
    (tmp_path / name).mkdir()
    (tmp_path / name / "something").touch()
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        assert saves.save(step, loss) is None
    assert [f"{tmp_path / name} could not be written" in note for note in saves.notes] == [True]


@pytest.mark.parametrize("times", [1, 1000])
def test_whichever_write_fails_a_checkpoint_is_there_or_a_problem_is_said(tmp_path, times):
    """Every write, sync, rename and removal of the third save, one after the other."""
    outcomes = set()
    for number in range(1, 25):
        saves = Saves(tmp_path / f"{number}", keep_last=1, keep_best=False)
        assert saves.save(1) is None and saves.save(2) is None
        saves.writer.faults = Faults(f"enospc@io={number},times={times}", 0)
        problem = saves.save(3)
        outcomes.add(problem is None)
        newest = 3 if problem is None else 2
        assert find_latest(saves.root, print).step == newest
        assert saves.writer.newest_on_disk() == f"newest checkpoint is step {newest}"
        saves.writer.faults = Faults(None, 0)
        assert saves.save(4) is None and saves.steps == [4]
        assert not list(saves.root.glob(".*"))
    assert outcomes == {True, False}


def test_the_one_just_published_is_kept_beside_newer_ones_that_are_damaged(tmp_path):
    """After a fall-back: steps 6 and 9 are damaged, the run went on from 3."""
    saves = Saves(tmp_path, keep_last=1)
    for step in (6, 9):
        assert saves.save(step) is None
        shutil.copytree(tmp_path / f"step_{step:06d}", tmp_path / f".kept_{step}")
    for step in (6, 9):
        shutil.rmtree(tmp_path / f"step_{step:06d}", ignore_errors=True)
        (tmp_path / f".kept_{step}").rename(tmp_path / f"step_{step:06d}")
        (tmp_path / f"step_{step:06d}" / "trainer.json").write_text("{")
    saves.writer.save(State(), {"step": 4}, None)
    assert saves.writer.wait().problem is None
    assert find_latest(tmp_path, print).step == 4
    assert saves.writer.newest_on_disk() == "newest checkpoint is step 4"


def test_a_left_over_staging_folder_that_cannot_be_removed_is_in_nobodys_way(tmp_path, monkeypatch):
    for name in (".staging-step_000001", ".staging-pruned-step_000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state-00000-of-00001.safetensors").touch()
    refuse(monkeypatch, "unlink", lambda path: "/.staging-step_000001/" in path)
    saves = Saves(tmp_path)
    assert saves.save(1) is None and saves.save(2) is None
    assert len(saves.notes) == 1 and not (tmp_path / ".staging-pruned-step_000001").exists()


def test_a_step_saved_again_is_never_gone_whatever_rename_fails(tmp_path, monkeypatch):
    saves = Saves(tmp_path, keep_last=1)
    assert saves.save(1) is None
    allowed, calls = os.replace, []

    def refused(source, target):
        calls.append(str(target))
        if ".staging-step" in str(source) or ".staging-replaced" in str(source):
            raise OSError(5, "Input/output error")
        allowed(source, target)

    monkeypatch.setattr(os, "replace", refused)
    saves.writer.save(State(), {"step": 1}, None)
    assert "Input/output error" in saves.writer.wait().problem
    assert published(tmp_path) == []  # moved aside, and not put back either
    monkeypatch.undo()
    put_back_replaced(tmp_path)
    assert find_latest(tmp_path, print).step == 1
    assert saves.save(1, 2.0) is None and not list(tmp_path.glob(".staging*"))


def test_a_process_that_was_replaced_is_asked_before_each_publication(tmp_path):
    saves = Saves(tmp_path)
    saves.save(1)
    saves.save(2)
    assert saves.checks == 2


def test_an_immutable_file_of_an_old_checkpoint_costs_a_warning_and_nothing_else(runs):
    """The case itself, where files can be made immutable: every later checkpoint is there."""
    gate = Gate(runs.folder / "protected.gate", "step=3")
    process = runs.start(
        "protected",
        overrides={"checkpoint.every_steps": 1, "checkpoint.keep_last": 1},
        variables={"EBWM_FAULTS": gate.fault},
    )
    checkpoints = runs.folder / "protected" / "checkpoints"
    protected, deadline = checkpoints / "step_000003", time.monotonic() + 120
    try:
        while not protected.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        made = subprocess.run(
            ["chattr", "+i", str(protected / "trainer.json")], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no file can be made immutable here: {made.stderr.strip()}")
        gate.open()
        output, _ = process.communicate(timeout=120)
    finally:
        subprocess.run(["chattr", "-R", "-i", str(checkpoints)], capture_output=True)
        end(process)
    assert process.returncode == 0, output[-3000:]
    assert output.count("could not be removed") == 1
    assert (checkpoints / "latest").read_text().strip() == "step_000008"
    lines = (runs.folder / "protected" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["step"] for e in events if e["event"] == "save"] == list(range(1, 9))
    assert "resumed at step 8" in runs.run(
        "protected", flags=("--resume",), overrides={"checkpoint.every_steps": 1}
    )
