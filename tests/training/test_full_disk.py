"""A disk that is full, or takes no files any more: what is lost is said, nothing else is lost, and
no success is reported that is none."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gates import Gate
from training_runs import end, same

from ebwm_scale.config.schema import Config
from ebwm_scale.core.disk import RowLog, replace_text
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.ownership import Ownership
from ebwm_scale.core.world import World
from ebwm_scale.training.run_folder import RunFolder

NEVER = "times=1000"


@pytest.fixture(scope="module")
def reference(runs):
    return runs.run("whole", afresh=True)


def events(runs, name):
    path = runs.folder / name / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_steps(runs, name):
    return [event["step"] for event in events(runs, name) if event["event"] == "save"]


def on_disk(runs, name):
    return sorted(p.name for p in (runs.folder / name / "checkpoints").glob("*step_*"))


@pytest.mark.parametrize(
    "name, fault, overrides, processes, newest",
    [
        ("the_only", f"enospc@save=1,{NEVER}", {"checkpoint.every_steps": 0}, 1, None),
        ("after_two", f"enospc@save=3,{NEVER}", {}, 1, 6),
        ("of_the_other_rank", f"enospc@save=3,rank=1,{NEVER}", {}, 2, 6),
        ("limited", f"enospc@save=1,{NEVER}", {"train.max_minutes": 1e-6}, 1, None),
    ],
)
def test_a_last_save_that_fails_is_no_success(runs, name, fault, overrides, processes, newest):
    """Also where the run would have ended with 75 (`limited`)."""
    output = runs.run(
        name,
        variables={"EBWM_FAULTS": fault},
        overrides=overrides,
        processes=processes,
        expect=1,
    )
    step = 1 if name == "limited" else 8
    known = (
        "there is no checkpoint yet" if newest is None else f"newest checkpoint is step {newest}"
    )
    assert output.count(f"step {step} is NOT saved, {known}") == 1, output[-3000:]
    assert "No space left on device" in output and "trying once more" in output
    assert "training goes on" not in output and "finished; report" not in output
    assert "run the same command with --resume to go on" not in output
    if processes == 2:
        assert "rank 1: [Errno 28]" in output
    assert saved_steps(runs, name) == ([] if newest is None else [3, 6])
    # step 3 made room for the second try
    assert on_disk(runs, name) == ([] if newest is None else ["step_000006"])
    assert (runs.folder / name / "unsaved").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_last_save_that_fails_once_is_tried_again_and_then_it_is_one(runs, reference, processes):
    name = f"again_{processes}"
    output = runs.run(name, variables={"EBWM_FAULTS": "enospc@save=3"}, processes=processes)
    assert "trying once more to save step 8" in output and "finished; report" in output
    assert "NOT saved" not in output
    assert saved_steps(runs, name) == [3, 6, 8] and on_disk(runs, name)[-1] == "step_000008"
    if processes == 1:
        assert same(runs.state(name), runs.state("whole")) == []
    assert not (runs.folder / name / "unsaved").exists()
    assert not (runs.folder / name / "owner").exists()


def test_a_save_on_the_way_that_fails_is_a_warning_that_names_what_is_there(runs, reference):
    output = runs.run("on_the_way", variables={"EBWM_FAULTS": "enospc@save=2"})
    (line,) = [line for line in output.splitlines() if "could not be written" in line]
    assert line.startswith("warning: step 6: the checkpoint could not be written ([Errno 28]")
    assert line.endswith("training goes on, newest checkpoint is step 3; free some space")
    assert saved_steps(runs, "on_the_way") == [3, 8]


@pytest.mark.parametrize(
    "first, times", [(4, 3), pytest.param(6, 1, marks=pytest.mark.soak), (9, 4)]
)
def test_rows_that_cannot_be_written_come_later_and_there_is_one_warning(
    runs, reference, first, times
):
    name = f"rows_{first}"
    output = runs.run(name, variables={"EBWM_FAULTS": f"enospc@write={first},times={times}"})
    assert output.count("rows are kept") == 1
    assert runs.rows(name) == runs.rows("whole")
    kinds = [event["event"] for event in events(runs, name)]
    assert [kind for kind in kinds if kind != "warning"] == [
        "start",
        "save",
        "save",
        "save",
        "finish",
    ]


def test_rows_that_can_never_be_written_are_said_and_no_success(runs):
    output = runs.run("no_rows", variables={"EBWM_FAULTS": f"enospc@write=5,{NEVER}"}, expect=1)
    assert (
        output.count("rows are kept") == 1 and "rows of" in output and "are NOT written" in output
    )
    assert on_disk(runs, "no_rows")[-1] == "step_000008"


def test_a_run_folder_that_cannot_be_written_is_one_line_and_nothing_is_started(runs):
    output = runs.run("unwritable", variables={"EBWM_FAULTS": "enospc@write=1"}, expect=2)
    assert "unwritable cannot be written (No space left on device" in output
    assert "Traceback" not in output
    assert not (runs.folder / "unwritable").exists()


def test_a_row_is_written_whole_or_not_at_all_and_never_behind_a_torn_one(tmp_path):
    log = RowLog(tmp_path / "rows.jsonl", Faults("enospc@write=2,times=2", 0))
    log.add({"n": 1})
    assert log.flush() is None
    log.add({"n": 2})
    assert log.flush().errno == 28
    log.add({"n": 3})
    assert log.flush().errno == 28 and len(log.waiting) == 2
    log.add({"n": 4})
    assert log.flush() is None and not log.waiting
    assert [json.loads(line)["n"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]
    with log.path.open("a") as file:
        file.write('{"n": 5, "to')
    log.add({"n": 6})
    assert log.flush() is None
    assert log.path.read_text().splitlines()[-2:] == ['{"n": 5, "to', '{"n": 6}']


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    replace_text(tmp_path / "file", "first")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError):
            replace_text(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "lines, step, kept, validated, writes",
    [
        ([1, 2, 3], 3, [1, 2, 3], None, 0),
        ([1, 2, "v2", 3, "v3"], 2, [1, 2, "v2"], 2, 1),
        # an unreadable line is said: one more write, the event
        ([1, 2, "torn"], 2, [1, 2], None, 2),
        ([1, "torn", 2, 3], 2, [1, 2], None, 2),
        ([1, 2], 0, [], None, 1),
    ],
)
def test_rows_beyond_a_resumed_step_are_cut_off_in_place(
    tmp_path, lines, step, kept, validated, writes
):
    """Cutting a file is possible on a disk without a free byte; only torn lines in between are not
    at its end."""

    def text(line):
        if line == "torn":
            return '{"step": 2, "lo\n'
        if isinstance(line, str):
            return json.dumps({"step": int(line[1:]), "split": "validation"}) + "\n"
        return json.dumps({"step": line}) + "\n"

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(text, lines)))
    same_file = path.stat().st_ino
    faults = Faults("nan@write=1", 0)  # counts
    world = World(0, 1, 0, torch.device("cpu"))
    run = RunFolder(tmp_path, Config(), world, faults, Ownership(tmp_path, faults))
    assert run.truncate_metrics(step) == validated
    assert path.read_text() == "".join(map(text, kept))
    assert faults.visits["write"] == writes
    assert (path.stat().st_ino == same_file) == (lines != [1, "torn", 2, 3])


# A disk of its own. Everything above can be tried anywhere; here nothing is injected.


@contextmanager
def small_disk(folder: Path, options: str):
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no file system of one's own can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, what: str) -> None:
    """Until there is no room for a byte, or for a file."""
    try:
        if what == "bytes":
            with open(disk / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        for number in range(10**6):
            (disk / f"filler_{number}").touch()
    except OSError:
        pass


def filled_while_training(runs, disk, what, *, overrides, free_again=False):
    """(exit code, output) of a run whose disk is filled during its fifth step."""
    fifth = Gate(disk.parent / "fifth", "step=4")
    seventh = Gate(disk.parent / "seventh", "step=6")
    command = runs.command("on_a_disk", overrides=overrides)
    command[command.index("--run-dir") + 1] = str(disk / "run")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=runs.folder,
        start_new_session=True,
        env={**os.environ, "EBWM_FAULTS": f"{fifth.fault}; {seventh.fault}"},
    )
    try:
        saved = disk / "run" / "checkpoints" / "step_000003" / "manifest.json"
        deadline = time.monotonic() + 120
        while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        fifth.wait_until_reached(process)
        time.sleep(1)  # what is written beside the save
        fill(disk, what)
        fifth.open()
        seventh.wait_until_reached(process)
        if free_again:
            time.sleep(2)  # in which the save of step 6 fails
            for filler in disk.glob("filler*"):
                filler.unlink()
        seventh.open()
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    return process.returncode, output


SMALL = {"bytes": "size=4M", "files": "size=64M,nr_inodes=60"}


@pytest.mark.parametrize(
    "what, logged",
    [
        ("bytes", 1),
        pytest.param("files", 1000, marks=pytest.mark.soak),
        pytest.param("bytes", 1000, marks=pytest.mark.soak),
        pytest.param("files", 1, marks=pytest.mark.soak),
    ],
)
def test_a_disk_that_fills_up_costs_what_is_not_on_it_yet_and_the_run_says_so(
    runs, tmp_path, what, logged
):
    with small_disk(tmp_path / "disk", SMALL[what]) as disk:
        code, output = filled_while_training(
            runs, disk, what, overrides={"logging.every_steps": logged}
        )
        steps = sorted(p.name for p in (disk / "run" / "checkpoints").glob("step_*"))
        rows = (disk / "run" / "metrics.jsonl").exists() and (
            disk / "run" / "metrics.jsonl"
        ).read_text()
    assert code == 1 and "Traceback" not in output, output[-3000:]
    assert "step 8 is NOT saved, newest checkpoint is step 3" in output, output[-3000:]
    assert "step 6: the checkpoint could not be written" in output and steps == ["step_000003"]
    assert output.count("rows are kept") <= 1
    for line in (rows or "").splitlines():
        json.loads(line)


@pytest.mark.parametrize("what", ["bytes", pytest.param("files", marks=pytest.mark.soak)])
def test_room_made_while_it_runs_is_enough_to_lose_nothing_but_a_checkpoint(
    runs, reference, tmp_path, what
):
    with small_disk(tmp_path / "disk", SMALL[what]) as disk:
        code, output = filled_while_training(runs, disk, what, overrides={}, free_again=True)
        assert code == 0, output[-3000:]
        lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
        steps = sorted(p.name for p in (disk / "run" / "checkpoints").glob("step_*"))
    whole = [(row["step"], row["loss"]) for row in runs.rows("whole")]
    assert [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines] == whole
    assert steps == ["step_000003", "step_000008"]
    assert "step 6: the checkpoint could not be written" in output


@pytest.mark.soak
def test_a_console_that_takes_nothing_ends_no_run(runs):
    """/dev/full: every write to it fails as on a full disk. And a pipe that nobody reads."""
    for name, output in (("full", "/dev/full"), ("unread", None)):
        if output is None:
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open(output, os.O_WRONLY)
        done = subprocess.run(
            runs.command(name), stdout=writer, stderr=writer, timeout=240, cwd=runs.folder
        )
        os.close(writer)
        assert done.returncode == 0, name
        assert runs.rows(name)[-1]["step"] == 8
