"""A build that is killed goes on where it was, and gives the bytes of one that was not."""

import json
import subprocess
import sys
import time

import pytest
from corpora import CONTEXT_LENGTH

from ebwm_scale.data.prepare import scanning
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.text import make_text_dataset

BUILD = """
import os, signal, sys
from ebwm_scale.data.prepare import packing, runs, scanning, text
from ebwm_scale.data.prepare.reading import tasks

tasks.TASK_BYTES = 3000
runs._RUN_DOCUMENTS = 2
packing._GROUP_TOKENS = 700
begun, where, after = 0, sys.argv[4], int(sys.argv[5])

def counted(module, name):
    real = getattr(module, name)
    def call(*arguments, **options):
        global begun
        if name == where:
            begun += 1
            if begun > after:
                os.kill(main, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        with open(sys.argv[2] + ".log", "a") as log:
            log.write(name + "\\n")
        return real(*arguments, **options)
    setattr(module, name, call)

main = os.getpid()
counted(scanning, "_do")
counted(runs.RunWriter, "flush")
counted(packing, "_write_shards")
counted(packing, "_link")
counted(text, "write_manifest")
text.make_text_dataset(
    [sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], context_length=16,
    validation_fraction=0.2, samples_per_shard=20, report=str,
)
"""


def build(corpus, output, tokenizer, where="nowhere", after=0):
    """(exit code, what was begun)."""
    log = output.with_name(output.name + ".log")
    log.unlink(missing_ok=True)
    command = [sys.executable, "-c", BUILD, corpus, output, tokenizer, where, str(after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, log.read_text().split() if log.exists() else []


@pytest.fixture(scope="module")
def undisturbed(corpus, tokenizer_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    code, begun = build(corpus, output, tokenizer_path)
    assert code == 0
    return output, {name: begun.count(name) for name in set(begun)}


def test_small_tasks_and_runs_give_the_bytes_of_large_ones(undisturbed, pristine):
    output, begun = undisturbed
    assert {p.name: p.read_bytes() for p in output.iterdir()} == {
        p.name: p.read_bytes() for p in pristine.parent.iterdir()
    }
    assert begun["_do"] > 3 and begun["flush"] > begun["_do"] and begun["_write_shards"] > 5


@pytest.mark.parametrize(
    "where, after, spared",
    [
        ("_do", 0, {}),
        ("flush", 2, {}),
        ("_write_shards", 0, {"_do"}),
        ("_link", 5, {"_do", "_write_shards"}),
        ("write_manifest", 0, {"_do", "flush", "_write_shards"}),
    ],
)
def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    undisturbed, corpus, tokenizer_path, tmp_path, where, after, spared
):
    whole, all_begun = undisturbed
    output = tmp_path / "out"
    code, _ = build(corpus, output, tokenizer_path, where, after)
    assert code == -9 and not output.exists() and (tmp_path / ".out.work").is_dir()
    code, begun = build(corpus, output, tokenizer_path)
    assert code == 0
    assert {p.name: p.read_bytes() for p in output.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.log"]
    for name in spared:
        assert begun.count(name) < all_begun[name]
    if "_write_shards" in spared and where == "write_manifest":
        assert begun.count("_write_shards") == 0


def test_a_file_that_changed_is_read_again_and_the_others_are_not(corpus, tokenizer_path, tmp_path):
    import shutil

    shutil.copytree(corpus, tmp_path / "in")
    output = tmp_path / "out"
    assert build(tmp_path / "in", output, tokenizer_path, "write_manifest")[0] == -9
    changed = sorted((tmp_path / "in").rglob("*.txt"))[0]
    time.sleep(0.01)
    changed.write_text("another text " * 40)
    code, begun = build(tmp_path / "in", output, tokenizer_path)
    assert code == 0 and 1 <= begun.count("_do") < 4
    fresh = make_text_dataset(
        [tmp_path / "in"],
        tmp_path / "fresh",
        tokenizer=tokenizer_path,
        context_length=CONTEXT_LENGTH,
        validation_fraction=0.2,
        samples_per_shard=20,
        report=str,
    )
    assert {p.name: p.read_bytes() for p in output.iterdir()} == {
        p.name: p.read_bytes() for p in fresh.parent.iterdir()
    }


def test_much_work_outlives_an_error_in_the_input_and_little_does_not(tmp_path, monkeypatch):
    from ebwm_scale.core.errors import DataError

    for worth, kept in ((10, True), (10**6, False)):
        monkeypatch.setattr(scanning, "_WORTH_KEEPING", worth)
        with pytest.raises(DataError), scanning.work_folder(tmp_path / "out") as work:
            (work / "runs" / "task").mkdir(parents=True, exist_ok=True)
            done = {"num_input_bytes": 1000, "left_out": LeftOut().to_json()}
            (work / "runs" / "task" / "done.json").write_text(json.dumps(done))
            raise DataError("a truncated file")
        assert (tmp_path / ".out.work").exists() is kept
