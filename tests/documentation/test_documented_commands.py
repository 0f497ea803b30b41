"""Every command of the documentation runs: in a folder that looks like a checkout with small data,
with sizes that fit a test, in the order of the pages.

Commands that need Slurm run in tests/cluster; those that take minutes have tests of their own,
named in ELSEWHERE.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import COMMANDS, ROOT

ELSEWHERE = {  # what a command contains -> where it runs
    "sbatch ": "cluster/test_sbatch.py",
    "srun ": "cluster/test_doctor.py",
    "slurm/": "cluster/test_scripts.py",
    "ebwm_scale.launch": "cluster/test_attempts.py",
    "check_zero.py": "training/test_zero.py",
    "bench_sequence.py": "training/test_sequence_parallel.py",
    "parallel.sequence": "training/test_sequence_runs.py",
    "count_step.py": "planning/test_step_count.py",
    "check_parity.py": "evaluation/test_parity.py",
    "ebwm_scale.harness": "inference/test_scoring.py",
    "ebwm_scale.explore": "exploring/test_serving.py",
    "scaling_study.py": "evaluation/test_scaling.py",
    "study_width.py": "tools/test_study_width.py",
    "data/products": "training/test_reasoning_runs.py",
    "runs/products": "training/test_reasoning_runs.py",
    "data/mazes": "training/test_reasoning_runs.py",
    "runs/mazes": "training/test_reasoning_runs.py",
    "--extend": "training/test_extending.py",
    "--weights ema": "training/test_weight_average.py",
    "make_world_shards.py": "data/test_world_datasets.py",
    "data/pole": "data/test_world_datasets.py",
    "runs/world": "training/test_world_runs.py",
    "ebwm_scale.top": "reporting/test_top.py",
    "--watch": "reporting/test_top.py",
    "ebwm_scale.plan_actions": "control/test_plan_actions.py",
    "study_planning.py": "control/test_study_planning.py",
}
SMALL = [
    "model.num_layers=1",
    "model.width=16",
    "model.num_heads=1",
    "train.max_steps=3",
    "train.global_batch_size=8",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=0",
    "evaluation.max_samples=4",
    "schedule.warmup_steps=1",
    "logging.every_steps=1",
]
TEXT = [  # what is there before what needs it
    "tools/train_tokenizer.py",
    "tools/make_text_shards.py",
    "--dry-run",
    "train.py",
    "ebwm_scale.report",
    "ebwm_scale.think",
    "ebwm_scale.evaluate",
    "ebwm_scale.questions",
    "ebwm_scale.plan",
    "ebwm_scale.doctor",
    "verify_shards.py",
    "export runs/mine converted/ --training",
    "export ",
    "to-run",
    "export-released",
    "import-released",
]


def of(page, *, video):
    chosen = [
        command
        for where, command in COMMANDS
        if where == page and not any(mark in command for mark in ELSEWHERE)
    ]
    chosen = [
        command
        for command in chosen
        if (page == "video.md" or "clips" in command or "video" in command) == video
    ]
    place = lambda command: next((i for i, mark in enumerate(TEXT) if mark in command), -1)
    return sorted(
        chosen, key=lambda command: (("again" in command) and "train.py" in command, place(command))
    )


class Checkout:
    """A folder with this checkout's code, and data of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("ebwm_scale", "kernels", "tools", "configs", "tests"):
            (folder / name).symlink_to(ROOT / name)
        generator = random.Random(0)
        words = [
            "".join(generator.choice("abcdefghij") for _ in range(generator.randint(2, 6)))
            for _ in range(60)
        ]
        (folder / "my_text").mkdir()
        for i in range(6):
            (folder / "my_text" / f"{i}.txt").write_text(
                " ".join(generator.choice(words) for _ in range(400))
            )
        (folder / "prompts.txt").write_text("abc\nde fg\n")
        (folder / "choices.jsonl").write_text(
            json.dumps({"context": "abc", "choices": [" de", " fg"], "answer": 0}) + "\n"
        )
        (folder / "cloze.jsonl").write_text(json.dumps({"context": "abc", "answer": " de"}) + "\n")

    def run(self, command: str, **changes: str) -> None:
        text = re.sub(r"\[|\]", "", command) if "think" in command else command
        for before, after in {
            "--vocabulary-size 32000": "--vocabulary-size 300",
            "--context-length 256": "--context-length 16",
            "--max-new 64": "--max-new 3",
            "--max-new 8": "--max-new 2",
            " ...": "",
            "data.manifest=...": "data.manifest=data/mine/manifest.json",
            **changes,
        }.items():
            text = text.replace(before, after)
        words = shlex.split(text)
        if (
            "convert_checkpoint.py" in text
        ):  # the page shows alternatives that write to one place, and nothing is overwritten
            target = self.folder / words[4]
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "torchrun":
            words = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=2",
                *words[2:],
            ]
        else:
            words[0] = str(Path(sys.executable).parent / words[0])
        if "ebwm_scale/train.py" in words:
            words += [
                "--set",
                *SMALL,
                *([] if "video" in command or "clips" in command else ["data.context_length=16"]),
            ]
        elif "ebwm_scale.doctor" in words:
            words += ["--set", "data.context_length=16"]  # as the shards here were packed
        elif "ebwm_scale.evaluate" in words:
            words += ["--max-samples", "4", "--steps", "1", "2", "--starts", "1"]
        environment = {
            key: value
            for key, value in os.environ.items()
            if key
            not in (
                "RANK",
                "WORLD_SIZE",
                "LOCAL_RANK",
                "MASTER_ADDR",
                "MASTER_PORT",
                "TRITON_INTERPRET",
            )
        }
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0 or ("ebwm_scale.doctor" in command and done.returncode == 1), (
            f"{command}\n{done.stdout[-3000:]}"
        )


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def videos(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from make_synthetic_videos import main

    kept, sys.argv = (
        sys.argv,
        ["make_synthetic_videos.py", str(folder / "my_videos"), "--count", "3", "--seconds", "12"],
    )
    try:
        assert main() == 0
    finally:
        sys.argv = kept
    (folder / "clip.mp4").write_bytes((folder / "my_videos" / "000000.mp4").read_bytes())


def test_every_command_runs_somewhere():
    here = {
        command
        for page in (
            "README.md",
            "tutorial.md",
            "thinking.md",
            "performance.md",
            "training.md",
            "conversion.md",
            "video.md",
            "distributed.md",
            "data.md",
        )
        for video in (False, True)
        for command in of(page, video=video)
    }
    for page, command in COMMANDS:
        assert command in here or any(mark in command for mark in ELSEWHERE), f"{page}: {command}"
    for where in ELSEWHERE.values():
        assert (ROOT / "tests" / where).exists(), where


def python_of(page: str) -> str:
    """The Python of a page, on the run and the data that its commands make in a test."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
    assert "runs/quickstart" in code and "data/sample-64/" in code
    return code.replace("runs/quickstart", "runs/mine").replace("data/sample-64/", "data/mine/")


def test_the_commands_and_the_python_of_the_readme_and_the_tutorial_on_text(checkout):
    commands = of("README.md", video=False)
    assert len(commands) >= 10
    for command in commands:
        checkout.run(command)
    further = [command for command in of("tutorial.md", video=False) if command not in commands]
    assert further
    for command in further:
        checkout.run(command, **{"runs/quickstart": "runs/mine"})
    for page in ("README.md", "docs/tutorial.md"):
        (checkout.folder / "snippet.py").write_text(python_of(page), encoding="utf-8")
        checkout.run("python snippet.py")


def test_the_commands_of_the_page_on_data(checkout):
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [path.read_text() for path in sorted((checkout.folder / "my_text").iterdir())]
    rows = [
        {"content": {"text": text}, "url": f"u/{i}", "score": i / 4} for i, text in enumerate(texts)
    ]
    (checkout.folder / "dumps").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), checkout.folder / "dumps" / "a.parquet")
    (command,) = of("data.md", video=False)
    checkout.run(command)
    manifest = json.loads((checkout.folder / "data" / "dumps" / "manifest.json").read_text())
    assert manifest["source"]["num_documents"] == len(texts) - 2


@pytest.mark.soak
def test_the_commands_on_video(checkout):
    pytest.importorskip("av", reason="the package av is not installed")
    videos(checkout.folder)
    for command in of("README.md", video=True) + of("thinking.md", video=True):
        checkout.run(command, RUN="runs/clips")
    for command in of("video.md", video=True):
        checkout.run(command)


@pytest.mark.soak
def test_the_commands_of_the_other_pages(checkout):
    for command in (
        of("README.md", video=False)[:2]
        + of("training.md", video=False)
        + of("conversion.md", video=False)
        + of("performance.md", video=False)
    ):
        checkout.run(command)
    for command in of("thinking.md", video=False):
        checkout.run(command, RUN="runs/mine")
    for command in of("distributed.md", video=False):
        checkout.run(
            command.replace(
                "refinement.recompute=block",
                "refinement.recompute=block data.manifest=data/mine/manifest.json",
            )
        )
