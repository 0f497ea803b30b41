"""The doctor says what would run and what is missing, its exit code whether anything is."""

from __future__ import annotations

import os
import subprocess
import sys

from cluster_jobs import ROOT, SECRET, Jobs


def doctor(*arguments, expect: int, **variables) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-m", "ebwm_scale.doctor", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def test_with_everything_there_it_sums_over_processes_and_names_what_would_run(tmp_path, dataset):
    config = Jobs(None, tmp_path, dataset).configuration("fine", {"logging.wandb": "online"})
    output = doctor(
        "--config", config, "--run-dir", tmp_path / "runs", expect=0, WANDB_API_KEY=SECRET
    )
    for text in (
        "processes summed 16 MiB",
        "torch 2.",
        "MiB/s with fsync",
        "573 samples in 9 shards",
        "attention of the observed stream",
        "4 per forward pass",
        "nothing is missing",
    ):
        assert text in output, output
    assert SECRET not in output and not (tmp_path / "runs").exists()


def test_what_is_missing_is_named_and_the_exit_code_is_1(tmp_path, dataset):
    shard = next((dataset.parent / "train").glob("*.tar"), None) or next(
        dataset.parent.rglob("*.tar")
    )
    content = shard.read_bytes()
    config = Jobs(None, tmp_path, dataset).configuration(
        "poor", {"logging.wandb": "online", "train.global_batch_size": 5}
    )
    try:
        shard.write_bytes(content[:-100])
        output = doctor(
            "--config",
            config,
            "--run-dir",
            tmp_path,
            expect=1,
            WANDB_API_KEY="",
            NETRC=str(tmp_path / "none"),
            SLURM_NTASKS="2",
        )
    finally:
        shard.write_bytes(content)
    assert (
        "truncated" in output
        and "there is no key" in output
        and "does not divide over 2 processes" in output
        and "3 missing" in output
    )
