import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_corpus

from ebwm_scale.data.prepare.sample_corpus import ARCHIVE_NAME

TOOLS = Path(__file__).parents[2] / "tools"


def run(tool, *arguments, cwd):
    return subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_the_documented_commands_work_one_after_the_other(tmp_path):
    write_corpus(tmp_path / "corpus")
    done = run(
        "train_tokenizer",
        "corpus",
        "--output",
        "tokenizer.model",
        "--vocabulary-size",
        300,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "300 pieces" in done.stdout, done
    make = (
        "make_text_shards",
        "corpus",
        "--output",
        "data/corpus",
        "--tokenizer",
        "tokenizer.model",
        "--context-length",
        32,
    )
    done = run(*make, cwd=tmp_path)
    assert done.returncode == 0 and "unigram entropy" in done.stdout and done.stderr == "", done
    assert "already there" in run(*make, cwd=tmp_path).stdout
    done = run("verify_shards", "data/corpus/manifest.json", cwd=tmp_path)
    assert done.returncode == 0 and " 0 problems" in done.stdout, done
    shard = tmp_path / "data" / "corpus" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 140] ^= 1
    shard.write_bytes(content)
    done = run("verify_shards", "data/corpus/manifest.json", cwd=tmp_path)
    assert (
        done.returncode == 1
        and "train-000000.tar: sample train-000000000 (tokens.npy, offset 512" in done.stdout
    ), done


@pytest.mark.parametrize(
    "tool, arguments",
    [
        ("train_tokenizer", ("nowhere", "--output", "x", "--vocabulary-size", 300)),
        (
            "make_text_shards",
            ("nowhere", "--output", "x", "--tokenizer", "y", "--context-length", 3),
        ),
        ("verify_shards", ("nowhere/manifest.json",)),
        ("fetch_sample_corpus", ("--output", "x", "--archive", ARCHIVE_NAME)),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, tool, arguments):
    done = run(tool, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done
    assert list(tmp_path.iterdir()) == []
