"""Checkpoints away from home: whole or not there, and enough to go on from on an empty machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from gates import Gate
from training_runs import end, free_port, same

from ebwm_scale.checkpoint.files import manifest_text
from ebwm_scale.checkpoint.remote import RemoteCopies, RemoteStore, check_remote, fetch_run
from ebwm_scale.core.errors import CheckpointError, ConfigError
from ebwm_scale.core.files import file_sha256

BUCKET = "s3://tests"


def write_checkpoint(run, step, content=b"weights"):
    """Of the format, as far as a copy looks at it."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "trainer.json", "state-00000-of-00001.safetensors"):
        (folder / name).write_bytes(content + name.encode())
    entries = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(manifest_text(entries))
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"half')
    return folder


@pytest.fixture(scope="module")
def object_store():
    """Options of fsspec for a real object store on loopback."""
    pytest.importorskip("moto", reason="an object store for tests needs the package moto[server]")
    pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.25)
        variables = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            import s3fs

            s3fs.S3FileSystem().mkdir("tests")
            yield variables
    finally:
        end(server)


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("object_store")
        return f"{BUCKET}/{tmp_path.name}"
    return f"file://{tmp_path}/away"


@pytest.mark.multiprocess
def test_a_copy_is_the_checkpoint_and_old_ones_follow_those_at_home(url, tmp_path):
    run = tmp_path / "run"
    copies = RemoteCopies(url, run)
    for step in (1, 2, 3):
        folder = write_checkpoint(run, step)
        copies.begin(folder)
        deadline = time.monotonic() + 30
        while not (told := copies.told()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert told == [(step, None)]
        if step == 2:
            shutil.rmtree(run / "checkpoints" / "step_000001")
    assert copies.finish() == []
    store = RemoteStore(url)
    assert store.checkpoints() == ["step_000003", "step_000002"]
    for name in os.listdir(folder):
        store.get(f"checkpoints/step_000003/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (folder / name).read_bytes()
    store.get("metrics.jsonl", tmp_path / "back")
    assert (tmp_path / "back").read_text() == '{"step": 1}\n{"step": 2}\n'  # whole lines
    with pytest.raises(CheckpointError, match="already holds a run .step_000003"):
        check_remote(url, resume=False)
    check_remote(url, resume=True)


def test_a_copy_that_is_damaged_on_the_way_is_none(tmp_path, monkeypatch):
    run, url = tmp_path / "run", f"file://{tmp_path}/away"
    copies = RemoteCopies(url, run)
    put = RemoteStore.put

    def damaged(store, source, name):
        if name.endswith(".safetensors"):
            (tmp_path / "bad").write_bytes(source.read_bytes()[:-1] + b"X")
            monkeypatch.setattr("ebwm_scale.checkpoint.remote.file_sha256", lambda path: "right")
            source = tmp_path / "bad"
        put(store, source, name)

    monkeypatch.setattr(RemoteStore, "put", damaged)
    copies.begin(write_checkpoint(run, 1))
    ((step, problem),) = copies.finish()
    assert step == 1 and "what was read back is not what was written" in problem
    assert RemoteStore(url).checkpoints() == []
    assert not fetch_run(url, tmp_path / "fetched", print)
    assert not (tmp_path / "fetched").exists()


def test_an_address_that_is_none_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint.remote is nowhere://a"):
        RemoteStore("nowhere://a")


@pytest.mark.multiprocess
@pytest.mark.parametrize("where", [pytest.param("file", marks=pytest.mark.soak), "s3"])
def test_a_run_goes_on_on_an_empty_machine(runs, tmp_path, where, request):
    """Killed, its folder gone: the copy leads to the bits of the run that nobody disturbed."""
    runs.run("whole")
    variables = request.getfixturevalue("object_store") if where == "s3" else {}
    url = f"{BUCKET}/{tmp_path.name}/run" if where == "s3" else f"file://{tmp_path}/away"
    options = {"overrides": {"checkpoint.remote": url}}
    store = RemoteStore(url)
    gate = Gate(runs.folder / "moved.gate", "step=6")
    faults = {"EBWM_FAULTS": f"{gate.fault}; hang@step=7"}
    stopped = runs.start("moved", variables=variables | faults, **options)
    saved = runs.folder / "moved" / "checkpoints" / "latest"
    gate.wait_until_reached(stopped)
    deadline = time.monotonic() + 60
    while saved.read_text() != "step_000006\n" and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the copy begins where the loop sees that the save is done: at the next step
    gate.open()
    kill_with_a_copy(stopped, store, "step_000006")
    options["variables"] = variables
    shutil.rmtree(runs.folder / "moved")
    output = runs.run("moved", flags=("--resume",), **options)
    assert "fetched step_000006" in output and "resumed at step 6" in output
    assert same(runs.state("moved"), runs.state("whole")) == []
    assert runs.rows("moved") == runs.rows("whole")
    events = (runs.folder / "moved" / "events.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, events) if row["event"] == "remote"]
    assert steps[-1] == 8 and store.checkpoints()[0] == "step_000008"
    store.get("metrics.jsonl", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (
        runs.folder / "moved" / "metrics.jsonl"
    ).read_bytes()
    refused = runs.run("another", expect=2, **options)
    assert "already holds a run" in refused and not (runs.folder / "another").exists()


def kill_with_a_copy(process, store, name):
    """SIGKILL to a run once that checkpoint of it is away from home."""
    deadline = time.monotonic() + 240
    try:
        while name not in store.checkpoints() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=240)
    finally:
        end(process)
    assert process.returncode == -signal.SIGKILL and name in store.checkpoints()


@pytest.mark.soak
@pytest.mark.multiprocess
def test_a_run_killed_again_and_again_on_empty_machines_is_the_run_of_one(
    runs, tmp_path, object_store
):
    """Each time at another moment of a save or a copy, and each time with nothing but the store."""
    longer = {"train.max_steps": 60, "checkpoint.every_steps": 2}
    runs.run("whole_again", overrides=longer)
    url = f"{BUCKET}/{tmp_path.name}/again"
    options = {"overrides": longer | {"checkpoint.remote": url}, "variables": object_store}
    hang = object_store | {"EBWM_FAULTS": "hang@step=12"}
    first = runs.start("again", overrides=options["overrides"], variables=hang)
    kill_with_a_copy(first, RemoteStore(url), "step_000010")
    for step in (19, 30, 41, 52):
        shutil.rmtree(runs.folder / "again")
        resumed = {"flags": ("--resume",), **options}
        runs.interrupt("again", signal.SIGKILL, after=f"step {step}/60", **resumed)
    shutil.rmtree(runs.folder / "again")
    runs.run("again", flags=("--resume",), **options)
    assert same(runs.state("again"), runs.state("whole_again")) == []
    assert runs.rows("again") == runs.rows("whole_again")


def test_a_store_that_is_away_for_a_while_is_said_and_tried_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    copies = RemoteCopies(f"file://{tmp_path}/away", run)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "put", lambda *_: (_ for _ in ()).throw(OSError("no route")))
        copies.begin(write_checkpoint(run, 1))
        deadline = time.monotonic() + 30
        while not (told := copies.told()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert told == [(1, "OSError: no route")]
    copies.begin(write_checkpoint(run, 2))
    assert copies.finish() == [(2, None)]
    assert copies.store.checkpoints() == ["step_000002"]


@pytest.mark.multiprocess
def test_a_store_that_cannot_be_reached_is_refused_before_anything_is_written(runs, tmp_path):
    (tmp_path / "away").write_text("a file, where a folder would have to be")
    away = {"checkpoint.remote": f"file://{tmp_path}/away/run"}
    for flags in ((), ("--resume",)):
        output = runs.run("unreachable", overrides=away, flags=flags, expect=2)
        assert "cannot be read (NotADirectoryError" in output and "check the address" in output
        assert not (runs.folder / "unreachable").exists()
