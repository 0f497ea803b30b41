"""A small dataset, a tiny configuration, and runs of train.py as users start it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from preloaded import PreloadedRun
from safetensors.torch import load_file

from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.prepare.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model": {
        "size": "4xs",
        "num_layers": 2,
        "width": 32,
        "num_heads": 2,
        "predicted_input": "anchored",
    },
    "refinement": {"step_size": 30, "learning_rate_multiplier": 1.0},
    "optimizer": {"learning_rate": 0.01},
    "schedule": {"warmup_steps": 3},
    "train": {"global_batch_size": 4, "max_steps": 8},
    "checkpoint": {"every_steps": 3},
    "evaluation": {"every_steps": 4, "max_samples": 10},
    "logging": {"every_steps": 1},
}
# Variables that no library reads while it is imported.
READ_LATE = {"EBWM_FAULTS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
READ_LATE |= {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
READ_LATE |= {"AWS_DEFAULT_REGION"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """manifest.json of about 300 blocks of 16 + 1 tokens, 280 pieces."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    words = [
        "".join(generator.choice("abcdefghij") for _ in range(generator.randint(2, 6)))
        for _ in range(60)
    ]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(" ".join(generator.choice(words) for _ in range(250)))
    train_tokenizer([corpus], folder / "tokenizer.model", 300)
    return make_text_dataset(
        [corpus],
        folder / "shards",
        tokenizer=folder / "tokenizer.model",
        context_length=16,
        samples_per_shard=64,
    )


class Runs:
    """Start train.py on the tiny configuration; processes get bounded time and are ended with the
    test.
    """

    def __init__(self, folder: Path, manifest: Path):
        self.folder, self.manifest = folder, manifest

    def command(
        self,
        name: str,
        *,
        overrides: dict | None = None,
        processes: int = 1,
        flags: tuple[str, ...] = (),
    ) -> list[str]:
        config = json.loads(json.dumps(TINY))
        config["data"] = {"manifest": str(self.manifest)}
        for key, value in (overrides or {}).items():
            section, _, rest = key.partition(".")
            config.setdefault(section, {})[rest] = value
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        start = (
            [sys.executable]
            if processes == 1
            else [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
            ]
        )
        return [
            *start,
            str(ROOT / "ebwm_scale" / "train.py"),
            "--config",
            str(file),
            "--run-dir",
            str(self.folder / name),
            *flags,
        ]

    def start(
        self,
        name: str,
        *,
        variables: dict[str, str] | None = None,
        afresh: bool = False,
        **options,
    ) -> subprocess.Popen | PreloadedRun:
        """afresh: a Python of its own, as users start it, in place of one that has imported the
        libraries already. So start torchrun, and runs with variables that libraries may read.
        """
        command = self.command(name, **options)
        is_plain = command[0] == sys.executable and command[1].endswith("train.py")
        if is_plain and not afresh and set(variables or {}) <= READ_LATE:
            return PreloadedRun(command[1:], self.folder, variables or {})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        for key in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "TRITON_INTERPRET",
        ):
            environment.pop(key, None)
        environment.update(variables or {})
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
            cwd=self.folder,
        )

    def run(self, name: str, *, expect: int = 0, timeout: int = 240, **options) -> str:
        """The output of a run that ends with the expected exit code: of all ranks, one after the
        other. Several processes start as srun would start them; afresh: torchrun starts them.
        """
        if options.get("processes", 1) > 1 and not options.get("afresh"):
            return self._run_ranks(name, expect, timeout, **options)
        process = self.start(name, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            end(process)
        assert process.returncode == expect, output[-4000:]
        return output

    def _run_ranks(
        self,
        name: str,
        expect: int,
        timeout: int,
        *,
        processes: int,
        overrides: dict | None = None,
        flags: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
    ) -> str:
        command = self.command(name, overrides=overrides, flags=flags)[1:]
        everyone = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = []
        try:
            for rank in range(processes):
                place = {"RANK": rank, "LOCAL_RANK": rank, **everyone}
                place = {key: str(value) for key, value in place.items()}
                ranks.append(PreloadedRun(command, self.folder, {**place, **(variables or {})}))
            output = "".join(rank.communicate(timeout=timeout)[0] for rank in ranks)
        finally:
            for rank in ranks:
                end(rank)
        assert [rank.returncode for rank in ranks] == [expect] * processes, output[-4000:]
        return output

    def interrupt(
        self, name: str, number: signal.Signals, *, after: str, timeout: int = 240, **options
    ) -> int:
        """Run until a line contains `after`, send the signal to the main process (SIGKILL: to all),
        return the exit code.
        """
        process, deadline = self.start(name, **options), time.monotonic() + timeout
        try:
            for line in process.stdout:
                if after in line or time.monotonic() > deadline:
                    break
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            process.communicate(timeout=timeout)
        finally:
            end(process)
        return process.returncode

    def rows(self, name: str) -> list[dict]:
        """Metric rows without what a clock or the machine writes."""
        volatile = (
            "step_time_s",
            "tokens_per_s",
            "frames_per_s",
            "patches_per_s",
            "model_tflops",
            "mfu",
            "peak_memory_gib",
            "eta_s",
        )
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if key not in volatile}
            for line in lines
        ]

    def losses(self, name: str) -> dict[tuple, list[float]]:
        return {
            (row["step"], row.get("split", "train")): row["loss_per_step"]
            for row in self.rows(name)
        }

    def state(self, name: str) -> dict:
        """Weights and optimizer state of the newest checkpoint, by file and tensor, and the replay
        buffer.
        """
        checkpoints = self.folder / name / "checkpoints"
        folder = checkpoints / (checkpoints / "latest").read_text().strip()
        return {
            file.name: load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, weights_only=True)
            for file in sorted([*folder.glob("state-*.safetensors"), *folder.glob("*.pt")])
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(process: subprocess.Popen | PreloadedRun) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(30)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), dataset)


def same(left, right, path="") -> list[str]:
    """Where two nested states differ, bit for bit; tensors, numbers and strings."""
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    if isinstance(left, dict):
        return [
            d
            for key in left.keys() | right.keys()
            for d in (
                same(left[key], right[key], f"{path}/{key}")
                if key in left and key in right
                else [path]
            )
        ]
    if isinstance(left, (list, tuple)):
        return [
            d
            for i, (a, b) in enumerate(zip(left, right, strict=True))
            for d in same(a, b, f"{path}/{i}")
        ]
    return [] if not isinstance(left, (int, float, str)) or left == right else [path]
